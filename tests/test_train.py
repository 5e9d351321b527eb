"""Whole runs through the user's own entry points."""

import importlib.util
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from cliplab.errors import UserError, message_of
from cliplab.training.loggers import read_curves

ROOT = Path(__file__).parent.parent


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def main_of(name: str):
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def finished(tiny_config: Path) -> tuple[Path, str]:
    """A finished run and what it printed."""
    done = script("train", "--config", tiny_config, "name=finished")
    assert done.returncode == 0, done.stderr
    return tiny_config.parent / "runs" / "finished", done.stdout


def test_a_run_leaves_what_it_promises(finished):
    run, printed = finished
    results = json.loads((run / "results.json").read_text())
    names = {"config.yaml", "results.json", "checkpoints", "tensorboard", "metrics.csv", "ranks", "pictures"}
    names |= {"audit.json", "audit.png", "curves.png"}
    assert names <= {path.name for path in run.iterdir()}
    assert results["schema"] == 1
    assert {"test/dress/R@10", "test/mean/R@50", "test/toptee/median_rank"} <= set(results["metrics"])
    assert set(results["baselines"]) == {"image_only", "text_only"}
    for metrics in results["baselines"].values():
        assert set(metrics) >= {"test/dress/R@10", "test/mean/R@10"}
    low, high = results["intervals"]["test/dress/R@10"]
    assert low <= results["metrics"]["test/dress/R@10"] <= high
    assert results["config"]["optim"]["lr"] == 1e-3
    assert results["protocol"]["gallery"] == "original_split"
    assert results["data"]["counts"]["dress"]["train"]["records"] == 48
    assert len(results["data"]["manifest_hash"]) == 64
    assert {"fit", "test"} <= set(results["seconds"])
    for row in ("combiner", "image_only", "text_only", "modality audit"):
        assert row in printed


def test_the_audit_agrees_with_the_recalls(finished):
    run, _ = finished
    results = json.loads((run / "results.json").read_text())
    assert json.loads((run / "audit.json").read_text())["percent"] == results["audit"]
    assert list(results["audit"]) == ["dress", "shirt", "toptee", "mean"]
    for name, kinds in results["audit"].items():
        for kind, shares in kinds.items():
            recall = results["metrics"][f"test/{name}/{kind}"]
            assert shares["either"] + shares["composer_only"] - shares["lost"] == pytest.approx(recall)
            for label in ("image_only", "text_only"):
                assert shares[label] == pytest.approx(results["baselines"][label][f"test/{name}/{kind}"])


def test_a_chart_that_fails_loses_nothing(tiny_config, monkeypatch, caplog):
    monkeypatch.setattr("cliplab.charts.curves_figure", lambda *_: 1 / 0)
    logging.getLogger("cliplab").propagate = True
    main_of("train")(["--config", str(tiny_config), "name=chartless", "trainer.max_epochs=1"])
    run = tiny_config.parent / "runs" / "chartless"
    assert "curves.png: ZeroDivisionError" in caplog.text
    assert (run / "results.json").is_file() and (run / "audit.png").is_file()
    assert not (run / "curves.png").exists()


def test_recalls_follow_from_the_ranks_on_disk(finished):
    run, _ = finished
    metrics = json.loads((run / "results.json").read_text())["metrics"]
    for category in ("dress", "shirt", "toptee"):
        lines = (run / "ranks" / f"{category}.csv").read_text().splitlines()[1:]
        ranks = [float(line.split(",")[1]) for line in lines]
        assert len(ranks) == 20
        expected = 100 * sum(rank <= 10 for rank in ranks) / len(ranks)
        assert metrics[f"test/{category}/R@10"] == pytest.approx(expected, abs=1e-9)


def test_pictures_are_there(finished):
    run, _ = finished
    for category in ("dress", "shirt", "toptee"):
        with Image.open(run / "pictures" / f"{category}-test.png") as picture:
            assert picture.size[0] > 1000


def test_eval_reproduces_the_test_numbers_to_the_last_digit(finished):
    run, _ = finished
    done = script("eval", "--checkpoint", run)
    assert done.returncode == 0, done.stderr
    trained = json.loads((run / "results.json").read_text())
    again = json.loads(next((run / "eval").glob("*/results.json")).read_text())
    assert again["metrics"] == trained["metrics"]
    assert again["baselines"] == trained["baselines"]
    assert again["audit"] == trained["audit"]
    assert {path.name for path in next((run / "eval").iterdir()).glob("*.png")} == {"audit.png"}


def test_killed_after_an_epoch_and_started_again_equals_the_uninterrupted_run(finished, tiny_config):
    """Also: the same seed gives the same numbers twice."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(tiny_config), "name=killed"]
    run = tiny_config.parent / "runs" / "killed"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "last.ckpt").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "results.json").exists(), "killed too late to test anything"
    done = script("train", "--config", tiny_config, "name=killed")
    assert done.returncode == 0, done.stderr
    assert "continuing the interrupted run" in done.stderr
    uninterrupted = json.loads((finished[0] / "results.json").read_text())
    assert json.loads((run / "results.json").read_text())["metrics"] == uninterrupted["metrics"]
    epochs = {line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()[1:]}
    assert {"0", "1"} <= epochs
    assert read_curves(run / "metrics.csv") == read_curves(finished[0] / "metrics.csv")


def test_missing_fashioniq_is_one_clear_message():
    done = script("train", "--config", "configs/fashioniq.yaml", "data.root=nowhere")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for part in ("nowhere", "cap.dress.train.json", "XiaoxiaoGuo/fashion-iq", "configs/quickstart.yaml"):
        assert part in done.stderr


def test_debug_shows_the_traceback():
    done = script("train", "--config", "configs/fashioniq.yaml", "data.root=nowhere", "debug=true")
    assert "Traceback" in done.stderr


def test_help_is_fast_because_it_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "train.py"), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "configs/quickstart.yaml" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "lightning", "open_clip", "datasets", "omegaconf.omegaconf.torch"}


def test_importing_cliplab_imports_nothing_heavy():
    code = "import sys, cliplab; print(sorted({'torch', 'lightning', 'datasets', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "did you mean 'optim.lr'"),
        ("optim.lr=fast", "optim.lr"),
        ("model.composer.name=combner", "did you mean 'combiner'"),
        ("model.composer.hidden=3", "did you mean 'hidden_dim'"),
        ("model.composer.dropout=much", "option 'dropout' must be"),
        ("loss.name=info_nec", "did you mean 'info_nce'"),
        ("data.protocol=clip4cri", "did you mean 'clip4cir'"),
        ("data.protocol.gallery=everything", "option 'gallery'"),
        ("data.name=fashionqi", "did you mean 'fashioniq'"),
        ("data.categories=[dres]", "dres"),
        ("data.pad=round", "data.pad"),
        ("data.image_backend=pillow", "data.image_backend must be exact or fast"),
        ("model.freeze=[composr]", "did you mean 'composer'"),
        ("model.composer=null", "model.composer.name"),
        ("model.weights=nothing.safetensors", "nothing.safetensors"),
        ("model.arch=nothing.json", "nothing.json"),
        ("trainer.monitor=val/mean/R@11", "did you mean 'val/mean/R@10'"),
        ("trainer.precision=17", "trainer"),
        ("optim.lr_multipliers={towers: 1}", "unknown part 'towers'"),
        ("optim.schedule=square", "optim.schedule"),
        ("data.batch_size=1000", "lower data.batch_size"),
        ("resume=nothing.ckpt", "nothing.ckpt"),
    ],
)
def test_bad_input_names_the_key(tiny_config, override, said):
    with pytest.raises(UserError) as caught:
        main_of("train")(["--config", str(tiny_config), "name=bad", override])
    assert said in message_of(caught.value)


@pytest.fixture
def damaged(small_wardrobe: Path, tmp_path: Path) -> Path:
    """A copy of the small wardrobe to be damaged."""
    root = tmp_path / "wardrobe"
    shutil.copytree(small_wardrobe, root)
    return root


def test_a_truncated_picture_is_named(tiny_config, damaged):
    victim = sorted((damaged / "images").iterdir())[-1]  # of the last gallery: found in the first validation
    for picture in (damaged / "images").iterdir():
        if picture == victim or picture.stem in json.loads(
            (damaged / "image_splits/split.toptee.val.json").read_text()
        ):
            picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(UserError) as caught:
        main_of("train")(["--config", str(tiny_config), "name=truncated", f"data.root={damaged}", "data.num_workers=1"])
    assert re.search(r"can't read the image .*\.png", message_of(caught.value))
    assert "Traceback" not in message_of(caught.value)


def test_missing_pictures_are_reported_or_refused(tiny_config, damaged):
    gone = json.loads((damaged / "captions/cap.dress.val.json").read_text())[0]["target"]
    (damaged / "images" / f"{gone}.png").unlink()
    arguments = ["--config", str(tiny_config), "name=missing", f"data.root={damaged}"]
    with pytest.raises(UserError, match=f"1 image.*{gone}"):
        main_of("train")(arguments)
    main_of("train")([*arguments, "data.protocol.missing_images=report", "trainer.max_epochs=1"])
    data = json.loads((tiny_config.parent / "runs/missing/results.json").read_text())["data"]
    assert data["benchmarks"]["dress"]["excluded"]["gallery_rows"] == 1
    assert data["benchmarks"]["dress"]["excluded"]["queries"] >= 1
    assert data["benchmarks"]["dress"]["queries"] == 20 - data["benchmarks"]["dress"]["excluded"]["queries"]
    assert data["missing_images"] == {"count": 1, "first": [gone]}


@pytest.mark.parametrize("composer", ["artemis", "tirg", "sum"])
def test_other_composers_train_and_rank(tiny_config, composer):
    arguments = ["--config", str(tiny_config), f"name={composer}", f"model.composer={composer}", "trainer.max_epochs=1"]
    main_of("train")([*arguments, "data.protocol=searle" if composer == "sum" else "data.protocol=artemis"])
    results = json.loads((tiny_config.parent / f"runs/{composer}/results.json").read_text())
    assert 0 <= results["metrics"]["test/mean/R@10"] <= 100


def test_a_dual_encoder_trains_on_captions(tiny_config):
    arguments = ["--config", str(tiny_config), "name=captions", "model.composer=null", "data.name=wardrobe_captions"]
    main_of("train")([*arguments, "trainer.max_epochs=1"])
    results = json.loads((tiny_config.parent / "runs/captions/results.json").read_text())
    assert {"test/t2i/R@1", "test/i2t/R@10", "test/mean/R@10"} <= set(results["metrics"])
    assert results["baselines"] == {} and results["audit"] == {}
    names = {path.name for path in (tiny_config.parent / "runs/captions").iterdir()}
    assert "curves.png" in names and not names & {"audit.json", "audit.png"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.composer.dropout=2", "dropout"),
        ("model.composer.hidden_dim=0", "hidden_dim"),
        ("data.protocol.hit=any_positive", "no option 'hit'"),
        ("name=../outside", "name=../outside"),
    ],
)
def test_options_that_only_the_parts_can_judge(tiny_config, override, said):
    with pytest.raises(UserError, match=re.escape(said)):
        main_of("train")(["--config", str(tiny_config), "name=judged", override])


def test_a_damaged_checkpoint_to_resume_from_is_named(finished, tiny_config, tmp_path):
    damaged = tmp_path / "cut.ckpt"
    damaged.write_bytes((finished[0] / "checkpoints" / "last.ckpt").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"can't read .*cut\.ckpt"):
        main_of("train")(["--config", str(tiny_config), "name=resumed", f"resume={damaged}"])
    other = ["--config", str(tiny_config), "name=resumed", "model.composer=tirg"]
    with pytest.raises(UserError, match="another architecture"):
        main_of("train")([*other, f"resume={finished[0] / 'checkpoints' / 'last.ckpt'}"])


def test_a_mistake_leaves_the_finished_run_where_it_is(finished, tiny_config):
    for override in ("model.arch=RN50x", "trainer.precision=17", "model.composer.dropout=2"):
        with pytest.raises(UserError):
            main_of("train")(["--config", str(tiny_config), "name=finished", override])
        assert (finished[0] / "results.json").is_file()


@pytest.mark.parametrize("same_image", ["separate", "positives"])
def test_each_caption_trains_beside_captions_of_its_own_image_or_not(tiny_config, same_image, caplog):
    given = ["data.name=wardrobe_captions", "data.protocol.train_join=each_caption", f"data.same_image={same_image}"]
    given += ["model.composer=null", "trainer.max_epochs=1", f"name={same_image}"]
    with caplog.at_level("INFO", "cliplab"):
        main_of("train")(["--config", str(tiny_config), *given])
    run = tiny_config.parent / "runs" / same_image
    results = json.loads((run / "results.json").read_text())
    assert results["data"]["annotations"] == ["dataset_wardrobe.json"]
    assert {"test/t2i/R@1", "test/i2t/R@10"} <= set(results["metrics"])
    assert results["protocol"]["train_join"] == "each_caption" and results["protocol"]["captions_per_image"] is None
    assert ("no image twice in a batch of 16" in caplog.text) == (same_image == "separate")
