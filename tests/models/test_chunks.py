from inspect import signature

import pytest
import torch
from torch import nn

from cliplab.errors import UserError
from cliplab.losses import LOSSES
from cliplab.models.chunks import check_chunks, encode_in_chunks
from cliplab.models.clip import CLIP
from cliplab.models.composed import ComposedRetriever, composer_inputs
from cliplab.models.composers import COMPOSERS
from tests.models.composers.text_towers import make_words

VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TEXT = {"context_length": 9, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}


def make_model(composer: str = "combiner", vision: dict = VISION) -> ComposedRetriever:
    torch.manual_seed(0)
    clip = CLIP(8, vision, TEXT)
    mean = std = (0.5, 0.5, 0.5)
    return ComposedRetriever(clip, COMPOSERS[composer](8), mean, std).double().eval()


def make_batch(size: int = 7, side: int = 16) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, size, 3, side, side), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 49, (size, 9), generator=generator)
    text[:, 6] = 49
    return {"query": {"image": images[0], "text": text}, "target": {"image": images[1]}}


def gradients(model: ComposedRetriever, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = LOSSES["info_nce"](model.encode_query(batch["query"]), model.encode_target(batch["target"]), model.scale)
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("composer", ["combiner", "sum"])
def test_gradients_are_those_of_one_pass(size: int, composer: str) -> None:
    model, batch = make_model(composer), make_batch()
    loss, expected = gradients(model, batch)
    model.set_chunk_size(size)
    chunked, found = gradients(model, batch)
    torch.testing.assert_close(chunked, loss)
    assert expected.keys() == found.keys() and len(found) > 40
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_a_chunk_is_encoded_twice_and_no_more_at_a_time() -> None:
    """What the backward pass needs of it is computed again."""
    model, batch, sizes = make_model(), make_batch(), []
    model.clip.visual.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    model.set_chunk_size(2)
    gradients(model, batch)
    assert sorted(sizes[:8]) == [1, 1, 2, 2, 2, 2, 2, 2], "reference and target, forward"
    assert len(sizes) == 16 and max(sizes) == 2
    sizes.clear()
    with torch.no_grad():
        model.encode_target(batch["target"])
    assert sizes == [7], "nothing is kept without gradients: one pass"


def test_dropout_is_replayed() -> None:
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Dropout(0.5))
    inputs = torch.rand(9, 5) + 0.1
    outputs = encode_in_chunks(tower, inputs, size=2)
    torch.rand(3)  # others draw in between
    outputs.sum().backward()
    kept = (outputs != 0).float() / 0.5
    torch.testing.assert_close(tower[0].weight.grad, kept.T @ inputs)
    assert 0 < kept.mean() < 2


@pytest.mark.parametrize("name", ["cross_attention", "bidirectional", "pic2word", "lincir"])
def test_composers_read_texts_in_chunks_too(name: str) -> None:
    words = make_words()
    torch.manual_seed(0)
    clip = CLIP(8, VISION, {**TEXT, "context_length": 12, "vocab_size": 92})
    given = {key: v for key, v in composer_inputs(clip, words).items() if key in signature(COMPOSERS[name]).parameters}
    options = {"latents": 3, "heads": 2} if name == "cross_attention" else {}
    model = ComposedRetriever(clip, COMPOSERS[name](**given, **options), (0.5,) * 3, (0.5,) * 3).double().eval()
    with torch.no_grad():  # closed gates would hide what is behind them
        for parameter in model.composer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    batch = make_batch(5)
    batch["query"]["text"] = words.batch("is long", "red", "blue and striped", "", "red is blue")
    sizes: list[int] = []
    clip.transformer.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(3)  # LinCIR's noise
        pairs = model.training_pairs(batch["query"], batch["target"])
        loss = sum(pair.weight * LOSSES["mse"](pair.query, pair.target) for pair in pairs)
        model.zero_grad()
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    loss, expected = step()
    sizes.clear()
    model.set_chunk_size(2)
    chunked, found = step()
    torch.testing.assert_close(chunked, loss)
    assert expected.keys() == found.keys() and any(n.startswith("composer.") for n in found)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], msg=key)
    assert name == "cross_attention" or (max(sizes) == 2 and len(sizes) >= 6)


def test_several_outputs() -> None:
    inputs = torch.rand(5, 3, requires_grad=True)
    one, two = encode_in_chunks(lambda part: (part * 2, part[:, None] + 1), inputs, size=2)
    assert torch.equal(one, inputs * 2) and torch.equal(two, inputs[:, None] + 1)


def test_trained_batch_norm_is_refused_and_frozen_is_not() -> None:
    model = make_model(vision=RESNET)
    with pytest.raises(UserError, match=r"model.chunk_size=2: the statistics of visual\S*bn\S* \(BatchNorm\)"):
        model.set_chunk_size(2)
    model.set_chunk_size(None)
    model.freeze(["image_encoder"])
    model.train()
    batch = make_batch(side=32)
    loss, expected = gradients(model, batch)
    model.set_chunk_size(2)
    torch.manual_seed(0)
    chunked, found = gradients(model.eval(), batch)
    assert found.keys() == expected.keys() and torch.isfinite(chunked)


def test_nothing_to_check_without_chunks() -> None:
    check_chunks([nn.BatchNorm2d(3)], None)
