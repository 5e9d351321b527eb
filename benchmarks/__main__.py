"""Run all benchmarks, or those named, and rewrite their tables in RESULTS.md under this machine's name.

python -m benchmarks [ranking encode ...]
"""

import datetime
import re
import sys
from pathlib import Path

from benchmarks.measure import Row, in_new_process, machine

SCRIPTS = ("train_step", "encode", "image_pipeline", "composer_epoch", "ranking", "memory", "startup", "growth")
RESULTS = Path(__file__).parent / "RESULTS.md"
HEADER = """# Measured

`python -m benchmarks` writes this file. Both sides of a ratio take turns in one process; medians of several rounds.
Ratios above 1: ours is faster or smaller. Absolute numbers belong to a shared machine and say little.
"""


def main(wanted: list[str]) -> None:
    """Each script in a process of its own."""
    unknown = [name for name in wanted if name not in SCRIPTS]
    if unknown:
        sys.exit(f"no benchmark {unknown[0]}; there are: {', '.join(SCRIPTS)}")
    for name in wanted or SCRIPTS:
        rows = [Row(**row) for row in in_new_process(f"benchmarks.{name}")]
        text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else HEADER
        RESULTS.write_text(with_table(text, machine(), name, rows), encoding="utf-8")
        sys.stderr.write(f"{name}: {len(rows)} rows\n")


def with_table(text: str, where: str, name: str, rows: list[Row]) -> str:
    """RESULTS.md with one table replaced or added below the heading of its machine."""
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    tables = dict(re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", sections.get(where, ""), re.M | re.S))
    tables[name] = f"\n{datetime.date.today()}, `python -m benchmarks.{name}`\n\n{markdown(rows)}\n"
    ordered = [key for key in SCRIPTS if key in tables]
    sections[where] = "\n" + "\n".join(f"### {key}\n{tables[key].rstrip()}\n" for key in ordered)
    return HEADER + "".join(f"\n## {key}\n{body.rstrip()}\n" for key, body in sections.items())


def markdown(rows: list[Row]) -> str:
    """A table; bold where a ratio that is asked for is missed."""
    lines = [
        "| question | ours | other | unit | ratio | asked | against | notes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        missed = row.floor is not None and row.ratio < row.floor
        ratio, asked = f"{row.ratio:.2f}", "" if row.floor is None else f"{row.floor:g}"
        cells = (row.question, f"{row.ours:.4g}", f"{row.other:.4g}", row.unit)
        lines.append(
            "| " + " | ".join((*cells, f"**{ratio}**" if missed else ratio, asked, row.against, row.notes)) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
