"""Measure a run, a checkpoint file or zero-shot weights: python eval.py --checkpoint runs/quickstart [key=value]"""

from collections.abc import Sequence

from cliplab.cli import parse, run_script
from cliplab.config import load_config
from cliplab.errors import UserError


def main(arguments: Sequence[str]) -> None:
    """Parse, find the checkpoint and its config, check names and files, build, run."""
    summary = "Evaluate a checkpoint on the benchmarks of its own config or of another one, or weights zero-shot."
    given = parse(summary, ["checkpoint", "config"], arguments)
    if given.checkpoint is None and given.config is None:
        raise UserError("eval.py needs --checkpoint (a run directory or a .ckpt file) or --config FILE for zero-shot")

    from cliplab.build import check
    from cliplab.run import checkpoint_of, config_of

    checkpoint, stored = None, None
    if given.checkpoint is None:
        config = load_config(given.config, given.overrides)
    else:
        checkpoint = checkpoint_of(given.checkpoint)
        config, stored = config_of(checkpoint, given.config, given.overrides)
    dataset = check(config, train=False, from_checkpoint=stored is not None)

    from cliplab.execute import evaluate  # imports lightning: only after everything cheap has been checked

    evaluate(config, dataset, checkpoint, stored)


if __name__ == "__main__":
    run_script(main)
