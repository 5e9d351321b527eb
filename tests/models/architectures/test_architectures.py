import json
from pathlib import Path

import open_clip
import pytest
import torch
import transformers

from cliplab.errors import UserError
from cliplab.models.architectures import architecture_names, read_architecture
from cliplab.models.clip import build_clip
from tests.oracles import open_clip_model

OWN = ("ALIGN-base", "RN-tiny-64", "ViT-tiny-8-64", "timm-resnet10t-64")


def test_names_are_ours_and_open_clips() -> None:
    names = architecture_names()
    assert names == sorted(names) and len(names) == len(set(names))
    assert {*OWN, *open_clip.list_models()} == set(names)


@pytest.mark.parametrize("name", OWN)
def test_our_own_architectures_are_in_open_clips_form(name: str, tmp_path: Path) -> None:
    config = read_architecture(name)
    if "hf_model_name" in config["text_cfg"]:
        transformers.BertConfig(hidden_size=24, num_attention_heads=3).save_pretrained(tmp_path)
        config["text_cfg"] |= {"hf_model_name": str(tmp_path), "hf_model_pretrained": False}
    with torch.device("meta"):
        ours, theirs = build_clip(config), open_clip_model(config)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_open_clips_names_give_open_clips_configuration() -> None:
    for name in ("ViT-B-32", "ViT-L-14-quickgelu"):
        assert read_architecture(name) == open_clip.get_model_config(name)
    read_architecture("ViT-B-32")["quick_gelu"] = True
    assert "quick_gelu" not in read_architecture("ViT-B-32"), "who changes what was read changes a copy"


def test_a_json_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(read_architecture(OWN[1]) | {"embed_dim": 7}))
    assert read_architecture(str(file)) == read_architecture(OWN[1]) | {"embed_dim": 7}


def test_an_unknown_name_is_told_the_closest() -> None:
    with pytest.raises(UserError, match=r"unknown architecture 'ViT-B32' \(model\.arch\): did you mean 'ViT-B-32'"):
        read_architecture("ViT-B32")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ('{"embed_dim": 3, "text_cfg": {}}', "lacks vision_cfg"),
        ("[]", "open_clip's form"),
        ("[{}]", "open_clip's form"),
        ("3", "open_clip's form"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "broken.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_architecture(str(file))
    assert str(file) in str(error.value) and "model.arch" in str(error.value)
