"""Every composer through the user's own entry points: trained, saved, evaluated again; added by a newcomer."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cliplab.models.composers
from cliplab.models.composers import COMPOSERS
from cliplab.training.loggers import read_curves
from tests.conftest import ROOT
from tests.test_train import main_of

FROZEN = "model.freeze=[image_encoder,text_encoder]"
NEW = {
    "slerp": ["model.composer.alpha=0.7"],  # nothing of its own: the towers are trained
    "weighted_sum": [FROZEN],
    "concat": [FROZEN],
    "film": [FROZEN],
    "cross_attention": ["model.composer.latents=4", "model.composer.heads=4"],
    "bidirectional": [FROZEN, "model.composer.base=combiner"],
    "pic2word": [FROZEN],
    "lincir": [FROZEN, "loss.name=mse"],
}


def run(tiny_config: Path, name: str, *overrides: str) -> Path:
    shorter = ["trainer.max_epochs=1", "data.categories=[dress]", "data.batch_size=8", f"name={name}"]
    main_of("train")(["--config", str(tiny_config), *shorter, *overrides])
    return tiny_config.parent / "runs" / name


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", NEW)
def test_a_run_is_trained_saved_and_evaluated_again(name: str, tiny_config: Path) -> None:
    folder = run(tiny_config, f"composer_{name}", f"model.composer.name={name}", *NEW[name])
    trained = results(folder)
    stored = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    own = {key for key in stored if key.startswith("model.composer.")}
    assert bool(own) == (name != "slerp")
    main_of("eval")(["--checkpoint", str(folder)])
    again = results(folder / "eval" / "wardrobe-clip4cir")
    assert again["metrics"] == trained["metrics"] and again["baselines"] == trained["baselines"]
    if name == "cross_attention":  # six steps open the gates too little to move a rank
        assert bool(stored["model.composer.layers.0.gates"].any())
    else:
        assert again["metrics"] != again["baselines"]["text_only"], "the composer is asked"


def test_lincir_is_trained_by_two_processes(tiny_config: Path, tmp_path: Path) -> None:
    """Its loss has no scale: DDP would stop at a temperature that waits for a gradient."""
    given = ["model.composer=lincir", FROZEN, "loss=mse", "data.categories=[dress]", "data.batch_size=8"]
    given += [
        "trainer.devices=2",
        "trainer.max_epochs=2",
        "trainer.log_every_n_steps=1",
        f"output_dir={tmp_path}",
        "name=two",
    ]
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(tiny_config), *given]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-2000:]
    assert (
        len(read_curves(tmp_path / "two" / "metrics.csv").loss) == 6 and (tmp_path / "two" / "results.json").is_file()
    )


def test_every_composer_beyond_the_first_six_is_here() -> None:
    first = {"image_only", "text_only", "sum", "combiner", "tirg", "artemis"}
    assert COMPOSERS.keys() - first == NEW.keys()


@pytest.mark.parametrize("name", ["pic2word", "lincir"])
def test_captions_teach_what_triplets_are_asked_with(name: str, tiny_config: Path) -> None:
    """Their validation asks nothing of the composer, so the last weights count."""
    captions = ["data.name=wardrobe_captions", "data.categories=null", f"model.composer.name={name}", *NEW[name]]
    folder = run(tiny_config, f"captions_{name}", *captions)
    assert results(folder)["selection"] == "last weights" and "test/t2i/R@1" in results(folder)["metrics"]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt"}
    main_of("eval")(["--checkpoint", str(folder), "data.name=wardrobe", "data.protocol=searle"])
    found = results(folder / "eval" / "wardrobe-searle-last")
    assert {"test/dress/R@10", "test/mean/R@50"} <= found["metrics"].keys()
    assert found["config"]["model"]["composer"]["name"] == name


def test_a_newcomers_composer_is_one_file_and_one_line(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's example, imported from a file and trained by train.py with an option of its own."""
    readme = (ROOT / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "(Composer):" in block)
    (tmp_path / "newcomer.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "newcomer", raising=False)
    (label,) = re.findall(r'the line `"(\w+)": (?:\w+),`', readme)
    monkeypatch.setitem(cliplab.models.composers.COMPOSERS, label, _only_composer("newcomer"))
    folder = run(
        tiny_config,
        "newcomer",
        f"model.composer.name={label}",
        "model.composer.text_weight=0.7",
        "trainer.log_every_n_steps=1",
    )
    assert read_curves(folder / "metrics.csv").loss and results(folder)["config"]["model"]["composer"] == {
        "name": label,
        "text_weight": 0.7,
    }
    main_of("eval")(["--checkpoint", str(folder)])
    assert results(folder / "eval" / "wardrobe-clip4cir")["metrics"] == results(folder)["metrics"]


def _only_composer(module: str) -> type:
    namespace = vars(importlib.import_module(module))
    (found,) = (value for value in namespace.values() if isinstance(value, type) and value.__module__ == module)
    return found
