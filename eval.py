"""Measure a run, a checkpoint file or zero-shot weights: python eval.py --checkpoint runs/quickstart [key=value]"""

from collections.abc import Sequence

from cliplab.cli import parse, run_script
from cliplab.errors import UserError


def main(arguments: Sequence[str]) -> None:
    """Parse, find the checkpoint and its config, check names and files, build, run."""
    summary = "Evaluate a checkpoint on the benchmarks of its own config or of another one, or weights zero-shot."
    given = parse(summary, ["checkpoint", "config"], arguments)
    if given.checkpoint is None and given.config is None:
        raise UserError("eval.py needs --checkpoint (a run directory or a .ckpt file) or --config FILE for zero-shot")

    from cliplab.build import check
    from cliplab.execute import config_of, evaluate
    from cliplab.run import checkpoint_of

    checkpoint = checkpoint_of(given.checkpoint) if given.checkpoint else None
    config, stored = config_of(checkpoint, given.config, given.overrides)
    evaluate(config, check(config, train=False), checkpoint, stored)


if __name__ == "__main__":
    run_script(main)
