"""eval.py where it is not a mirror of training: other configs, zero-shot, foreign checkpoints."""

import json
from pathlib import Path

import pytest
import torch

from cliplab.errors import UserError
from cliplab.sweeps.held import read_ranks
from tests.data.cir_files import make_circo, make_cirr
from tests.image_folders import make_image_folder
from tests.test_train import main_of

MAP = {"mAP@5", "mAP@10", "mAP@25", "mAP@50"}


@pytest.fixture(scope="module")
def run(tiny_config):
    main_of("train")(["--config", str(tiny_config), "name=evaluated", "trainer.max_epochs=1"])
    return tiny_config.parent / "runs" / "evaluated"


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_another_protocol_is_measured_beside_the_run(run):
    main_of("eval")(["--checkpoint", str(run), "data.protocol.gallery=val_split"])
    found = results_of(run / "eval" / "wardrobe-clip4cir__gallery=val_split_")
    assert found["protocol"]["gallery"] == "val_split"
    assert found["data"]["benchmarks"]["dress"]["gallery"] < 30
    assert results_of(run)["protocol"]["gallery"] == "original_split"


def test_another_config_keeps_the_model_of_the_checkpoint(run, tiny_config, tmp_path):
    other = tmp_path / "captions.yaml"
    root = results_of(run)["config"]["data"]["root"]
    other.write_text(
        f"data: {{name: wardrobe_captions, root: {root}, num_workers: 0}}\ntrainer: {{accelerator: cpu}}\n"
    )
    main_of("eval")(["--checkpoint", str(run), "--config", str(other)])
    assert "test/t2i/R@1" in results_of(run / "eval" / "wardrobe_captions-clip_benchmark")["metrics"]


def test_zero_shot_needs_no_checkpoint(tiny_config):
    main_of("eval")(["--config", str(tiny_config), "name=zero", "model.composer=sum"])
    assert results_of(tiny_config.parent / "runs" / "zero" / "eval" / "wardrobe-clip4cir")["checkpoint"] is None


def test_a_checkpoint_of_another_architecture_is_refused(run):
    with pytest.raises(UserError, match="another architecture") as caught:
        main_of("eval")(["--checkpoint", str(run), "model.arch=ViT-tiny-8-64"])
    assert "best.ckpt" in str(caught.value)
    assert "model.arch" in str(caught.value)


def test_what_is_no_checkpoint_is_refused(tmp_path, run):
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        main_of("eval")(["--checkpoint", str(tmp_path)])
    file = tmp_path / "weights.ckpt"
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="no checkpoint of a run"):
        main_of("eval")(["--checkpoint", str(file)])
    file.write_bytes((run / "checkpoints" / "best.ckpt").read_bytes()[:1000])
    with pytest.raises(UserError, match="can't read .*weights.ckpt"):
        main_of("eval")(["--checkpoint", str(file)])
    with pytest.raises(UserError, match="needs --checkpoint"):
        main_of("eval")([])


def test_an_image_folder_is_classified_and_probed(run, tmp_path):
    root = make_image_folder(tmp_path / "pictures")
    given = ["data.name=image_folder", f"data.root={root}", "data.protocol=zero_shot_plain", "linear_probe=true"]
    main_of("eval")(["--checkpoint", str(run), *given])
    found = results_of(run / "eval" / "image_folder-zero_shot_plain")
    names = {"zero_shot/R@1", "zero_shot/R@5", "zero_shot/mean_per_class", "linear_probe/top1"}
    assert {f"test/{name}" for name in names} <= found["metrics"].keys()
    assert found["baselines"] == {}, "pictures alone are composed with nothing"
    assert found["linear_probe"].keys() == {"strength", "validation_top1"}
    assert found["data"]["benchmarks"] == {"zero_shot": {"queries": 6, "gallery": 3, "excluded": {}}}
    assert {split: row["images"] for split, row in found["data"]["counts"].items()} == {"train": 9, "val": 3, "test": 6}
    lines = (run / "eval" / "image_folder-zero_shot_plain" / "ranks" / "zero_shot.csv").read_text().splitlines()[1:]
    ranks = [float(line.split(",")[1]) for line in lines]
    assert found["metrics"]["test/zero_shot/R@1"] == pytest.approx(100 * ranks.count(1) / 6)


def test_a_damaged_picture_is_named(run, tmp_path):
    root = make_image_folder(tmp_path / "pictures")
    (root / "test" / "dress" / "test0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="can't read the image .*test0.png"):
        main_of("eval")(["--checkpoint", str(run), "data.name=image_folder", f"data.root={root}", "data.protocol=null"])


def test_soft_targets_are_audited_by_those_of_the_full_grade(run, tmp_path, capsys):
    root = make_cirr(tmp_path / "data")
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{name: cirr, root: {root}, num_workers: 0}}\ntrainer: {{accelerator: cpu}}\n")
    main_of("eval")(["--checkpoint", str(run), "--config", str(config), "data.protocol=cirplant"])
    folder = run / "eval" / "cirr-cirplant"
    audit = json.loads((folder / "audit.json").read_text())
    assert audit["percent"] == results_of(folder)["audit"] and list(audit["percent"]) == ["cirr", "mean"]
    assert audit["solved"].startswith("a target of grade 1 is among the first K")
    _, columns = read_ranks(folder, results_of(folder))["cirr"]
    assert "R@1" in columns and results_of(folder)["metrics"]["test/cirr/R@1"] == pytest.approx(columns["R@1"].mean())
    shares = audit["percent"]["cirr"]["R@50"]  # of a gallery of 8
    assert (shares["image_only"], shares["either"], shares["unsolved"]) == (100, 100, 0)
    assert "solved at K: a target of grade 1" in " ".join(capsys.readouterr().out.split())
    assert (folder / "audit.png").is_file()


@pytest.mark.parametrize("name", ["cirr", "circo"])
def test_composed_benchmarks_are_measured_on_val_and_predicted_on_test(name, run, tmp_path):
    root = (make_cirr if name == "cirr" else make_circo)(tmp_path / "data")
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{name: {name}, root: {root}, num_workers: 0}}\ntrainer: {{accelerator: cpu}}\n")
    given = ["--checkpoint", str(run), "--config", str(config)]
    main_of("eval")(given)
    folder = run / "eval" / {"cirr": "cirr-clip4cir", "circo": "circo-searle"}[name]
    metrics = results_of(folder)["metrics"]
    wanted = {"R@1", "Rsubset@3", "Avg"} if name == "cirr" else {"R@5", "mAP@5", "mAP@10/addition"}
    assert {f"test/{name}/{kind}" for kind in wanted} <= metrics.keys()
    _, columns = read_ranks(folder, results_of(folder))[name]  # raises where a column is not what its metric is
    assert columns.keys() == {"rank", *({"Rsubset@1", "Rsubset@2", "Rsubset@3", "Avg"} if name == "cirr" else MAP)}
    low, high = results_of(folder)["intervals"][f"test/{name}/{'Avg' if name == 'cirr' else 'mAP@5'}"]
    assert low <= metrics[f"test/{name}/{'Avg' if name == 'cirr' else 'mAP@5'}"] <= high
    main_of("eval")([*given, "data.split=test"])
    found = results_of(folder)
    assert found["metrics"] == {} and found["protocol"]["split"] == "test"
    content = [json.loads(Path(file).read_text()) for file in found["submission"]]
    if name == "circo":
        assert {key: len(set(ids)) for key, ids in content[0].items()} == {"0": 9, "1": 9}
        return
    recall, subset = content
    assert (recall.pop("metric"), subset.pop("metric")) == ("recall", "recall_subset")
    assert recall.pop("version") == subset.pop("version") == "rc2" and len(recall) == len(subset) == 4
    for number, (pairid, names) in enumerate(recall.items()):
        reference = f"test1-{number}-0-img{number % 2}"
        assert reference not in names and len(names) == 7
        assert set(subset[pairid]) < {*names} and len(subset[pairid]) == 3
