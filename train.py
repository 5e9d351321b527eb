"""Train, test the best checkpoint, write results.json: python train.py --config configs/quickstart.yaml [key=value]"""

from collections.abc import Sequence

from cliplab.cli import parse, run_script
from cliplab.config import load_config
from cliplab.errors import UserError


def main(arguments: Sequence[str]) -> None:
    """Parse, load the config, check names and files, build, run."""
    given = parse("Train a dual encoder or a composed-retrieval model and measure it.", ["config"], arguments)
    if given.config is None:
        raise UserError("train.py needs --config FILE; python train.py --help lists the configs")
    config = load_config(given.config, given.overrides)

    from cliplab.build import check

    dataset = check(config)

    from cliplab.execute import train  # imports lightning: only after everything cheap has been checked

    train(config, dataset)


if __name__ == "__main__":
    run_script(main)
