import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel, SiglipModel

import cliplab
from cliplab.hugging_face_outputs import contrastive_loss, image_output, text_output
from cliplab.models.clip import build_clip
from tests.hugging_face import clip_ids, make_model, saved
from tests.oracles import MODIFIED_RESNET, TEXT


def assert_states(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", [CLIPModel, SiglipModel])
def test_states_and_maps_equal_transformers(kind, tmp_path):
    theirs = make_model(kind)
    ours = cliplab.load(saved(theirs, tmp_path)).model
    pixels = torch.randn(3, 3, 32, 32)
    ids = clip_ids(3) if kind is CLIPModel else torch.randint(0, 300, (3, 64))
    expected = theirs(ids, pixels, output_hidden_states=True, output_attentions=True)
    image = image_output(ours.visual, pixels, hidden_states=True, attentions=True)
    text = text_output(ours.text_tower, ids, hidden_states=True, attentions=True)
    assert_states(text.hidden_states, expected.text_model_output.hidden_states)
    assert_states(text.attentions, expected.text_model_output.attentions)
    assert_states(image.hidden_states, expected.vision_model_output.hidden_states)
    assert_states(image.attentions, expected.vision_model_output.attentions)
    if kind is CLIPModel:  # ours is normed for SigLIP
        assert_states([image.last_hidden_state], [expected.vision_model_output.last_hidden_state])
    assert_states([text.last_hidden_state], [expected.text_model_output.last_hidden_state])
    assert_states([image.pooler_output], [expected.vision_model_output.pooler_output])


def test_nothing_more_than_asked():
    model = build_clip({"embed_dim": 8, "vision_cfg": MODIFIED_RESNET, "text_cfg": TEXT}).eval()
    output = image_output(model.visual, torch.randn(2, 3, 64, 64))
    assert output.hidden_states is None and output.attentions is None
    assert output.pooler_output.shape == (2, 8) and output.last_hidden_state.shape == (2, 4, 256)
    stages = image_output(model.visual, torch.randn(2, 3, 64, 64), hidden_states=True).hidden_states
    assert [tuple(s.shape) for s in stages] == [(2, 256, 8), (2, 256, 32), (2, 64, 64), (2, 16, 128), (2, 4, 256)]


def test_losses_by_a_loop():
    logits = 5 * torch.randn(4, 4, dtype=torch.float64)
    clip, sigmoid = 0.0, 0.0
    for i in range(4):
        clip -= (logits[i, i] - logits[i].logsumexp(0)).item() / 8
        clip -= (logits[i, i] - logits[:, i].logsumexp(0)).item() / 8
        sigmoid -= sum(F.logsigmoid(logits[i, j] if i == j else -logits[i, j]).item() for j in range(4)) / 4
    assert contrastive_loss(logits, sigmoid=False).item() == pytest.approx(clip, rel=1e-5)
    assert contrastive_loss(logits, sigmoid=True).item() == pytest.approx(sigmoid, rel=1e-5)
