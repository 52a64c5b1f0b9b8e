"""Rung 6 of the ladder: rounds of every kind for a chosen time, while workers are killed and stopped.

    python tests/soak/soak.py --minutes 30 --seed 7 [--json FILE]

Three Nodes at once: one whose workers, and the process that starts them, are killed and stopped; a small one in which
room is short, whose workers are left alone (so that what they keep shows); one without workers. Every mean is checked
exactly. At the end the drift of blocks, descriptors, processes, threads, `/dev/shm` and memory is shown. The exit
status is 1 at the first wrong mean, and if anything drifts.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import resource
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from clients import MOST, Model
from nodes import SoakedNode
from processes import children_of, descriptors, kill_a_parent, private_bytes

import lifl
from lifl.errors import AdmissionError, LeaseError, RoundError, ShmError
from lifl.shm.sizes import units_of
from lifl.strategy.heap import give_back

WAIT_S = 60.0
SETTLE_S = 100.0
"""Longer than a round waits for its result and its end: what is not settled by then is lost or hangs."""
STALL_S = 1.0
ROUND_THREADS = 4
SPAWNER_SHARE = 0.02
"""The share of all faults of processes: each costs a Node all its workers and some tenths of a second."""
PROCESSES = 8
"""Three spawners, three workers and two, and of the elastic Node, when it rests, none."""
FORK_EVERY_S, PARENT_EVERY_S = 3.0, 15.0
MEMORY_DRIFT = 8 * 2**20
"""Bytes of private memory that may come and go: the allocator keeps what a burst took, per thread. Thirty minutes are
some 40,000 deaths and 250,000 rounds: 200 bytes kept of each death, or 32 of each round, would be seen."""
WARM_S = 300.0
"""Runs that are shorter end before the allocator has warmed up: four times as much may come."""


class Soak:
    """The Nodes, threads that run rounds on them, and one that kills and stops workers."""

    def __init__(self, seed: int, seconds: float) -> None:
        self.seed, self.until = seed, time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.counting = threading.Lock()
        self.samples: list[dict[str, int]] = []
        self.error: BaseException | None = None
        self.hurt_node = SoakedNode("96MiB", 3, stall_timeout=STALL_S)
        self.calm_node = SoakedNode("24MiB", 2, stall_timeout=60.0, idle_timeout=None, debug=True)
        self.elastic_node = SoakedNode("32MiB", 2, stall_timeout=STALL_S, warm=0, idle_timeout=0.02)
        self.nodes = [self.hurt_node, self.calm_node, self.elastic_node, SoakedNode("16MiB", 0)]
        self.models = [Model(name) for name in MOST]
        self.quiet = threading.Lock()  # held by who looks for drift: no round begins meanwhile
        self.running = 0

    @property
    def is_over(self) -> bool:
        """True when the time is over, or something was wrong."""
        return time.monotonic() > self.until or self.error is not None

    def count(self, what: str, number: int = 1) -> None:
        """Counts; from any thread."""
        with self.counting:
            self.counts[what] += number

    # ------------------------------------------------------------ rounds

    def one_round(self, choose: random.Random) -> None:
        """A round of any kind, checked."""
        node, model = choose.choices(self.nodes, (5, 3, 2, 1))[0], choose.choice(self.models)
        n = choose.randint(1, model.most)
        order = choose.choice(["any", "any", "any", "flower"])
        weights = {i: choose.choice([1, 1, choose.randint(1, 1000)]) for i in choose.sample(range(n), n)}
        how: dict[str, Any] = {"timing": choose.choice(["eager", "eager", "lazy", "jit"]), "order": order}
        if choose.random() < 0.7:
            leaves = choose.randint(0, 3) if order == "any" else 0
            how["shape"] = lifl.Shape(leaves, choose.randint(0 if leaves else 1, 3))
        if choose.random() < 0.3:
            how["commit_every"] = choose.randint(1, 8)
        with node.open_round(model.spec, n, **how) as round_:
            for i, weight in weights.items():
                self.disturb(round_, model, choose)
                if node.arena.free_bytes < units_of(model.spec.layout.update_bytes):
                    self.count("waits for room")
                self.hand_in(round_, model, i, weight, choose)
            end = choose.random()
            if end < 0.05:
                self.count("rounds left")
                return
            if end < 0.2:
                round_.close_early()
            try:
                result = self.result_of(round_)
            except RoundError as error:
                if "one after another" not in str(error) and "no update is left" not in str(error):
                    raise
                self.count("rounds failed by poison")
                return
            who = [int(c.client_id) for c in result.report.accepted]
            poison = {int(r.client_id) for r in result.rejected if r.rule == "poison"}
            if sorted([*who, *poison]) != sorted(weights) or result.num_updates != len(who):
                raise AssertionError(f"{result.num_updates} counted, {who} named, {poison} refused, of {list(weights)}")
            model.check(result.arrays, {i: weights[i] for i in who}, order)
            self.count("poison", len(poison))
            self.count("updates", len(who))
            self.count("rounds")

    def result_of(self, round_: lifl.Round) -> lifl.RoundResult:
        """The round's; one that lost an update to poison does not wait for another."""
        end = time.monotonic() + WAIT_S
        while True:
            try:
                return round_.result(0.5)
            except RoundError as error:
                if "updates are in after" not in str(error) or time.monotonic() > end:
                    raise
            if any(r.rule == "poison" for r in round_.report().rejected):
                self.count("rounds short of a poison update")
                round_.close_early()

    def hand_in(self, round_: lifl.Round, model: Model, i: int, weight: int, choose: random.Random) -> None:
        """By submit or by a loan, and some twice; a full arena is waited for."""
        if choose.random() < 0.8:
            round_.submit(model.update(i), weight, i, timeout=WAIT_S)
        else:
            with round_.loan(i, timeout=WAIT_S) as loan:
                for key, array in model.update(i).items():
                    loan.arrays[key][...] = array
                loan.send(float(weight))
        if choose.random() < 0.03:
            # Not through submit, which would count it if the first had been refused as poison meanwhile.
            try:
                round_.loan(i, timeout=WAIT_S).release()
            except AdmissionError:
                self.count("refused")
                return
            if not any(r.rule == "poison" and r.client_id == str(i) for r in round_.report().rejected):
                raise AssertionError(f"client {i} was given a second loan")

    def disturb(self, round_: lifl.Round, model: Model, choose: random.Random) -> None:
        """Acts as bad clients and careless callers do."""
        what = choose.random()
        if what < 0.11:
            bad, weight = model.bad(choose)
            try:
                round_.submit(bad, weight, "bad", timeout=WAIT_S)
            except AdmissionError:
                self.count("refused")
                return
            raise AssertionError(f"an update of {set(bad)} with weight {weight} was accepted, in spite of what it is")
        if what < 0.15:
            loan = round_.loan("dropped", timeout=WAIT_S)
            if choose.random() < 0.5:
                loan.release()
            self.count("loans dropped")

    def run_rounds(self, number: int) -> None:
        """A thread's life."""
        choose = random.Random(f"{self.seed}/{number}")
        try:
            while not self.is_over:
                with self.quiet, self.counting:
                    self.running += 1
                try:
                    self.one_round(choose)
                except ShmError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    self.count("no room")
                finally:
                    with self.counting:
                        self.running -= 1
        except BaseException as error:
            self.error = self.error or error

    # ------------------------------------------------------------ faults

    def hurt(self) -> None:
        """Kills and stops workers at any moment."""
        choose = random.Random(f"{self.seed}/hurt")
        while not self.is_over:
            time.sleep(choose.random() * 0.06)
            with self.quiet:
                pass
            node = choose.choice([self.hurt_node, self.hurt_node, self.elastic_node])
            if choose.random() < SPAWNER_SHARE:
                self.hurt_spawner(node, choose)
                continue
            if not (pids := node.pids()):
                continue
            pid, what = choose.choice(pids), choose.random()
            with suppress(ProcessLookupError):
                if what < 0.97:
                    os.kill(pid, signal.SIGKILL)
                    self.count("kills")
                elif what < 0.985:
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(choose.random() * 0.3)
                    os.kill(pid, signal.SIGCONT)
                    self.count("short stops")
                else:
                    os.kill(pid, signal.SIGSTOP)
                    self.count("stops for good")

    def hurt_spawner(self, node: SoakedNode, choose: random.Random) -> None:
        """Kills the process that starts a Node's workers, or stops it for a moment."""
        with suppress(ProcessLookupError):
            if choose.random() < 0.8:
                with self.quiet:  # who looks for drift looks at it too
                    os.kill(node.spawner, signal.SIGKILL)
                self.count("spawners killed")
                return
            os.kill(pid := node.spawner, signal.SIGSTOP)
            time.sleep(choose.random() * 0.3)
            os.kill(pid, signal.SIGCONT)
            self.count("spawners stopped")

    def fork(self) -> None:
        """A fork of this process is told that the Nodes are not its own, and cannot harm them."""
        if (pid := os.fork()) == 0:
            signal.alarm(20)  # it may not hang
            status = 1
            try:
                for node in self.nodes:
                    node.close()
                    with suppress(LeaseError):
                        node.open_round(self.models[0].spec, 1)
                        break
                else:
                    status = 0
            finally:
                os._exit(status)
        if status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise AssertionError(f"a fork could use its parent's Node, or hung: status {status}")
        self.count("forks")

    # ------------------------------------------------------------ drift

    def sample(self) -> None:
        """Waits until no round runs, then writes down what there is."""
        with self.quiet:
            time.sleep(0.01)  # the last death of before is seen
            end = time.monotonic() + SETTLE_S
            while not self.is_settled() and time.monotonic() < end:
                if self.error is not None:
                    return
                self.elastic_node.renew()
                time.sleep(0.002)
            give_back()  # what is left is in use
            spawners = self.hurt_node.spawner, self.calm_node.spawner, self.elastic_node.spawner
            found = {
                "bytes lost": self.lost_bytes(),
                **descriptors(),
                "spawners' descriptors": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in spawners),
                "processes": len(self.processes()),
                "threads": threading.active_count(),
                "/dev/shm": len(os.listdir("/dev/shm")),
                "memory": private_bytes(os.getpid()),
                "spawner's memory": private_bytes(spawners[0]),
                "workers' memory": sum(map(private_bytes, self.calm_node.pids())),
            }
            if found["bytes lost"]:
                blocks = "; ".join(line for node in self.nodes for line in node.held())
                raise AssertionError(f"{found['bytes lost']:,} bytes of blocks are lost: {blocks}")
        if not self.is_over:  # else threads have begun to end
            self.samples.append(found)

    def is_settled(self) -> bool:
        """True when no round runs, and every process that has ended is known to its agent, which holds its pidfd."""
        if (
            self.running
            or self.lost_bytes()
            or any(node.is_orphaned for node in self.nodes)
            or len(self.processes()) != PROCESSES
        ):
            return False
        known = {pid for node in self.nodes for pid in node.pids()}
        return known == {pid for spawner in children_of(os.getpid()) for pid in children_of(spawner)}

    def lost_bytes(self) -> int:
        """The bytes of all Nodes that are not free."""
        return sum(node.all_bytes - node.arena.free_bytes for node in self.nodes)

    def processes(self) -> list[int]:
        """Spawners and workers, zombies too."""
        spawners = children_of(os.getpid())
        return [*spawners, *(pid for spawner in spawners for pid in children_of(spawner))]

    # ------------------------------------------------------------ the whole

    def run(self) -> int:
        """Until the time is over; the exit status."""
        threads = [threading.Thread(target=self.run_rounds, args=(i,)) for i in range(ROUND_THREADS)]
        threads.append(threading.Thread(target=self.hurt))
        for thread in threads:
            thread.start()
        begin = time.monotonic()
        pause_s = min(2.0, max(0.1, (self.until - begin) / 40))
        next_fork, next_parent, next_line = begin, begin, begin + 60
        try:
            while not self.is_over:
                time.sleep(pause_s)
                if (now := time.monotonic()) > next_fork:
                    next_fork = now + FORK_EVERY_S
                    self.fork()
                if now > next_parent:
                    next_parent = now + PARENT_EVERY_S
                    kill_a_parent()
                    self.count("parents killed")
                self.sample()
                if now > next_line:
                    next_line += 60
                    print(f"{(now - begin) / 60:.0f} min: {self.told()}", flush=True)
        except BaseException as error:
            self.error = self.error or error
        for thread in threads:
            thread.join()
        self.counts["workers died"] = self.hurt_node.deaths
        self.counts["calm workers died"] = self.calm_node.deaths
        self.counts["cold starts"] = self.elastic_node.pool.cold_starts
        for node in self.nodes:
            node.close()
        return self.verdict(time.monotonic() - begin)

    def told(self) -> str:
        """The counts in one line."""
        self.counts["workers died"] = self.hurt_node.deaths
        return ", ".join(f"{self.counts[what]:,} {what}" for what in sorted(self.counts))

    def tenths(self) -> dict[str, tuple[int, int]]:
        """The medians of the second tenth of all samples, after the warm-up, and of the last."""
        tenth = max(1, len(self.samples) // 10)
        parts = self.samples[tenth : 2 * tenth] or self.samples[:1], self.samples[-tenth:]
        keys = {key: None for part in parts for sample in part for key in sample}  # in order; kinds come and go
        early, late = [{key: int(statistics.median(s.get(key, 0) for s in part)) for key in keys} for part in parts]
        return {key: (early[key], late[key]) for key in keys}

    def verdict(self, seconds: float) -> int:
        """Prints the tables; 1 if something was wrong."""
        tenths = self.tenths() if self.samples else {}
        drift = {key: late - early for key, (early, late) in tenths.items()}
        reasons = [f"{type(self.error).__name__}: {self.error}"] if self.error else []
        reasons += ["no sample was taken"] if not self.samples else []
        reasons += [f"{key} drifted by {n:+,}" for key, n in drift.items() if is_drift(key, n, seconds)]
        if self.counts["calm workers died"]:
            reasons.append(f"{self.counts['calm workers died']} workers died that nobody hurt")
        print(f"\n{seconds:.0f} s, seed {self.seed}, {len(self.samples)} samples")
        for what in sorted(self.counts):
            print(f"  {what:32}{self.counts[what]:>14,}")
        print(f"  {'drift of':32}{'after warm-up':>14}{'at the end':>14}{'drift':>14}")
        for key, (early, late) in tenths.items():
            print(f"  {key:32}{early:>14,}{late:>14,}{late - early:>+14,}")
        for reason in reasons:
            print(f"WRONG (seed {self.seed}): {reason}")
        self.figures = {
            "seed": self.seed,
            "seconds": seconds,
            "counts": dict(self.counts),
            "samples": len(self.samples),
            "drift": drift,
            "wrong": reasons,
            "most memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        return 1 if reasons else 0


def is_drift(what: str, change: int, seconds: float) -> bool:
    """Memory may not grow beyond what the allocator keeps; of anything else, nothing may be more or less."""
    if "memory" not in what:
        return change != 0
    return change > (MEMORY_DRIFT if seconds > WARM_S else 4 * MEMORY_DRIFT)


def main(arguments: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args(arguments)
    soak = Soak(options.seed, options.minutes * 60)
    status = soak.run()
    if options.json:
        with open(options.json, "w") as file:
            json.dump(soak.figures, file, indent=2)
    return status


if __name__ == "__main__":
    sys.exit(main())
