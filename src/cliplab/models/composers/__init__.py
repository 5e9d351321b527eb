"""Composers by name. To add one: its file in this folder, its line below."""

from cliplab.models.composers.artemis import Artemis
from cliplab.models.composers.baselines import ImageOnly, TextOnly
from cliplab.models.composers.combiner import Combiner
from cliplab.models.composers.composer import Composer, Pair
from cliplab.models.composers.sum import Sum
from cliplab.models.composers.tirg import TIRG

__all__ = ["COMPOSERS", "Composer", "ImageOnly", "Pair", "TextOnly"]

COMPOSERS: dict[str, type[Composer]] = {
    "image_only": ImageOnly,
    "text_only": TextOnly,
    "sum": Sum,
    "combiner": Combiner,
    "tirg": TIRG,
    "artemis": Artemis,
}
