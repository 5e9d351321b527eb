"""Timings as ratios: both sides take turns in one run, so that a busy machine slows both."""

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True)
class Row:
    """One answer: our value beside a peer's or a physical limit's, in the same unit and run.

    `ratio` says how many times better ours is (more per second, fewer seconds, less memory): > 1 is faster or smaller.
    """

    question: str
    ours: float
    other: float
    unit: str
    ratio: float
    against: str  # the peer or the limit
    floor: float | None = None  # the ratio that is asked for
    notes: str = ""


@dataclass
class Timings:
    """Seconds of each side by round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, side: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[side])

    def ratio(self, slow: str, fast: str) -> float:
        """How many times the seconds of `fast` fit into those of `slow`: the median over the rounds."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def row(self, question: str, ours: str, other: str, work: float, unit: str, floor: float | None = None) -> Row:
        """Work per second of two sides, for example samples/s."""
        mine, theirs = work / self.median(ours), work / self.median(other)
        return Row(question, mine, theirs, unit, self.ratio(other, ours), other, floor)


def interleave(sides: Mapping[str, Callable[[], Any]], rounds: int = 5, warmup: int = 1) -> Timings:
    """Time the sides in turn, `rounds` times, after `warmup` rounds that do not count; on a GPU it is waited for."""
    timings = Timings({name: [] for name in sides})
    for number in range(warmup + rounds):
        for name, call in sides.items():
            _wait()
            started = time.perf_counter()
            call()
            _wait()
            if number >= warmup:
                timings.seconds[name].append(time.perf_counter() - started)
    return timings


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gemm_seconds(shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, device: str = "cpu") -> Callable[[], None]:
    """A call that does the matrix products (M, K, N) of some work and nothing else: its physical limit."""
    operands = [
        (torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)) for m, k, n in shapes
    ]

    def products() -> None:
        for left, right in operands:
            torch.nn.functional.linear(left, right)

    return products


class PeakMemory:
    """`with PeakMemory() as peak: ...`; then peak.above is what the process took above its start, in MB (resident)."""

    def __enter__(self) -> "PeakMemory":
        self.before = self.highest = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.above = (max(self.highest, _resident()) - self.before) / 1e6

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.highest = max(self.highest, _resident())


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def in_new_process(script: str, *arguments: str) -> Any:
    """What `python -m SCRIPT ARGUMENTS` prints as JSON in its last line: memory and start-up want a fresh process."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-m", script, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> str:
    """Processor or GPU, cores, memory, versions."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        processor = names[0] if names else processor
    memory = os.sysconf("SC_PHYS_PAGES") * PAGE / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor}, {torch.get_num_threads()} threads, {memory:.0f} GiB{gpu}; torch {torch.__version__}"


def show(rows: Sequence[Row], title: str) -> None:
    """Print a table; as JSON in the last line for `python -m benchmarks`."""
    console = Console()
    table = Table(title=title, caption=machine(), caption_justify="left")
    for column in ("question", "ours", "other", "unit", "ratio", "asked", "against", "notes"):
        table.add_column(column, justify="right" if column in ("ours", "other", "ratio", "asked") else "left")
    for row in rows:
        asked = "" if row.floor is None else f"{row.floor:g}"
        cells = (f"{row.ours:.4g}", f"{row.other:.4g}", row.unit, f"{row.ratio:.2f}", asked, row.against, row.notes)
        table.add_row(row.question, *cells)
    console.print(table)
    print(json.dumps([asdict(row) for row in rows]))
