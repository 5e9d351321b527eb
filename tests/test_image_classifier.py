import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPForImageClassification, CLIPModel

import cliplab
from cliplab import ImageClassifier, UserError
from tests.hugging_face import make_model, saved
from tests.oracles import MODIFIED_RESNET


@pytest.fixture(scope="module")
def theirs():
    return make_model(CLIPForImageClassification)


def test_equals_transformers_with_its_classifier(theirs, tmp_path):
    ours = ImageClassifier.from_pretrained(saved(theirs, tmp_path))
    pixels, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 4, 2, 2, 1, 3])
    found, expected = ours(pixels, labels), theirs(pixels, labels=labels)
    assert (found.logits - expected.logits).abs().max() <= 1e-5
    assert (found.loss - expected.loss).abs() <= 1e-5
    assert ours(pixels).loss is None


def test_gradients_reach_the_tower(theirs, tmp_path):
    ours = ImageClassifier.from_pretrained(saved(theirs, tmp_path))
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 4, 2, 2])
    theirs.zero_grad()
    ours(pixels, labels).loss.backward()
    theirs(pixels, labels=labels).loss.backward()
    expected = theirs.vision_model.embeddings.patch_embedding.weight.grad
    assert (ours.visual.conv1.weight.grad - expected).norm() <= 1e-4 * expected.norm()


def test_a_new_classifier_on_a_dual_encoder(tmp_path):
    folder = saved(make_model(CLIPModel), tmp_path)
    with pytest.raises(UserError, match="give num_labels"):
        ImageClassifier.from_pretrained(folder)
    with pytest.raises(UserError, match="1 or more"):
        ImageClassifier.from_pretrained(folder, num_labels=0)
    model = ImageClassifier.from_pretrained(folder, num_labels=7)
    tower = cliplab.load_tower(folder, tower="image", projection=False).model
    pixels = torch.randn(2, 3, 32, 32)
    tokens = tower.forward_intermediates(pixels, 1, intermediates_only=True, output_fmt="NLC")
    expected = F.linear(tokens["image_intermediates"][0].mean(1), model.classifier.weight, model.classifier.bias)
    torch.testing.assert_close(model(pixels).logits, expected)


def test_several_labels_each(theirs, tmp_path):
    ours = ImageClassifier.from_pretrained(saved(theirs, tmp_path))
    pixels, labels = torch.randn(2, 3, 32, 32), torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 0, 0]])
    p = ours(pixels).logits.sigmoid()
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    torch.testing.assert_close(ours(pixels, labels).loss, expected)


def test_any_tower():
    from cliplab.models.modified_resnet import ModifiedResNet

    model = ImageClassifier(ModifiedResNet(MODIFIED_RESNET, 8), 3).eval()
    pixels = torch.randn(2, 3, 64, 64)
    tokens = model.visual.forward_with_tokens(pixels)[1]
    torch.testing.assert_close(model(pixels).logits, model.classifier(tokens.mean(1)))
