"""Long fuzz run: `python -m tests.fuzz.run --hours 1`, all targets on several processes.

Each process takes one target after the other for a round of inputs, and ends after some minutes for a new one, so that
leaks stay small. An input that ends a process (a crash of a C library, a hang) is kept like one with a wrong error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from random import Random
from threading import Thread
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}

ROUND = 4.0  # seconds of a target at a time
LIFE = 600  # seconds of a process
SILENCE = 120  # seconds without a round after which a process hangs


def main(argv: list[str] | None = None) -> int:
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000, help="inputs over all targets")
    parser.add_argument("--hours", type=float, default=24.0, help="end after so long")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first round; printed")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only these")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="folder for inputs that crash")
    parser.add_argument("--replay", type=Path, help="read this folder by the one --target, and say how it ends")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = args.target or sorted(TARGETS)
    if args.replay:
        return replay(names[0], args.replay)
    if args.worker:
        work(names, args.seed, Path(args.worker))
        return 0
    return lead(names, args)


# -- one process ---------------------------------------------------------------------------------------


def work(names: list[str], seed: int, folder: Path) -> None:
    """Rounds until the life of this process is over, one line of JSON for each; `folder` gets the faulty inputs."""
    from tests.fuzz.guard import guarded
    from tests.fuzz.mutations import mutated, write
    from tests.fuzz.targets import TARGETS

    began = time.monotonic()
    with guarded(TARGETS[name] for name in names) as guard:
        tell(case=str(guard.root))
        for number in itertools.count(seed):
            if time.monotonic() - began > LIFE:
                break
            target = TARGETS[names[number % len(names)]]
            ends: Counter[str] = Counter()
            started = time.monotonic()
            faults: dict[str, tuple[int, dict, str]] = {}

            examples, random = target.examples, Random(number)
            while time.monotonic() - started < ROUND:
                examine(mutated(examples, random), guard, target, ends, faults)
            for signature, (_, tree, told) in faults.items():
                place = folder / f"{target.name}-{number}-{len(list(folder.iterdir()))}"
                write(tree, place)
                tell(fault=signature, told=told, target=target.name, input=str(place))
            seconds = time.monotonic() - started
            tell(round=number, target=target.name, cases=sum(ends.values()), ends=ends, seconds=seconds)


def examine(tree: dict, guard: Any, target: Any, ends: Counter, faults: dict[str, tuple[int, dict, str]]) -> None:
    """Count how the reading of `tree` ended; of each fault the smallest input is kept."""
    from tests.fuzz.guard import Fault

    try:
        ends[guard.check(target, tree)] += 1
    except Fault as fault:
        ends["fault"] += 1
        size = sum(map(len, tree.values()))
        if fault.signature not in faults or size < faults[fault.signature][0]:
            faults[fault.signature] = size, tree, str(fault)


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def replay(name: str, folder: Path) -> int:
    from tests.fuzz.guard import Fault, guarded
    from tests.fuzz.mutations import read
    from tests.fuzz.targets import TARGETS

    with guarded([TARGETS[name]]) as guard:
        try:
            print(guard.check(TARGETS[name], read(folder)))
        except Fault as fault:
            print(f"{fault.signature}\n{fault}")
            raise
    return 0


# -- the process that leads them -----------------------------------------------------------------------


class Worker:
    def __init__(self, number: int, args: argparse.Namespace, names: list[str], lines: Queue) -> None:
        self.folder = args.out / f"worker-{number}"
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tests.fuzz.run", "--seed", str(args.seed + 10**6 * number)]
        command += ["--worker", str(self.folder.resolve()), *(part for name in names for part in ("--target", name))]
        self.log = args.out / f"worker-{number}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self.heard, self.case = time.monotonic(), ""
        Thread(target=self._listen, args=(lines,), daemon=True).start()

    def _listen(self, lines: Queue) -> None:
        for line in self.process.stdout:
            self.heard = time.monotonic()
            if line.startswith("{"):
                found = json.loads(line)
                self.case = found.get("case", self.case)
                lines.put(found)

    def died(self) -> str:
        """Why it ended, "" while it works or where its life was over."""
        silence = SILENCE if self.case else 10 * SILENCE  # its imports take long on a busy machine
        if self.process.poll() is None and time.monotonic() - self.heard > silence:
            self.process.kill()
            self.process.wait()
            return f"hangs for {silence} s"
        code = self.process.poll()
        return f"ended with status {code}" if code else ""


def lead(names: list[str], args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes end with this one
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also behind nohup
    print(
        f"fuzz: {len(names)} targets, {args.cases:,} inputs, seed {args.seed}, {args.processes} processes", flush=True
    )
    shutil.rmtree(args.out, ignore_errors=True)
    lines: Queue = Queue()
    cases: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    ends: dict[str, Counter[str]] = {name: Counter() for name in names}
    faults: dict[str, dict[str, Any]] = {}
    began = said = time.monotonic()
    numbers = itertools.count()
    workers = [Worker(next(numbers), args, names, lines) for _ in range(args.processes)]
    try:
        while sum(cases.values()) < args.cases and time.monotonic() - began < 3600 * args.hours:
            for found in received(lines):
                if "round" in found:
                    cases[found["target"]] += found["cases"]
                    seconds[found["target"]] += found["seconds"]
                    ends[found["target"]].update(found["ends"])
                elif "fault" in found:
                    key = f"{found['target']}: {found['fault']}"
                    if key not in faults:
                        print(f"CRASH {key}\n  {found['told']!r:.400}\n  {found['input']}", flush=True)
                    faults.setdefault(key, found)
            for place, worker in enumerate(workers):
                why = worker.died()
                if worker.process.poll() == 1 or (why and not worker.case):  # an error beside the readers
                    raise RuntimeError(f"The fuzz run itself failed:\n{worker.log.read_text()[-3000:]}")
                if why:
                    kept = args.out / f"died-{next(numbers)}"
                    shutil.copytree(Path(worker.case, "case"), kept, symlinks=True)
                    faults[str(kept)] = {"fault": why}
                    print(f"CRASH a process {why}: {kept}", flush=True)
                if worker.process.poll() is not None:
                    if worker.case:  # what a killed one left
                        shutil.rmtree(worker.case, ignore_errors=True)
                    workers[place] = Worker(next(numbers), args, names, lines)
            if time.monotonic() - said > 60:
                said = time.monotonic()
                total = sum(cases.values())
                print(
                    f"{(said - began) / 60:.0f} min  {total:,} inputs  {total / (said - began):.0f}/s  "
                    f"{len(faults)} crashes",
                    flush=True,
                )
    except KeyboardInterrupt:
        print("interrupted")
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
            shutil.rmtree(worker.case or args.out / "none", ignore_errors=True)
    for name in names:
        each = 1000 * seconds[name] / max(1, cases[name])
        told = ", ".join(f"{n:,} {end}" for end, n in ends[name].most_common())
        print(f"{name:<20} {cases[name]:>9,} {each:6.1f} ms  {told}")
    minutes = (time.monotonic() - began) / 60
    print(f"{sum(cases.values()):,} inputs in {minutes:.1f} min, seed {args.seed}: {len(faults)} crashes")
    for key, found in faults.items():
        print(f"  {key}  {found.get('input', '')}")
    return 1 if faults else 0


def received(lines: Queue) -> Iterator[dict]:
    """What the workers told within a second."""
    try:
        yield lines.get(timeout=1)
        while True:
            yield lines.get_nowait()
    except Empty:
        return


if __name__ == "__main__":
    sys.exit(main())
