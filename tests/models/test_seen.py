"""Whoever looks at a module, or replaces it, gets what open_clip would give."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cliplab.models.seen import draws, is_watched
from tests.oracles import TEXT, VIT, assert_close, make_pair, pictures, sentences

CONFIG = {"embed_dim": 20, "vision_cfg": VIT, "text_cfg": TEXT}


class Adapter(nn.Module):
    """As PEFT wraps a layer: the wrapped layer's attributes and an update of its own."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.update = layer, nn.Conv2d(3, layer.out_channels, layer.kernel_size, layer.stride, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.update(x)


def biased(layer: Any) -> nn.Module:
    changed = nn.Conv2d(3, layer.out_channels, layer.kernel_size, layer.stride)
    changed.weight.data.copy_(layer.weight.data)
    return changed


def doubled(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    return layer


@pytest.mark.parametrize("change", [Adapter, biased, doubled])
def test_what_stands_in_the_place_of_the_patch_embedding_is_called(change: Callable[[Any], nn.Module]) -> None:
    ours, theirs = make_pair(CONFIG)
    before = ours.encode_image(pictures(2, 32))
    for model in (ours, theirs):
        torch.manual_seed(1)
        model.visual.conv1 = change(model.visual.conv1)
    found = ours.encode_image(pictures(2, 32))
    assert_close(found, theirs.encode_image(pictures(2, 32)))
    assert (found - before).abs().max() > 1e-3


@pytest.mark.parametrize("place", ["ln_final", "visual.ln_post", "transformer.resblocks.2.mlp.c_fc", "visual.conv1"])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_hooks_see_what_they_see_in_open_clip(place: str, kind: str) -> None:
    seen: list[list[Tensor]] = []
    for model in make_pair(CONFIG):
        called: list[Tensor] = []
        module = model.get_submodule(place)
        if kind == "forward":
            module.register_forward_hook(lambda *given, called=called: called.append(given[2].detach()))
        else:
            module.register_full_backward_hook(lambda *given, called=called: called.append(given[2][0]))
        total = model.encode_image(pictures(2, 32)).sum() + model.encode_text(sentences(3, 11, 60)).sum()
        total.backward()
        seen.append(called)
    (ours,), (theirs,) = seen
    assert_close(ours, theirs)


def test_dropout_of_an_adapter_is_drawn_for_each_row() -> None:
    model, _ = make_pair(CONFIG)
    assert not draws(model) and model.visual.rows_are_independent and model.rows_are_independent
    for block in (model.visual.transformer.resblocks[0], model.transformer.resblocks[0]):
        block.mlp.c_fc = nn.Sequential(block.mlp.c_fc, nn.Dropout(0.5)).eval()
    assert not draws(model)
    model.train()
    assert draws(model) and not model.visual.rows_are_independent and not model.rows_are_independent


def test_a_trace_holds_for_longer_texts() -> None:
    model = make_pair(CONFIG)[0].requires_grad_(False)
    assert not is_watched(model)
    short = sentences(3, 11, 60)
    short[:, 4], short[:, 5:] = 59, 0
    traced: Any = torch.jit.trace(lambda text: model.encode_text(text), short, check_trace=False)
    assert_close(traced(sentences(3, 11, 60)), model.encode_text(sentences(3, 11, 60)))
