"""Files that are not what they seem, and no network: one UserError each, that names what is wrong."""

import json
import os
import pickle
import socket
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cliplab
from cliplab.errors import UserError
from tests.conftest import TINY
from tests.hugging_face import clip_model, saved
from tests.oracles import open_clip_model

Make = Callable[[Path, dict[str, torch.Tensor]], object]


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def cut(save: Callable[[Any, Path], object]) -> Make:
    def make(file: Path, state: dict[str, torch.Tensor]) -> None:
        save(state, file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return make


def with_code(file: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save({"state_dict": state, "extra": Payload(file.parent / "was-run")}, file)


def bare_pickle(file: Path, state: dict[str, torch.Tensor]) -> None:
    file.write_bytes(pickle.dumps(Payload(file.parent / "was-run"), protocol=2))


def torchscript_with_code(file: Path, state: dict[str, torch.Tensor]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Payload(file.parent / "was-run"), protocol=2))
        archive.writestr("a/code/__torch__.py", "")


def without(*keys: str) -> Make:
    return lambda file, state: save_file({k: v for k, v in state.items() if k not in keys}, file)


def changed(**values: torch.Tensor) -> Make:
    return lambda file, state: save_file({**state, **{k.replace("__", "."): v for k, v in values.items()}}, file)


FILES: dict[str, tuple[str, Make, str]] = {
    "cut_safetensors": ("a.safetensors", cut(save_file), "can't read {file}"),
    "cut_zip": ("a.pt", cut(torch.save), "can't read {file}"),
    "cut_legacy": (
        "a.pt",
        cut(lambda s, f: torch.save(s, f, _use_new_zipfile_serialization=False)),
        "can't read {file}",
    ),
    "picture": ("a.pt", lambda f, _: Image.new("RGB", (9, 9)).save(f, "png"), "can't read {file}"),
    "picture_safe": ("a.safetensors", lambda f, _: Image.new("RGB", (9, 9)).save(f, "png"), "can't read {file}"),
    "empty": ("a.pt", lambda f, _: f.touch(), "can't read {file}"),
    "empty_safetensors": ("a.safetensors", lambda f, _: f.touch(), "can't read {file}"),
    "folder": ("a.pt", lambda f, _: f.mkdir(), "{file} is no model"),
    "torch_as_safetensors": ("a.safetensors", lambda f, s: torch.save(s, f), "can't read {file}"),
    "code": ("a.pt", with_code, "can't read {file}.*pickled code, which is never run"),
    "bare_pickle": ("a.bin", bare_pickle, "can't read {file}"),
    "torchscript_code": ("a.pt", torchscript_with_code, "can't read {file}.*pickled code, which is never run"),
    "list": ("a.pt", lambda f, s: torch.save(list(s.values()), f), "{file} holds no state dict"),
    "missing": (
        "a.safetensors",
        without("visual.proj", "ln_final.bias"),
        "{file}.*2 keys missing .ln_final.bias, visual.proj",
    ),
    "unexpected": (
        "a.safetensors",
        changed(adapter__weight=torch.ones(1)),
        "{file}.*1 keys unexpected .adapter.weight",
    ),
    "shape": (
        "a.safetensors",
        changed(text_projection=torch.ones(16, 9)),
        "{file}.*text_projection: .16, 9. in the file, .16, 16.",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_none_is_named_once_and_runs_nothing(kind: str, tmp_path: Path) -> None:
    name, make, message = FILES[kind]
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    file = tmp_path / name
    make(file, open_clip_model(TINY).state_dict())
    with pytest.raises(UserError, match=message.format(file=file)) as error:
        cliplab.load(tmp_path / "tiny.json", file)
    assert not (tmp_path / "was-run").exists()
    assert len(str(error.value)) < 700 and "\n" not in str(error.value)


def test_safetensors_under_another_ending_are_named(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    save_file(open_clip_model(TINY).state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"{tmp_path / 'a.pt'} is a safetensors file under another ending"):
        cliplab.load(tmp_path / "tiny.json", tmp_path / "a.pt")


def test_the_payload_would_run(tmp_path: Path) -> None:
    bare_pickle(tmp_path / "a.bin", {})
    pickle.loads((tmp_path / "a.bin").read_bytes())
    assert (tmp_path / "was-run").exists(), "else the tests above would prove nothing"


@pytest.mark.parametrize("damage", ["config", "weights", "missing", "architecture"])
def test_a_damaged_folder_of_hugging_face_is_named(damage: str, tmp_path: Path) -> None:
    folder = saved(clip_model(), tmp_path / "clip")
    if damage == "config":
        (folder / "config.json").write_text("{")
    elif damage == "weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:500])
    elif damage == "missing":
        (folder / "model.safetensors").unlink()
    else:
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"]["hidden_size"] = 33
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        cliplab.load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multimodal_cfg": {"width": 3}}, "CoCa"),
        ({"vision_cfg": {"patch_size": 0}}, "patch_size|can't be built"),
        ({"vision_cfg": {"layers": 0}}, "sizes must be 1 or more"),
        ({"vision_cfg": {"width": 50}}, "width of 50 can't be divided into 3 heads"),
        ({"vision_cfg": {"width": "wide"}}, "can't be built|width"),
        ({"vision_cfg": {"act_kwargs": {"tanh": True}}}, "can't be built"),
        ({"text_cfg": {"layers": -1}}, "sizes must be 1 or more"),
        ({"text_cfg": {"block": 3}}, "text_cfg has no option 'block'"),
        ({"activation": "gelu"}, "activation"),
        ({"embed_dim": -1}, "embed_dim must be 1 or more"),
        ({"vision_cfg": {"timm_model_name": "vit_base_patch16_22"}}, "did you mean 'vit_base_patch16_224'"),
        ({"text_cfg": {"hf_model_name": "/nowhere/at/all"}}, "/nowhere/at/all"),
    ],
    ids=str,
)
def test_an_architecture_that_can_not_be_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    merged = {k: {**v, **change.get(k, {})} if isinstance(v, dict) else v for k, v in TINY.items()}
    config = {**merged, **{k: v for k, v in change.items() if not isinstance(v, dict) or k not in TINY}}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        cliplab.load(tmp_path / "tiny.json")
    assert "tiny.json" in str(error.value)


# No network


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    def refuse(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


ASKED: dict[str, tuple[Callable[[], object], str]] = {
    "repository": (lambda: cliplab.load("hf-hub:org/name"), "'org/name' can't be reached"),
    "tag": (lambda: cliplab.load("ViT-B-32", "openai"), "can't read the weights 'openai' of ViT-B-32.*model.weights"),
    "tokenizer": (
        lambda: cliplab.load("ViT-B-16-SigLIP", device="meta").tokenizer("a"),
        "'timm/ViT-B-16-SigLIP' can't be",
    ),
    "text_tower": (lambda: cliplab.load("roberta-ViT-B-32", device="meta"), "'roberta-base' can't be reached"),
}


@pytest.mark.parametrize("what", ASKED)
def test_without_a_network_the_end_comes_soon(what: str, offline: None) -> None:
    ask, message = ASKED[what]
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        ask()
    assert time.monotonic() - start < 10
    assert "to a folder on this machine" in str(error.value)
