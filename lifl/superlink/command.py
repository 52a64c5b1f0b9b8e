"""``lifl-superlink``: Flower's command line, app and state, served through lifl's gateway.

Owns the flags and the life of the server. It logs which parts are in use. A part that is missing, because Flower has
moved a name that it needs, is left to Flower, which is logged once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from lifl.errors import EbpfUnavailableError, LiflError
from lifl.node.node import Node
from lifl.shm import arena as shm
from lifl.shm.sizes import default_bytes, parse_bytes
from lifl.superlink import flower
from lifl.superlink.profiler import Profiler

TESTED = ("1.41", "1.42")
DEFAULT_MEMORY = 2**32
NODE_TIMEOUT_S = 5
"""Time after which a SuperNode's HTTP client gives a request up."""


def own_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds lifl's own flags to a parser."""
    group = parser.add_argument_group("lifl", "the data plane of lifl-superlink")
    group.add_argument(
        "--lifl-memory",
        metavar="SIZE",
        help="Shared memory for updates and models, taken from the machine at the start: 512MiB, 8GiB. "
        "Default: 4 GiB, or a quarter of what is available if that is less.",
    )
    group.add_argument("--lifl-workers", type=int, metavar="N", help="Worker processes that fold. Default: one a core.")
    group.add_argument(
        "--lifl-transport",
        choices=["rings", "ebpf", "auto"],
        help="The way in which workers learn of updates: through shared memory, or through sockets that an eBPF "
        "program routes and counts (auto: if the machine allows it). Default: LIFL_TRANSPORT, else rings.",
    )
    group.add_argument(
        "--lifl-max-object",
        metavar="SIZE",
        default="64MiB",
        help="A larger object is refused (Flower's clients send arrays in chunks of 5 MiB). Default: 64MiB.",
    )
    group.add_argument(
        "--lifl-hold",
        type=float,
        metavar="SECONDS",
        default=4.0,
        help="Time for which a SuperNode's request for work is held open while there is none. Default: 4; 0: none.",
    )
    group.add_argument(
        "--lifl-metrics-port",
        type=int,
        metavar="PORT",
        help="Serve metrics to Prometheus at this port, at /metrics (0: any free port, which is in the log). Needs "
        "the extra lifl[metrics]. Default: none are served.",
    )
    group.add_argument(
        "--lifl-metrics-host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="Serve metrics at this address. Default: 127.0.0.1.",
    )
    group.add_argument("--lifl-profile", metavar="FILE", help="Write where the server's CPU time went, as JSON.")


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """lifl's flags, and the arguments for Flower; ends the process for ``--help`` and for wrong values."""
    if {"-h", "--help"} & set(arguments):
        whole = flower.part("server").parser()
        whole.prog = "lifl-superlink"
        whole.description = "Start a Flower SuperLink with lifl's data plane: every flag of flower-superlink, and more"
        own_arguments(whole)
        whole.parse_args(["--help"])
    parser = argparse.ArgumentParser(prog="lifl-superlink", allow_abbrev=False, add_help=False)
    own_arguments(parser)
    own, rest = parser.parse_known_args(arguments)
    for flag, value in (("--lifl-memory", own.lifl_memory), ("--lifl-max-object", own.lifl_max_object)):
        try:
            if value is not None:
                parse_bytes(value)
        except ValueError as error:
            parser.error(f"argument {flag}: {error}")
    if own.lifl_workers is not None and not 0 <= own.lifl_workers <= 255:
        parser.error(f"argument --lifl-workers: {own.lifl_workers} is not 0 to 255")
    if own.lifl_metrics_port is not None and not 0 <= own.lifl_metrics_port <= 65535:
        parser.error(f"argument --lifl-metrics-port: {own.lifl_metrics_port} is not 0 to 65535")
    if not 0 <= own.lifl_hold < NODE_TIMEOUT_S:
        parser.error(
            f"argument --lifl-hold: {own.lifl_hold} is not from 0 to below {NODE_TIMEOUT_S}: then a SuperNode gives up"
        )
    return own, rest


def main() -> None:
    """Starts the server; returns when it is stopped."""
    own, rest = parse(sys.argv[1:])
    names = flower.part("server")
    sys.argv = [sys.argv[0], *rest]
    names.warn_update(process_name="flower-superlink")
    config = names.parse_config()
    if not str(names.version).startswith(tuple(f"{v}." for v in TESTED)):
        names.log(WARNING, "flwr %s is outside of what lifl is tested with (%s)", names.version, ", ".join(TESTED))
    names.log(INFO, "Starting lifl-superlink (flwr %s)", names.version)
    _skip_hidden_lines(names.logger)
    _show_log_of_lifl(names.logger)
    serve(config, own)


def _show_log_of_lifl(logger: logging.Logger) -> None:
    """Shows lifl's own log lines, such as the choice of the transport, as Flower's lines are shown."""
    ours = logging.getLogger("lifl")
    ours.handlers[:] = logger.handlers
    ours.setLevel(logger.level)


def _skip_hidden_lines(logger: logging.Logger) -> None:
    """Has no line made that no handler shows: Flower's request handlers make one for each object."""
    logger.setLevel(max(logger.level, min((handler.level for handler in logger.handlers), default=0)))


def _node(own: argparse.Namespace) -> Node:
    memory = default_bytes(DEFAULT_MEMORY) if own.lifl_memory is None else own.lifl_memory
    try:
        return Node(
            memory,
            own.lifl_workers,
            transport=own.lifl_transport,
            metrics_port=own.lifl_metrics_port,
            metrics_host=own.lifl_metrics_host,
        )
    except ValueError as error:  # the flags have been checked, so a variable of the environment is wrong
        sys.exit(f"lifl-superlink: {error}")


def serve(config: Any, own: argparse.Namespace) -> None:
    """Builds the app with all parts that there are, and runs it until the server is stopped."""
    import uvicorn

    from lifl import __version__

    names = flower.part("server")
    plane = None
    try:
        from lifl.superlink.plane import Plane

        shm.require()
        # The Node is made before anything starts a thread.
        plane = Plane(config, _node(own), parse_bytes(own.lifl_max_object), own.lifl_hold)
    except (flower.MissingNameError, LiflError) as error:
        # A missing part ends the server if it was asked for. eBPF raises only if a flag or the environment names it.
        is_asked_for = own.lifl_memory is not None or own.lifl_metrics_port is not None
        is_asked_for = is_asked_for or isinstance(error, EbpfUnavailableError)
        if isinstance(error, LiflError) and is_asked_for:
            sys.exit(f"lifl-superlink: {error}")
        names.log(WARNING, "lifl's data plane is off, Flower's own is used: %s", error)
    except (ModuleNotFoundError, OSError) as error:
        if own.lifl_metrics_port is None:
            raise
        sys.exit(f"lifl-superlink: {error.strerror if isinstance(error, OSError) else error}")
    profiler = None
    if own.lifl_profile is not None:
        profiler = Profiler(Path(own.lifl_profile), dict if plane is None else plane.count_bytes)
    try:
        if profiler is not None:
            profiler.start()
        if plane is None:
            app: Any = names.create_app(config, names.Lifespan)
        else:
            app = plane.app
            names.log(INFO, "lifl %s: %s", __version__, plane)
            for reason in plane.left_out:
                names.log(WARNING, "A part of lifl's data plane is off, Flower's own path is used for it: %s", reason)
        names.log(INFO, "Starting the SuperLink HTTP APIs on %s:%s", config.host, config.port)
        uvicorn.run(
            app=app,
            host=config.host,
            port=config.port,
            http="auto" if plane is None else plane.protocol,
            loop="asyncio",  # not uvloop, on which buffered protocols hang
            access_log=True,
            log_config=names.get_log_config(names.console_handler.level),
            ssl_keyfile=config.ssl_keyfile,
            ssl_certfile=config.ssl_certfile,
            workers=1,
        )
    finally:
        if profiler is not None:
            profiler.stop()
        if plane is not None:
            plane.close()
