import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from cliplab.errors import UserError
from cliplab.models.checkpoints.open_clip import (
    check_tag,
    folder_weights,
    read_folder_config,
    read_tag,
    write_folder,
)
from tests.models.checkpoints.test_weights import CONFIG, same
from tests.oracles import open_clip_model

MODULE = "cliplab.models.checkpoints.open_clip"


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every tag is one file of open_clip's tiny weights; what is asked of the hub is written down."""
    asked: list[tuple[str, str]] = []

    def hub_file(repository: str, name: str) -> Path:
        asked.append((repository, name))
        if name.endswith(".safetensors"):
            raise FileNotFoundError(name)
        file = tmp_path / "open_clip_pytorch_model.bin"
        torch.save(open_clip_model(CONFIG).state_dict(), file)
        return file

    monkeypatch.setattr(f"{MODULE}.hub_file", hub_file)
    return asked


def test_a_tag_brings_its_activation_and_preprocessing(fetched: list[tuple[str, str]]) -> None:
    weights = read_tag("ViT-B-32", "openai")
    assert weights.state_dict.keys() == open_clip_model(CONFIG).state_dict().keys()
    assert weights.quick_gelu is True
    assert weights.preprocess["mean"] == (0.48145466, 0.4578275, 0.40821073)
    assert weights.preprocess.keys() <= {"mean", "std", "interpolation", "resize_mode"}
    assert read_tag("ViT-B-32", "laion2b_s34b_b79k").quick_gelu is False
    assert read_tag("ViT-L-14", "laion2b_s32b_b82k").preprocess["mean"] == (0.5, 0.5, 0.5)
    siglip = read_tag("ViT-B-16-SigLIP", "webli").preprocess
    assert (siglip["resize_mode"], siglip["interpolation"]) == ("squash", "bicubic")
    asked = [name for repository, name in fetched if repository == "timm/vit_base_patch32_clip_224.openai"]
    assert asked == ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"], "safetensors first"


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_every_tag_has_open_clips_own_activation(quick_gelu: bool) -> None:
    found = 0
    for arch, tag in open_clip.list_pretrained():
        config = open_clip.get_pretrained_cfg(arch, tag)
        if config.get("quick_gelu", False) == quick_gelu and not arch.startswith("coca"):
            assert read_tag(arch, tag, read=False).quick_gelu is quick_gelu
            assert read_tag(arch, tag, read=False).state_dict == {}
            found += 1
    assert found > 20


def test_a_file_named_in_the_tag_is_asked_for(fetched: list[tuple[str, str]]) -> None:
    named = [pair for pair in open_clip.list_pretrained() if open_clip.get_pretrained_cfg(*pair)["hf_hub"][-1] != "/"]
    read_tag(*named[0])
    repository, _, name = open_clip.get_pretrained_cfg(*named[0])["hf_hub"].rpartition("/")
    assert fetched[-1][0] == repository and fetched[-1][1] == name


def test_without_a_network_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repository: str, name: str) -> Path:
        raise UserError("no route to host")

    monkeypatch.setattr(f"{MODULE}.hub_file", fail)
    with pytest.raises(UserError, match="'openai' of ViT-B-32: no route to host.*give a file.*model.weights"):
        read_tag("ViT-B-32", "openai")


def test_a_repository_without_the_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(repository: str, name: str) -> Path:
        raise FileNotFoundError(name)

    monkeypatch.setattr(f"{MODULE}.hub_file", missing)
    with pytest.raises(UserError, match="clip_224.openai' has none of open_clip_model.safetensors, open_clip_py"):
        read_tag("ViT-B-32", "openai")


def test_an_unknown_tag_is_told_the_closest() -> None:
    with pytest.raises(UserError, match="unknown weights 'opena1' for ViT-B-32.*did you mean 'openai'"):
        check_tag("ViT-B-32", "opena1")
    with pytest.raises(UserError, match="'ViT-tiny-8-64' has no pretrained tags"):
        check_tag("ViT-tiny-8-64", "openai")
    check_tag("ViT-B-32", "openai")


# Folders


def write_config(folder: Path, content: Any) -> None:
    (folder / "open_clip_config.json").write_text(json.dumps(content))


def test_a_folder_tells_architecture_and_preprocessing(tmp_path: Path) -> None:
    asked = {"size": [32, 32], "mean": [0.1, 0.2, 0.3], "interpolation": "bilinear", "mode": "RGB", "fill_color": 0}
    write_config(tmp_path, {"model_cfg": CONFIG, "preprocess_cfg": asked})
    architecture, preprocess = read_folder_config(tmp_path)
    assert architecture == CONFIG
    assert preprocess == {"mean": (0.1, 0.2, 0.3), "interpolation": "bilinear"}  # the size is the architecture's
    write_config(tmp_path, CONFIG)
    assert read_folder_config(tmp_path) == (CONFIG, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "can't read"), ("[]", "must hold a mapping"), ('{"model_cfg": {"embed_dim": 3}}', "lacks text_cfg, vision")],
)
def test_a_config_that_is_none_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_folder_config(tmp_path)
    assert str(tmp_path / "open_clip_config.json") in str(error.value)


def test_the_file_of_weights_is_open_clips_choice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file of weights: name the one to read open_clip_model.safetensors"):
        folder_weights(tmp_path)
    (tmp_path / "epoch_3.pt").touch()
    assert folder_weights(tmp_path).name == "epoch_3.pt"
    (tmp_path / "epoch_4.pt").touch()
    with pytest.raises(UserError, match="holds epoch_3.pt, epoch_4.pt"):
        folder_weights(tmp_path)
    for name in ("pytorch_model.bin", "open_clip_pytorch_model.bin", "open_clip_model.safetensors"):
        (tmp_path / name).touch()
        assert folder_weights(tmp_path).name == name


def test_a_written_folder_is_open_clips(tmp_path: Path) -> None:
    theirs = open_clip_model(CONFIG)
    preprocess = {"size": 16, "mean": (0.1, 0.2, 0.3), "std": (1, 1, 1), "interpolation": "bilinear"}
    write_folder(
        tmp_path / "a", theirs.state_dict(), CONFIG, {**preprocess, "resize_mode": "squash", "crop_rounding": "floor"}
    )
    loaded, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'a'}")
    assert same(loaded.state_dict(), theirs.state_dict())
    assert loaded.visual.preprocess_cfg["resize_mode"] == "squash"
    assert tuple(loaded.visual.preprocess_cfg["mean"]) == (0.1, 0.2, 0.3)
    assert read_folder_config(tmp_path / "a")[1]["crop_rounding"] == "floor"  # which open_clip passes over


def test_options_that_open_clip_does_not_know_are_refused(tmp_path: Path) -> None:
    config = {**CONFIG, "vision_cfg": {"timm_model_name": "resnet18", "timm_kwargs": {"stem_width": 16}}}
    with pytest.raises(UserError, match="no words for timm_kwargs"):
        write_folder(tmp_path / "a", {}, config, {})
    assert not (tmp_path / "a").exists()


def test_weights_next_to_the_config_are_read(tmp_path: Path) -> None:
    save_file(open_clip_model(CONFIG).state_dict(), tmp_path / "model.safetensors")
    assert folder_weights(tmp_path) == tmp_path / "model.safetensors"
