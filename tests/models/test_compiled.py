"""Compiled blocks against the same model without."""

import os
import shutil
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from cliplab.models.clip import build_clip
from cliplab.models.compiled import compile_blocks, repeated_blocks
from tests.oracles import (
    MODIFIED_RESNET,
    TEXT,
    TIMM_VIT,
    VIT,
    assert_close,
    assert_same_gradients,
    gradients,
    pictures,
    sentences,
)

whole = pytest.mark.skipif(
    not os.environ.get("CLIPLAB_TEST_ALL") or shutil.which("g++") is None, reason="compiles for minutes, with g++"
)


def model_of(**vision: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_clip({"embed_dim": 20, "vision_cfg": {**VIT, **vision}, "text_cfg": TEXT})


def is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None


@pytest.mark.parametrize(
    ("vision", "kinds"),
    [
        (VIT, {"ResidualAttentionBlock"}),
        (MODIFIED_RESNET, {"Bottleneck", "ResidualAttentionBlock"}),
        ({**TIMM_VIT, "timm_model_name": "test_vit", "image_size": 160}, {"Block", "ResidualAttentionBlock"}),
    ],
    ids=["vit", "resnet", "timm"],
)
def test_the_blocks_of_both_towers_are_found(vision: dict[str, Any], kinds: set[str]) -> None:
    model = build_clip({"embed_dim": 20, "vision_cfg": vision, "text_cfg": TEXT})
    blocks = repeated_blocks(model)
    assert {type(block).__name__ for block in blocks} == kinds
    assert len({id(block) for block in blocks}) == len(blocks)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=whole)])
def test_compiled_blocks_give_equal_features_and_gradients(backend: str, monkeypatch) -> None:
    """Texts of several lengths and another batch size ask for shapes that were not compiled first."""
    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda given: plain_compile(given, backend=backend))
    plain = model_of(layers=2)
    compiled, names = deepcopy(plain), list(plain.state_dict())
    assert compile_blocks(compiled, "cpu")
    assert all(map(is_compiled, repeated_blocks(compiled))) and list(compiled.state_dict()) == names
    for batch in (3, 2):
        images, text = pictures(batch, 32), sentences(batch, 11, 60)
        expected, found = ([m.encode_image(images), m.encode_text(text)] for m in (plain, compiled))
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
        assert_same_gradients(gradients(found, compiled), gradients(expected, plain))


def test_without_a_compiler_it_says_why_and_stays_as_it_is(monkeypatch, caplog) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Failed to find C++ compiler.\nmore")

    model = model_of()
    monkeypatch.setattr(torch, "compile", broken)
    assert not compile_blocks(model, "cpu")
    assert "going on without it: Failed to find C++ compiler." in caplog.text and "more" not in caplog.text
    assert not any(map(is_compiled, model.modules()))
