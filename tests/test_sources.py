"""What a name, a file or a folder stands for, before anything is built."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from cliplab.data.geometry import OPENAI_MEAN
from cliplab.errors import UserError
from cliplab.sources import OPENAI, architecture_name, check_source, find_source
from tests.conftest import TINY
from tests.oracles import open_clip_model


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return open_clip_model(TINY).state_dict()


@pytest.fixture
def architecture(tmp_path: Path) -> str:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return str(tmp_path / "tiny.json")


def folder(path: Path, state: dict[str, torch.Tensor], **config: Any) -> Path:
    path.mkdir()
    (path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {**TINY, **config.pop("model_cfg", {})}, **config})
    )
    save_file(state, path / "open_clip_model.safetensors")
    return path


@pytest.mark.parametrize("name", OPENAI)
def test_openais_names_are_open_clips_architectures(name: str) -> None:
    assert find_source(name).architecture == open_clip.get_model_config(architecture_name(name))
    assert find_source(name).preprocess.size == {
        "ViT-L/14@336px": 336,
        "RN50x4": 288,
        "RN50x16": 384,
        "RN50x64": 448,
    }.get(name, 224)


def test_an_architecture_alone_has_no_weights_and_openais_preprocessing() -> None:
    source = find_source("ViT-B-16-plus-240")
    assert source.weights is None and source.towers == ("image", "text")
    assert (source.preprocess.size, source.preprocess.mean) == (240, OPENAI_MEAN)


@pytest.mark.parametrize(
    ("arch", "tag", "quick_gelu"),
    [("ViT-B-32", "openai", True), ("ViT-B/32", "openai", True), ("ViT-B-32", "laion2b_s34b_b79k", False)]
    + [("ViT-B-32-quickgelu", "openai", True), ("RN50", "cc12m", True), ("ViT-H-14-378", "dfn5b", True)]
    + [
        ("ViT-B-32", "laion400m_e32", True),
        ("ViT-L-14", "dfn2b_s39b", False),
        ("ViT-B-16", "datacomp_xl_s13b_b90k", False),
    ],
)
def test_a_tag_decides_the_activation(arch: str, tag: str, quick_gelu: bool) -> None:
    source = find_source(arch, tag, read=False)
    assert source.architecture["quick_gelu"] is quick_gelu and source.weights.quick_gelu is quick_gelu
    with pytest.raises(UserError, match=f"quick_gelu={not quick_gelu} contradicts .*{tag}.* quick_gelu={quick_gelu}"):
        find_source(arch, tag, {"quick_gelu": not quick_gelu}, read=False)
    assert find_source(arch, tag, {"quick_gelu": quick_gelu}, read=False).architecture["quick_gelu"] is quick_gelu


def test_a_tag_decides_the_preprocessing() -> None:
    siglip = find_source("ViT-B-16-SigLIP-384", "webli", read=False).preprocess
    assert (siglip.size, siglip.resize_mode, tuple(siglip.mean), siglip.crop_rounding) == (
        384,
        "squash",
        (0.5,) * 3,
        "half_even",
    )
    mobile = find_source("MobileCLIP-S1", "datacompdr", read=False).preprocess
    assert (mobile.interpolation, tuple(mobile.mean), tuple(mobile.std)) == ("bilinear", (0, 0, 0), (1, 1, 1))


def test_openais_file_decides_the_activation(architecture: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    numbers = {key: torch.tensor(32) for key in ("input_resolution", "context_length", "vocab_size")}
    torch.save(state | numbers, tmp_path / "openai.pt")
    assert find_source(architecture, str(tmp_path / "openai.pt")).architecture["quick_gelu"] is True
    with pytest.raises(UserError, match="quick_gelu=False contradicts .*openai.pt"):
        find_source(architecture, str(tmp_path / "openai.pt"), {"quick_gelu": False})


@pytest.mark.parametrize("quick_gelu", [None, False, True])
def test_a_plain_file_leaves_the_activation_to_the_caller(
    quick_gelu: Any, architecture: str, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(state, tmp_path / "a.safetensors")
    source = find_source(architecture, str(tmp_path / "a.safetensors"), {"quick_gelu": quick_gelu})
    assert source.architecture.get("quick_gelu", False) is bool(quick_gelu)


# OpenCLIP's folders


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_folder(prefix: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    asked = {"size": [32, 32], "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0], "resize_mode": "longest"}
    path = folder(tmp_path / "model", state, preprocess_cfg=asked, model_cfg={"quick_gelu": True})
    source = find_source(f"{prefix}{path}")
    assert source.architecture["quick_gelu"] is True
    assert source.weights.state_dict.keys() == state.keys()
    preprocess = source.preprocess
    assert (preprocess.size, list(preprocess.mean), preprocess.resize_mode) == (32, [0.1, 0.2, 0.3], "longest")


def test_the_weights_of_a_folder_in_another_architecture(
    architecture: str, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """With the activation and the preprocessing of the folder; the picture's size stays the architecture's."""
    path = folder(
        tmp_path / "model", state, preprocess_cfg={"size": 99, "resize_mode": "squash"}, model_cfg={"quick_gelu": True}
    )
    source = find_source(architecture, str(path))
    assert source.architecture["quick_gelu"] is True
    assert (source.preprocess.size, source.preprocess.resize_mode) == (32, "squash")
    with pytest.raises(UserError, match="quick_gelu=False contradicts"):
        find_source(architecture, str(path), {"quick_gelu": False})


def test_weights_given_replace_those_of_the_folder(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = folder(tmp_path / "model", state)
    changed = {key: value + 1 for key, value in state.items()}
    save_file(changed, tmp_path / "other.safetensors")
    found = find_source(str(path), str(tmp_path / "other.safetensors")).weights
    assert torch.equal(found.state_dict["visual.proj"], changed["visual.proj"])


def test_a_config_and_a_tokenizer_in_the_folder_come_before_the_hub(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    text = {**TINY["text_cfg"], "hf_tokenizer_name": "org/name", "hf_model_name": "org/name"}
    path = folder(tmp_path / "model", state, model_cfg={"text_cfg": text})
    found = find_source(str(path)).architecture["text_cfg"]
    assert (found["hf_tokenizer_name"], found["hf_model_name"]) == ("org/name", "org/name")
    assert found["hf_model_pretrained"] is False, "the folder's weights hold the text tower"
    for name in ("tokenizer_config.json", "config.json"):
        (path / name).write_text("{}")
    found = find_source(str(path)).architecture["text_cfg"]
    assert (found["hf_tokenizer_name"], found["hf_model_name"]) == (str(path), str(path))


# Options


def test_sizes_may_be_changed(architecture: str) -> None:
    source = find_source(architecture, None, {"image_size": 48, "context_length": 20, "attention": None})
    assert source.architecture["vision_cfg"]["image_size"] == source.preprocess.size == 48
    assert source.architecture["text_cfg"]["context_length"] == 20
    assert find_source(architecture).architecture == TINY, "the architecture read again is unchanged"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imagesize": 3}, "load has no option 'imagesize': did you mean 'image_size'"),
        ({"image_size": 0}, "image_size must be .* at least 1, got 0"),
        ({"image_size": "224"}, "image_size must be .* got '224'"),
        ({"context_length": True}, "context_length must be .* got True"),
        ({"quick_gelu": "yes"}, "quick_gelu must be True or False, got 'yes'"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, Any], message: str, architecture: str) -> None:
    with pytest.raises(UserError, match=message):
        find_source(architecture, None, options)


# Names that stand for nothing


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("ViT-B32", None, "unknown architecture 'ViT-B32'.*did you mean 'ViT-B-32'"),
        ("ViT-B-32", "openia", "unknown weights 'openia' for ViT-B-32.*did you mean 'openai'"),
        ("ViT-B-32", "/nowhere/a.pt", "no weights file or folder /nowhere/a.pt"),
        ("/nowhere/model", None, "no folder /nowhere/model"),
        ("local-dir:nowhere", None, "no folder nowhere"),
        ("hf-hub:", None, "'hf-hub:' names no repository"),
        ("hf-hub:one/two/three", None, "names no repository"),
    ],
)
def test_names_of_nothing_are_told(name: str, weights: str | None, message: str) -> None:
    for ask in (find_source, check_source):
        with pytest.raises(UserError, match=message):
            ask(name, weights)


def test_a_folder_that_is_no_model_is_told(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UserError, match="is no model: it has neither open_clip_config.json .*config.json") as error:
        find_source(str(tmp_path))
    assert str(tmp_path) in str(error.value)
    path = folder(tmp_path / "model", state)
    (path / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match=f"{path} holds no file of weights"):
        find_source(str(path))
    assert find_source(str(path), read=False).weights is None
    (path / "open_clip_config.json").unlink()
    (path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match=f"{path} has no weights: neither model.safetensors nor pytorch_model.bin"):
        find_source(str(path))


def test_checking_reads_no_weights(tmp_path: Path, architecture: str) -> None:
    (tmp_path / "a.pt").write_text("no weights at all")
    check_source(architecture, str(tmp_path / "a.pt"))
    with pytest.raises(UserError):
        find_source(architecture, str(tmp_path / "a.pt"))
