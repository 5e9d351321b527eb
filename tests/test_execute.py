from pathlib import Path

import pytest

from cliplab.config import Config
from cliplab.execute import evaluation_folder, timed


def test_evaluations_lie_beside_their_run():
    config = Config(name="x", output_dir="out")
    config.data.name = "fashioniq"
    checkpoint = Path("runs/a/checkpoints/best.ckpt")
    assert evaluation_folder(config, "clip4cir", checkpoint) == Path("runs/a/eval/fashioniq-clip4cir")
    assert evaluation_folder(config, "val", Path("b/model.ckpt")) == Path("b/eval/fashioniq-val-model")
    assert evaluation_folder(config, "val", None) == Path("out/x/eval/fashioniq-val")
    named = evaluation_folder(config, "val (gallery=all)", checkpoint)
    assert named.name == "fashioniq-val__gallery=all_"


def test_timed_adds_the_phase_even_when_it_fails():
    seconds: dict[str, float] = {}
    with pytest.raises(ZeroDivisionError), timed(seconds, "fit"):
        1 / 0  # noqa: B018
    assert seconds["fit"] >= 0
