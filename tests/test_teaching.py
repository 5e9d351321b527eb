import json
from pathlib import Path

import pytest
import torch

from cliplab import build
from cliplab.config import load_config
from cliplab.errors import UserError
from cliplab.teaching import build_teacher, check_teacher
from tests.conftest import TINY
from tests.test_train import main_of


@pytest.fixture(scope="module")
def taught(tiny_config: Path) -> Path:
    """A finished run with a composer, of one epoch."""
    main_of("train")(["--config", str(tiny_config), "name=taught", "model.composer=sum", "trainer.max_epochs=1"])
    return tiny_config.parent / "runs" / "taught"


def weights(folder: Path, **changes: object) -> tuple[Path, Path]:
    """A tiny model without composer: architecture and weights."""
    (folder / "arch.json").write_text(json.dumps({**TINY, **changes}))
    from cliplab.models.clip import build_clip

    torch.manual_seed(3)
    torch.save(build_clip({**TINY, **changes}).state_dict(), folder / "weights.pt")
    return folder / "arch.json", folder / "weights.pt"


def test_a_run_teaches_composed_queries(tiny_config: Path, taught: Path) -> None:
    config = load_config(tiny_config, ["loss=distillation", f"teacher.arch={taught}"])
    build.check(config)
    model, built_from = build.build_model(config)
    module = build.build_module(config, model, built_from)
    stored = torch.load(taught / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert module.teacher is not None
    theirs = module.teacher.model.state_dict()
    assert theirs.keys() == {key.removeprefix("model.") for key in stored}
    assert all(torch.equal(theirs[key.removeprefix("model.")], value) for key, value in stored.items())
    assert build.build_module(config, model, built_from, train=False).teacher is None


def test_a_distilled_run_is_complete_and_needs_no_teacher_to_be_tested(tiny_config: Path, taught: Path) -> None:
    moved = taught.with_name("teacher")
    taught.rename(moved)
    given = ["loss=distillation", f"teacher.arch={moved}", "name=distilled", "trainer.max_epochs=1"]
    main_of("train")(["--config", str(tiny_config), *given, "model.freeze=[image_encoder]"])
    moved.rename(taught)
    run = tiny_config.parent / "runs" / "distilled"
    state = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert not any("teacher" in key for key in state)
    main_of("eval")(["--checkpoint", str(run)])
    again = json.loads(next((run / "eval").glob("*/results.json")).read_text())
    assert again["metrics"] == json.loads((run / "results.json").read_text())["metrics"]


def test_an_architecture_with_weights_teaches_single_queries(tiny_config: Path, tmp_path: Path) -> None:
    arch, file = weights(tmp_path)
    given = ["model.composer=null", "data.name=wardrobe_captions", "loss={name: distillation, weight: 2}"]
    config = load_config(tiny_config, [*given, f"teacher.arch={arch}", f"teacher.weights={file}"])
    check_teacher(config)
    teacher = build_teacher(config, TINY, build.build_model)
    stored = torch.load(file, weights_only=True)
    assert torch.equal(teacher.model.clip.visual.proj, stored["visual.proj"]) and teacher.model.composer is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_cfg": {**TINY["vision_cfg"], "image_size": 48}}, "has another image size than model.arch=.*48.*32"),
        ({"text_cfg": {**TINY["text_cfg"], "context_length": 20}}, "has another tokenizer than model.arch="),
    ],
)
def test_another_image_size_or_tokenizer_is_refused(tiny_config, tmp_path, changes, said) -> None:
    arch, file = weights(tmp_path, **changes)
    given = ["model.composer=null", "data.name=wardrobe_captions", "loss=distillation"]
    config = load_config(tiny_config, [*given, f"teacher.arch={arch}", f"teacher.weights={file}"])
    with pytest.raises(UserError, match=said):
        build_teacher(config, TINY, build.build_model)


def test_mistakes_name_the_key(tiny_config: Path, taught: Path, tmp_path: Path) -> None:
    arch, file = weights(tmp_path)
    composed = load_config(tiny_config, ["loss=distillation", f"teacher.arch={arch}", f"teacher.weights={file}"])
    with pytest.raises(UserError, match=r"teacher.arch=.*arch.json: composed queries are taught by a run"):
        check_teacher(composed)
    both = load_config(tiny_config, ["loss=distillation", f"teacher.arch={taught}", f"teacher.weights={file}"])
    with pytest.raises(UserError, match=r"is a run and has weights of its own: leave teacher.weights out"):
        check_teacher(both)
    captions = ["model.composer=null", "data.name=wardrobe_captions", "loss=distillation"]
    with pytest.raises(UserError, match=r"teacher.arch=.*arch.json has no weights: set teacher.weights"):
        build_teacher(load_config(tiny_config, [*captions, f"teacher.arch={arch}"]), TINY, build.build_model)
    with pytest.raises(UserError, match=r"teacher.arch=.*taught has a composer that gives a vector"):
        build_teacher(load_config(tiny_config, [*captions, f"teacher.arch={taught}"]), TINY, build.build_model)


def test_the_features_of_a_student_are_not_given_to_its_teacher(tiny_config: Path, taught: Path) -> None:
    given = ["loss=distillation", f"teacher.arch={taught}", "model.freeze=[image_encoder]"]
    config = load_config(tiny_config, given)
    model, built_from = build.build_model(config)
    dataset = build.build_dataset(config)
    assert build.build_datamodule(config, dataset, model, built_from).features is None
    assert build.build_datamodule(config, dataset, model, built_from, train=False).features is not None
