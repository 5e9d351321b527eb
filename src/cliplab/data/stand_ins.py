"""Photographs that stand in for those of FashionIQ, which can't be redistributed: to run the pipeline, not to measure.

    python -m cliplab.data.stand_ins --annotations FASHIONIQ --photographs FOLDER --out FOLDER

Every image id of the annotations gets a link to one of the photographs, chosen by the hash of the id. The folder is
marked, so that every run on it says that its pictures are stand-ins.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from cliplab.data.dataset import STAND_IN_MARKER
from cliplab.data.fashioniq import SPLITS, FashionIQ
from cliplab.data.images import EXTENSIONS
from cliplab.errors import UserError, message_of


def make_stand_ins(annotations: Path, photographs: Path, out: Path) -> int:
    """Link a photograph (found below `photographs`) for every image id into `out`; returns the number of ids."""
    pool = sorted(path for path in photographs.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not pool:
        raise UserError(f"no photographs (.jpg, .jpeg, .png) below {photographs}")
    dataset = FashionIQ(annotations)
    names = sorted(
        {n for category in dataset.all_categories for s in SPLITS for n in dataset.split_images(category, s)}
    )
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / STAND_IN_MARKER).is_file())):
        raise UserError(f"{out} is no folder of stand-ins: name a new or empty folder as --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / STAND_IN_MARKER).write_text("The pictures here stand in for photographs that are not distributed.\n")
    for name in names:
        photograph = pool[int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % len(pool)]
        link = out / f"{name}{photograph.suffix.lower()}"
        link.unlink(missing_ok=True)
        link.symlink_to(photograph.resolve())
    return len(names)


def main(arguments: Sequence[str]) -> None:
    """Parse and link."""
    parser = argparse.ArgumentParser(description="Link stand-in photographs for the image ids of FashionIQ.")
    for flag in ("annotations", "photographs", "out"):
        parser.add_argument(f"--{flag}", type=Path, required=True, metavar="FOLDER")
    given = parser.parse_args(arguments)
    count = make_stand_ins(given.annotations, given.photographs, given.out)
    sys.stdout.write(f"{count} image ids now have a stand-in picture in {given.out}\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {message_of(error)}\n")
        sys.exit(2)
