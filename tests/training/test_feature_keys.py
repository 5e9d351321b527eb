import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cliplab.data.images import ImageTransform, Preprocess
from cliplab.errors import UserError
from cliplab.models.clip import CLIP, CustomTextCLIP
from cliplab.training.feature_keys import (
    identity,
    tokenizer_settings,
    tower_settings,
    tower_tensors,
    transform_settings,
    weights_hash,
)
from tests.models.test_composed import TEXT, VISION

RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
def test_the_towers_share_no_tensor_and_leave_out_the_scale_alone(kind):
    clip = kind(12, VISION, TEXT)
    image, text = tower_tensors(clip, "image"), tower_tensors(clip, "text")
    assert image and text and not image.keys() & text.keys()
    assert clip.state_dict().keys() - image.keys() - text.keys() == {"logit_scale"}


def test_the_statistics_of_batch_norms_count():
    clip = CLIP(12, RESNET, TEXT)
    before = weights_hash(tower_tensors(clip, "image"))
    clip.visual.bn1.running_mean[0] = 1.0
    assert weights_hash(tower_tensors(clip, "image")) != before


@pytest.mark.parametrize(
    "other",
    [{"a": torch.zeros(3)}, {"b": torch.zeros(2)}, {"a": torch.zeros(2).half()}, {"a": torch.tensor([0.0, 1e-30])}],
)
def test_name_shape_precision_and_every_bit_count(other: dict[str, Tensor]):
    assert weights_hash({"a": torch.zeros(2)}) == weights_hash({"a": torch.zeros(2)}) != weights_hash(other)


def test_the_architecture_counts_where_the_weights_are_equal():
    torch.manual_seed(0)
    plain = CLIP(12, VISION, TEXT)
    quick = CLIP(12, VISION, TEXT, quick_gelu=True)
    quick.load_state_dict(plain.state_dict())
    for modality in ("image", "text"):
        assert tower_settings(plain, modality)["weights"] == tower_settings(quick, modality)["weights"]
        assert tower_settings(plain, modality) != tower_settings(quick, modality)


@pytest.mark.parametrize(
    "other",
    [
        ImageTransform(Preprocess(size=32)),
        ImageTransform(Preprocess(interpolation="bilinear")),
        ImageTransform(Preprocess(resize_mode="squash")),
        ImageTransform(Preprocess(crop_rounding="floor")),
        ImageTransform(Preprocess(mean=(0.5, 0.5, 0.5))),
        ImageTransform(Preprocess(), pad="target"),
        ImageTransform(Preprocess(), backend="fast"),
    ],
)
def test_whatever_changes_the_pixels_counts(other: ImageTransform):
    assert transform_settings(ImageTransform(Preprocess())) != transform_settings(other)


def test_random_crops_of_training_change_no_evaluation():
    random = ImageTransform(Preprocess(), crop_scale=0.5, flip=True)
    assert transform_settings(random) == transform_settings(ImageTransform(Preprocess()))


def test_tokenizers_are_told_apart_by_what_they_give():
    def lengths(text: str) -> Tensor:
        return torch.tensor([len(text)])

    assert tokenizer_settings(lengths) == tokenizer_settings(lambda text: torch.tensor([len(text)]))
    assert tokenizer_settings(lengths) != tokenizer_settings(lambda text: torch.tensor([len(text.strip())]))


def test_a_picture_is_its_path_size_and_time(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(b"12")
    os.utime(path, ns=(5, 5))
    first = identity("image", str(path))
    assert len(first) == 16 and identity("image", str(tmp_path / "." / "a.png")) == first
    os.utime(path, ns=(5, 6))
    later = identity("image", str(path))
    path.write_bytes(b"123")
    os.utime(path, ns=(5, 6))
    assert len({first, later, identity("image", str(path))}) == 3
    with pytest.raises(UserError, match=r"no\.png"):
        identity("image", str(tmp_path / "no.png"))


def test_a_text_is_every_character_of_it():
    assert len({identity("text", text) for text in ("red", "Red", "red ", "réd", "")}) == 5
