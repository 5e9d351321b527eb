"""Data sets, their images and their loaders. To add a data set: one file with a RetrievalDataset, one line here."""

from importlib import import_module
from typing import Any

from cliplab.data.circo import CIRCO
from cliplab.data.cirr import CIRR
from cliplab.data.coco import COCO
from cliplab.data.fashioniq import FashionIQ
from cliplab.data.flickr30k import Flickr8k, Flickr30k
from cliplab.data.image_folder import ImageFolderDataset
from cliplab.data.karpathy import Karpathy
from cliplab.data.triplets import Triplets
from cliplab.data.wardrobe import Wardrobe, WardrobeCaptions

DATASETS = {
    "fashioniq": FashionIQ,
    "cirr": CIRR,
    "circo": CIRCO,
    "wardrobe": Wardrobe,
    "wardrobe_captions": WardrobeCaptions,
    "coco": COCO,
    "flickr30k": Flickr30k,
    "flickr8k": Flickr8k,
    "karpathy": Karpathy,
    "triplets": Triplets,
    "image_folder": ImageFolderDataset,
}

_MODULES = (
    "RetrievalDataModule",
    "FashionIQDataModule",
    "CIRRDataModule",
    "CIRCODataModule",
    "KarpathyDataModule",
    "COCODataModule",
    "Flickr30kDataModule",
)


def __getattr__(name: str) -> Any:
    # The data modules import lightning, which takes seconds: a message about missing files must not wait for it.
    if name in _MODULES:
        return getattr(import_module("cliplab.data.datamodule"), name)
    raise AttributeError(name)
