"""results.json: what a run measured and all that is needed to say what the numbers mean. Recalls in percent."""

import csv
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from cliplab.errors import UserError
from cliplab.files import write_whole

SCHEMA = 1
_PACKAGES = (
    "cliplab",
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "datasets",
    "timm",
    "open_clip_torch",
    "pillow",
)


def versions() -> dict[str, str]:
    """Of Python and of the packages that can change a number."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}


def commit() -> str | None:
    """The commit of the code that runs, `-dirty` behind it if files differ; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def command() -> str:
    """The command line as typed."""
    return " ".join([Path(sys.executable).name, *sys.argv])


def write_results(path: Path, content: dict[str, Any]) -> None:
    """Write atomically: a results.json is whole or not there."""
    complete = {"schema": SCHEMA, **content, "versions": versions(), "commit": commit(), "command": command()}
    write_json(path, complete)


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json. Raises UserError for a damaged file or another schema."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {path}: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UserError(f"{path} is no results.json of schema {SCHEMA}")
    return content


def write_ranks(path: Path, names: Sequence[str], columns: Mapping[str, Sequence[float]]) -> None:
    """Per query its name, its rank under the protocol, how many candidates tie with its target ("rank", "ties").

    And in percent what other metrics than hard R@K are the means of: AP@K in the column "mAP@K".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["query", *columns])
        writer.writerows(zip(names, *columns.values(), strict=True))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A file beside results.json, or of a sweep: whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=2) + "\n")
