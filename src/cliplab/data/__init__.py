"""Data sets, their images and their loaders. To add a data set: one file with a RetrievalDataset, one line here."""

from importlib import import_module
from typing import Any

from cliplab.data.circo import CIRCO
from cliplab.data.cirr import CIRR
from cliplab.data.fashioniq import FashionIQ
from cliplab.data.image_folder import ImageFolderDataset
from cliplab.data.karpathy import Flickr8k, Karpathy
from cliplab.data.wardrobe import Wardrobe, WardrobeCaptions

DATASETS = {
    "fashioniq": FashionIQ,
    "cirr": CIRR,
    "circo": CIRCO,
    "wardrobe": Wardrobe,
    "wardrobe_captions": WardrobeCaptions,
    "karpathy": Karpathy,
    "flickr8k": Flickr8k,
    "image_folder": ImageFolderDataset,
}

_MODULES = ("RetrievalDataModule", "FashionIQDataModule", "KarpathyDataModule")


def __getattr__(name: str) -> Any:
    # The data modules import lightning, which takes seconds: a message about missing files must not wait for it.
    if name in _MODULES:
        return getattr(import_module("cliplab.data.datamodule"), name)
    raise AttributeError(name)
