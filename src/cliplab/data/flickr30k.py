"""Flickr30k (Young et al., 2014) and Flickr8k (Hodosh et al., 2013), in Karpathy's splits."""

from typing import ClassVar

from cliplab.data.caption_files import Patterns, patterns_of
from cliplab.data.karpathy import Karpathy

_SPLITS = ("train", "val", "test")


class Flickr30k(Karpathy):
    """dataset_flickr30k.json, BLIP's flickr30k_{train,val,test}.json or flickr30k_test_karpathy.txt, and the pictures.

    29,000 images to train, 1,014 val, 1,000 test, five captions each. The Flickr30k Entities split is another one.
    """

    benchmark_name = "flickr30k"
    patterns: ClassVar[Patterns] = patterns_of("flickr30k") | {
        "BLIP's lists": tuple(f"flickr30k_{split}.json" for split in _SPLITS)
    }


class Flickr8k(Karpathy):
    """dataset_flickr8k.json and the pictures: 6,000 images to train, 1,000 val, 1,000 test, five captions each."""

    benchmark_name = "flickr8k"
    patterns: ClassVar[Patterns] = patterns_of("flickr8k")
