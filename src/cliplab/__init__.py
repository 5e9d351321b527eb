"""cliplab: a laboratory for retrieval research with CLIP.

Words, one per concept, everywhere (config key = class = file = metric prefix): reference (query image), text (caption
or modification), query (what is asked), target (what is to be found), gallery (what is ranked), composer (reference +
text -> query), image encoder and text encoder (the towers), benchmark (queries, gallery, truth), protocol (how it is
measured), run (one training with its folder), sweep (many runs), table.

Shapes: B batch, L tokens, N patches, W width, D embedding, Q queries, G gallery. Scores are named by axes: scores_qg.
Recalls are in percent. Importing cliplab imports nothing heavy: the names below are loaded when they are used.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "load": "cliplab.pretrained",
    "load_tower": "cliplab.pretrained",
    "save": "cliplab.pretrained",
    "supported_architectures": "cliplab.pretrained",
    "available_models": "cliplab.pretrained",
    "tokenize": "cliplab.tokenizer",
    "Encoder": "cliplab.encoder",
    "ImageClassifier": "cliplab.image_classifier",
    "CLIP": "cliplab.models.clip",
    "CustomTextCLIP": "cliplab.models.clip",
    "CLIPTextCfg": "cliplab.models.tower_cfg",
    "CLIPVisionCfg": "cliplab.models.tower_cfg",
    "ComposedRetriever": "cliplab.models.composed",
    "Composer": "cliplab.models.composers.composer",
    "Benchmark": "cliplab.benchmark",
    "Protocol": "cliplab.benchmark",
    "RetrievalDataModule": "cliplab.data.datamodule",
    "FashionIQDataModule": "cliplab.data.datamodule",
    "CIRRDataModule": "cliplab.data.datamodule",
    "CIRCODataModule": "cliplab.data.datamodule",
    "KarpathyDataModule": "cliplab.data.datamodule",
    "COCODataModule": "cliplab.data.datamodule",
    "Flickr30kDataModule": "cliplab.data.datamodule",
    "RetrievalModule": "cliplab.training.module",
    "RetrievalMetric": "cliplab.evaluation.metrics",
    "zero_shot_weights": "cliplab.evaluation.zero_shot",
    "linear_probe": "cliplab.evaluation.linear_probe",
    "rank_positives": "cliplab.evaluation.ranking",
    "info_nce": "cliplab.losses.info_nce",
    "Tokenizer": "cliplab.tokenizer",
    "UserError": "cliplab.errors",
    "load_config": "cliplab.config",
}
__all__ = list(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'cliplab' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *_NAMES]
