"""How long the command line takes before it works: `train.py --help` and `import cliplab`, beside importing open_clip.

python -m benchmarks.startup
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Row, interleave, show

ROOT = Path(__file__).parent.parent


def command(*arguments: str) -> Callable[[], None]:
    """A new interpreter each time, its files read before (the round that does not count)."""

    def call() -> None:
        with tempfile.TemporaryFile() as output:
            done = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=output, stderr=output, check=False)
        assert done.returncode == 0, arguments

    return call


def main() -> None:
    """Measure and print."""
    sides = {
        "train.py --help": command("train.py", "--help"),
        "import cliplab": command("-c", "import cliplab"),
        "the interpreter alone": command("-c", "pass"),
        "import open_clip": command("-c", "import open_clip"),
    }
    timings = interleave(sides, rounds=7)
    rows = []
    for side, limit in (("train.py --help", 1.0), ("import cliplab", 0.3)):
        seconds = timings.median(side)
        rows.append(Row(side, seconds, limit, "s", limit / seconds, f"{limit:g} s", 1.0))
        for peer in ("import open_clip", "the interpreter alone"):
            rows.append(Row(side, seconds, timings.median(peer), "s", timings.ratio(peer, side), peer))
    show(rows, "start-up")


if __name__ == "__main__":
    main()
