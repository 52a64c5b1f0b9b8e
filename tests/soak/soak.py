"""Rung 6 of the ladder: rounds of every kind for a chosen time, while workers are killed and stopped.

    python tests/soak/soak.py --minutes 30 --seed 7 [--json FILE]

Every value is an integer, so that every sum is exact, and a power of two, so that a sum tells who is in it. At the
end the drift of blocks, descriptors, processes, threads and memory is shown. The exit status is 1 at the first wrong
mean, and if anything drifts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np

import lifl
from lifl.errors import AdmissionError, RoundError, ShmError

WAIT_S = 120.0
STALL_S = 1.0
MEMORY_DRIFT = 16 * 2**20
"""Bytes of private memory that may come and go: the allocator keeps what a burst took."""

SHAPES = {
    "tiny": {"w": ((16,), "float32"), "n": ((), "int64")},
    "odd": {"a": ((0, 3), "float32"), "b": ((), "float64"), "c": ((7, 11), "float16"), "d": ((5,), "int8")},
    "many": {f"t{i}": ((3,), "float32") for i in range(300)},
    "large": {"w": ((512, 1024), "float32"), "b": ((4096,), "float64")},
}
MOST = {"tiny": 40, "odd": 6, "many": 12, "large": 12}
"""Clients in a round: int8 and float16 hold few powers of two."""


class Model:
    """A spec and its updates: client i's arrays are full of 2**i."""

    def __init__(self, name: str) -> None:
        self.name, self.most = name, MOST[name]
        zeros = {key: np.zeros(shape, dtype) for key, (shape, dtype) in SHAPES[name].items()}
        self.spec = lifl.TensorSpec.from_arrays(zeros)

    def update(self, i: int) -> dict[str, Any]:
        """Client i's."""
        return {key: np.full(shape, 2**i, dtype) for key, (shape, dtype) in SHAPES[self.name].items()}

    def check(self, arrays: Any, who: set[int]) -> None:
        """The mean is exactly that of `who`: rounded once, to each tensor's dtype."""
        mean = sum(2**i for i in who) / len(who)
        for key, (shape, dtype) in SHAPES[self.name].items():
            kind = np.dtype(dtype).kind
            wanted = np.full(shape, np.rint(mean) if kind == "i" else mean).astype(dtype)
            if not np.array_equal(arrays[key], wanted):
                raise AssertionError(f"{self.name}: {key} is {arrays[key].flat[0]}, the mean of {who} is {mean}")


class Soak:
    """One Node, threads that run rounds on it, and one that kills and stops its workers."""

    def __init__(self, seed: int, seconds: float) -> None:
        self.seed, self.until = seed, time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.samples: list[dict[str, int]] = []
        self.error: BaseException | None = None
        self.node = lifl.Node("96MiB", workers=3, stall_timeout=STALL_S)
        self.free = self.node.arena.free_bytes
        self.models = [Model(name) for name in SHAPES]
        self.quiet = threading.Lock()  # held by who looks for drift: no round begins meanwhile
        self.running = threading.Semaphore(0)

    @property
    def is_over(self) -> bool:
        """True when the time is over, or something was wrong."""
        return time.monotonic() > self.until or self.error is not None

    # ------------------------------------------------------------ rounds

    def one_round(self, choose: random.Random) -> None:
        """A round of any kind, checked."""
        model = choose.choice(self.models)
        n = choose.randint(1, model.most)
        order = choose.choice(["any", "any", "any", "flower"])
        clients = list(range(n))
        choose.shuffle(clients)
        how: dict[str, Any] = {"timing": choose.choice(["eager", "lazy"]), "order": order}
        if choose.random() < 0.3:
            how["commit_every"] = choose.randint(1, 8)
        with self.node.open_round(model.spec, n, **how) as round_:
            for i in clients:
                self.disturb(round_, model, choose)
                self.hand_in(round_, model, i, choose)
            end = choose.random()
            if end < 0.05:
                self.counts["rounds left"] += 1
                return
            if end < 0.2:
                round_.close_early()
            try:
                result = round_.result(WAIT_S)
            except RoundError as error:
                if "workers died of it" not in str(error) and "no update is left" not in str(error):
                    raise
                self.counts["rounds failed by poison"] += 1
                return
            who = {int(c.client_id) for c in result.report.accepted}
            refused = {int(r.client_id) for r in result.rejected if r.rule == "poison"}
            if who | refused != set(clients) or who & refused or result.num_updates != len(who):
                raise AssertionError(f"{who} counted and {refused} refused of {clients}")
            if order == "any":
                model.check(result.arrays, who)
            self.counts["poison"] += len(refused)
            self.counts["deaths in rounds"] += result.report.deaths
            self.counts["updates"] += len(who)
            self.counts["rounds"] += 1

    def hand_in(self, round_: lifl.Round, model: Model, i: int, choose: random.Random) -> None:
        """By submit or by a loan; a full arena is waited for."""
        if choose.random() < 0.8:
            round_.submit(model.update(i), client_id=i, timeout=WAIT_S)
            return
        with round_.loan(i, timeout=WAIT_S) as loan:
            for key, array in model.update(i).items():
                loan.arrays[key][...] = array
            loan.send(1.0)

    def disturb(self, round_: lifl.Round, model: Model, choose: random.Random) -> None:
        """What bad clients and careless callers do."""
        what = choose.random()
        if what > 0.15:
            return
        bad = model.update(0)
        key = choose.choice(sorted(k for k, (shape, d) in SHAPES[model.name].items() if 0 not in shape and d[0] == "f"))
        try:
            if what < 0.05:
                bad[key].flat[-1] = choose.choice([np.nan, np.inf])
                round_.submit(bad, client_id="bad", timeout=WAIT_S)
            elif what < 0.08:
                del bad[key]
                round_.submit(bad, client_id="bad", timeout=WAIT_S)
            elif what < 0.11:
                round_.submit(bad, choose.choice([0.0, -1.0, float("nan"), 1e300]), "bad", timeout=WAIT_S)
            else:
                loan = round_.loan("dropped", timeout=WAIT_S)
                if choose.random() < 0.5:
                    loan.release()
                self.counts["loans dropped"] += 1
                return
        except AdmissionError:
            self.counts["refused"] += 1
            return
        raise AssertionError("a bad update was accepted")

    def run_rounds(self, number: int) -> None:
        """A thread's life."""
        choose = random.Random(f"{self.seed}/{number}")
        try:
            while not self.is_over:
                with self.quiet:
                    pass
                self.running.release()
                try:
                    self.one_round(choose)
                except ShmError:
                    self.counts["no room"] += 1
                finally:
                    self.running.acquire()
        except BaseException as error:
            self.error = self.error or error

    # ------------------------------------------------------------ faults

    def hurt(self) -> None:
        """Kills and stops workers at any moment; now and then a whole parent."""
        choose = random.Random(f"{self.seed}/hurt")
        while not self.is_over:
            time.sleep(choose.random() * 0.06)
            if not (pids := self.node.pids()):
                continue
            pid, what = choose.choice(pids), choose.random()
            with suppress(ProcessLookupError):
                if what < 0.97:
                    os.kill(pid, signal.SIGKILL)
                    self.counts["kills"] += 1
                elif what < 0.985:
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(choose.random() * 0.3)
                    os.kill(pid, signal.SIGCONT)
                    self.counts["short stops"] += 1
                else:
                    os.kill(pid, signal.SIGSTOP)
                    self.counts["stops for good"] += 1

    # ------------------------------------------------------------ drift

    def sample(self) -> None:
        """Waits until no round runs, then writes down what there is."""
        with self.quiet:
            end = time.monotonic() + WAIT_S
            while self.running._value or self.node.arena.free_bytes != self.free:
                if self.error is not None:
                    return
                if time.monotonic() > end:
                    break
                time.sleep(0.002)
            lost = self.free - self.node.arena.free_bytes
            while time.monotonic() < end and len(self.children()) != 4:  # a killed one is being replaced
                time.sleep(0.01)
            self.samples.append(
                {
                    "bytes lost": lost,
                    "descriptors": len(os.listdir("/proc/self/fd")),
                    "processes": len(self.children()),
                    "threads": threading.active_count(),
                    "/dev/shm": len(os.listdir("/dev/shm")),
                    "private": private_bytes(os.getpid()),
                    "nursery's descriptors": len(os.listdir(f"/proc/{self.nursery}/fd")),
                    "nursery": private_bytes(self.nursery),
                }
            )
        if lost:
            raise AssertionError(f"{lost:,} bytes of blocks are lost")

    @property
    def nursery(self) -> int:
        """Its pid: the only child of this process."""
        return next(iter(children_of(os.getpid())))

    def children(self) -> list[int]:
        """The nursery and its workers; zombies too."""
        return [self.nursery, *children_of(self.nursery)]

    def run(self) -> int:
        """Until the time is over; the exit status."""
        threads = [threading.Thread(target=self.run_rounds, args=(i,)) for i in range(3)]
        hurting = threading.Thread(target=self.hurt)
        for thread in (*threads, hurting):
            thread.start()
        begin = last = time.monotonic()
        try:
            while not self.is_over:
                time.sleep(min(2.0, max(0.1, (self.until - begin) / 40)))
                self.sample()
                if time.monotonic() - last > 60:
                    last = time.monotonic()
                    print(f"{(last - begin) / 60:.0f} min: {self.told()}", flush=True)
        except BaseException as error:
            self.error = self.error or error
        for thread in (*threads, hurting):
            thread.join()
        self.node.close()
        return self.verdict(time.monotonic() - begin)

    def told(self) -> str:
        """The counts in one line."""
        return ", ".join(f"{self.counts[what]:,} {what}" for what in sorted(self.counts))

    def drift(self) -> dict[str, int]:
        """The last tenth's median less that of the second tenth, of everything that was sampled."""
        tenth = max(1, len(self.samples) // 10)
        early, late = self.samples[tenth : 2 * tenth] or self.samples[:1], self.samples[-tenth:]
        middle = [{key: int(statistics.median(s[key] for s in part)) for key in late[0]} for part in (early, late)]
        return {key: middle[1][key] - middle[0][key] for key in late[0]}

    def verdict(self, seconds: float) -> int:
        """Prints the table; 1 if something was wrong."""
        drift = self.drift() if self.samples else {}
        self.result: dict[str, Any] = {
            "seed": self.seed,
            "seconds": seconds,
            "counts": dict(self.counts),
            "drift": drift,
        }
        self.result["samples"] = len(self.samples)
        print(f"{seconds:.0f} s, seed {self.seed}: {self.told()}")
        print(f"drift over {len(self.samples)} samples: " + ", ".join(f"{k} {v:+,}" for k, v in drift.items()))
        if self.error is not None:
            print(f"WRONG: {type(self.error).__name__}: {self.error}")
            return 1
        bad = {k: v for k, v in drift.items() if abs(v) > (MEMORY_DRIFT if k in ("private", "nursery") else 0)}
        if bad:
            print(f"WRONG: drift of {bad}")
        return 1 if bad else 0


def children_of(pid: int) -> list[int]:
    """Processes whose parent this is."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
            found += [int(child) for child in file.read().split()]
    return found


def private_bytes(pid: int) -> int:
    """Memory that is the process's own: the arena, which all share, does not count."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        fields = dict(line.split(":", 1) for line in file.read().splitlines()[1:])
    return int(fields["Anonymous"].split()[0]) * 1024


def kill_a_parent() -> None:
    """A process with a Node of its own is killed in the middle of a round: nothing of it is left."""
    program = (
        "import lifl, numpy as np, time\n"
        "node = lifl.Node('16MiB', workers=2)\n"
        "round_ = node.open_round(lifl.TensorSpec.from_arrays({'w': np.zeros(8)}), 9)\n"
        "round_.submit({'w': np.zeros(8)})\n"
        "print(*node.pids(), flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    end = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        if time.monotonic() > end:
            raise AssertionError(f"workers {pids} of a killed parent live on")
        time.sleep(0.01)


def main(arguments: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args(arguments)
    soak = Soak(options.seed, options.minutes * 60)
    status = soak.run()
    kill_a_parent()
    soak.result["most memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if options.json:
        with open(options.json, "w") as file:
            json.dump(soak.result, file, indent=2)
    return status


if __name__ == "__main__":
    sys.exit(main())
