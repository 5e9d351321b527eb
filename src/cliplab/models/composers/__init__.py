"""Composers by name. To add one: its file in this folder, its line below."""

from cliplab.models.composers.artemis import Artemis
from cliplab.models.composers.baselines import ImageOnly, TextOnly
from cliplab.models.composers.bidirectional import Bidirectional
from cliplab.models.composers.combiner import Combiner
from cliplab.models.composers.composer import Composer, Pair
from cliplab.models.composers.concat import Concat
from cliplab.models.composers.cross_attention import CrossAttention
from cliplab.models.composers.film import FiLM
from cliplab.models.composers.lincir import LinCIR
from cliplab.models.composers.pic2word import Pic2Word
from cliplab.models.composers.slerp import Slerp
from cliplab.models.composers.sum import Sum
from cliplab.models.composers.tirg import TIRG
from cliplab.models.composers.weighted_sum import WeightedSum

__all__ = ["COMPOSERS", "Composer", "ImageOnly", "Pair", "TextOnly"]

COMPOSERS: dict[str, type[Composer]] = {
    "image_only": ImageOnly,
    "text_only": TextOnly,
    "sum": Sum,
    "weighted_sum": WeightedSum,
    "slerp": Slerp,
    "concat": Concat,
    "film": FiLM,
    "combiner": Combiner,
    "tirg": TIRG,
    "artemis": Artemis,
    "cross_attention": CrossAttention,
    "bidirectional": Bidirectional,
    "pic2word": Pic2Word,
    "lincir": LinCIR,
}
