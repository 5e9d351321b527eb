"""Run what is missing of an experiment, print its table: python sweep.py --config experiments/FILE.yaml [key=value]"""

import sys
from collections.abc import Sequence

from cliplab.cli import parse, run_script
from cliplab.errors import UserError


def main(arguments: Sequence[str]) -> None:
    """Parse, resolve and check the rows, run what is missing, print the table; exit code 1 where a run has failed."""
    summary = "Run what is missing of an experiment and print its table (output=markdown|latex|csv|html)."
    given = parse(summary, ["config"], arguments, folder="experiments")
    if given.config is None:
        raise UserError("sweep.py needs --config FILE; python sweep.py --help lists the experiments")

    from cliplab.sweeps.spec import load_spec

    spec = load_spec(given.config, given.overrides)

    from cliplab.sweeps.sweep import sweep  # imports torch

    sys.exit(sweep(spec))


if __name__ == "__main__":
    run_script(main)
