"""COCO captions (Lin et al., 2014; Chen et al., 2015), in Karpathy's splits or in the official ones."""

from typing import ClassVar

from cliplab.data.caption_files import OFFICIAL, Patterns, patterns_of
from cliplab.data.karpathy import Karpathy


class COCO(Karpathy):
    """dataset_coco.json, captions_val2017.json, coco_karpathy_*.json or coco_test_karpathy.json, and the pictures.

    Karpathy's splits: 113,287 images to train (82,783 train, 30,504 restval), 5,000 val, 5,000 test. All captions of an
    image count, 25,010 in test; `captions_per_image=5` in the protocol takes the first five, 25,000.
    """

    benchmark_name = "coco"
    patterns: ClassVar[Patterns] = patterns_of("coco") | OFFICIAL
