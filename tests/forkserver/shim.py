"""Stands for a program that the fork server runs: see ``tests/forkserver/__init__.py``. ``-IS`` makes it quick."""

import marshal
import os
import resource
import signal
import socket
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
AT_THE_START = ("PYTHON", "LD_")
"""Prefixes of variables that are read when a program starts: a process that is forked would pass over them."""
HARMLESS = ("PYTHONUNBUFFERED=", "PYTHONDONTWRITEBYTECODE=", "PYTHONPATH=\0")
COMPARED = ("Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Seccomp:", "Cpus_allowed:")
"""Lines of /proc/PID/status."""
LIMITS = {value for name, value in vars(resource).items() if name.startswith("RLIMIT_")}


def situation(pid: str, environment: list[str]) -> tuple[object, ...]:
    """All that a forked process would take from the fork server: user, capabilities, cores, namespaces, variables."""
    with open(f"/proc/{pid}/status") as file:
        lines = [line for line in file if line.startswith(COMPARED)]
    names = sorted(os.listdir(f"/proc/{pid}/ns"))
    spaces = [os.readlink(f"/proc/{pid}/ns/{name}") for name in names]
    read = {f"{one}\0" for one in environment if one.startswith(AT_THE_START)}
    return lines, spaces, os.readlink(f"/proc/{pid}/root"), {one for one in read if not one.startswith(HARMLESS)}


def is_alike(server: socket.socket) -> bool:
    """True if a process of the fork server is what this process would become."""
    pid = int.from_bytes(server.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
    try:
        with open(f"/proc/{pid}/environ") as file:
            environment = file.read().split("\0")
        own = [f"{name}={value}" for name, value in os.environ.items()]
        return situation("self", own) == situation(str(pid), environment)
    except OSError:
        return False


def run_original() -> None:
    """Becomes the program of this name that is next on the path."""
    name, own = os.path.basename(sys.argv[0]), os.path.dirname(os.path.abspath(sys.argv[0]))
    for folder in os.environ["PATH"].split(os.pathsep):
        path = os.path.join(folder, name)
        if folder != own and os.access(path, os.X_OK):
            os.execv(path, [path, *sys.argv[1:]])
    sys.exit(f"{name} is not on the path behind {own}")


def main() -> None:
    """Asks for the process and stands for it until it ends."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        server.connect(os.environ.get("LIFL_TESTS_FORKSERVER", ""))
    except OSError:
        run_original()
    if not is_alike(server):
        run_original()
    # A signal before the process is known waits for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    limits = {number: resource.getrlimit(number) for number in LIMITS}
    request = marshal.dumps((os.path.basename(sys.argv[0]), sys.argv[1:], dict(os.environ), os.getcwd(), limits))
    socket.send_fds(server, [request], [0, 1, 2])
    pid = int(server.recv(64) or b"0")
    if not pid:
        sys.exit("the fork server has ended")
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    status = int(server.recv(64) or -signal.SIGKILL)
    if status < 0:
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


main()
