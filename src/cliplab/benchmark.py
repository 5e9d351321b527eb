"""Benchmark and Protocol: who asks, among what, what counts. Plain data; nothing here knows a model.

Protocols are rows of one table. Definitions and the code they were read from: README, "Protocols".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from cliplab.errors import UserError
from cliplab.registry import check_part

if TYPE_CHECKING:
    from datasets import Dataset

Gallery = Literal["original_split", "val_split", "all"]
ClassJoin = Literal["imagenet_templates", "cifar_templates", "class_name"]  # the wordings of a class: data/templates.py
CaptionJoin = Literal[
    "and_cap",
    "both_orders_mean",
    "star_reversed",
    "and_precaption",
    "comma_and",
    "both_orders_separate",
    "each_caption",
    "category_it",
    "caption",
    "precaption",
    "shared_concept",
    ClassJoin,
]
TrainJoin = Literal[
    "random4_cap",
    "and_precaption",
    "both_orders_separate",
    "each_caption",
    "category_it",
    "random1",
    "caption",
    "precaption",
]


@dataclass(frozen=True)
class Protocol:
    """Everything that has to be fixed before a retrieval number means anything."""

    name: str = "custom"
    gallery: Gallery = (
        "original_split"  # all images of the split | references and targets of its captions | all categories
    )
    exclude_reference: bool = False  # drop the query's own reference image from its ranking
    caption_join: CaptionJoin = "and_cap"  # how the captions of a record become query text at evaluation
    train_join: TrainJoin = "random4_cap"  # the same in training
    query_unit: Literal["record", "order", "caption"] = "record"  # one query per record | caption order | caption
    prompt: str = "{}"  # around the joined caption
    ties: Literal["pessimistic", "optimistic", "mean"] = "pessimistic"  # rank of a target among equal scores
    missing_images: Literal["error", "report"] = "error"  # stop | leave out, count and write down
    recall_at: tuple[int, ...] = (10, 50)
    map_at: tuple[int, ...] = ()  # cut-offs of the mean average precision over all relevant images (CIRCO)
    subset_at: tuple[int, ...] = ()  # cut-offs of the recall within a subset of look-alikes (CIRR)
    target: Literal["hard", "soft"] = "hard"  # one target | the best grade within the top k (CIRR)
    captions_per_image: int | None = (
        None  # of captioned images the first n are ranked; null = all (COCO: 25,010, not 25,000)
    )
    hit: Literal["single_target", "any_positive", "class"] = "single_target"

    def as_dict(self) -> dict[str, Any]:
        """Plain builtins, for results.json."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


_AND_CAP = Protocol()
_PSEUDO_WORD = replace(_AND_CAP, caption_join="both_orders_mean", prompt="a photo of $ that {}")
_CAPTIONS = Protocol(
    caption_join="each_caption",
    train_join="random1",
    query_unit="caption",
    hit="any_positive",
    recall_at=(1, 5, 10),
)
_CLASSES = Protocol(train_join="random1", hit="class", recall_at=(1, 5))  # R@1 and R@5 are top-1 and top-5 accuracy

PROTOCOLS: dict[str, Protocol] = {
    "clip4cir": _AND_CAP,
    "bi_blip4cir": _AND_CAP,
    "candidate_reranking": _AND_CAP,
    "sprc": _AND_CAP,
    "searle": _PSEUDO_WORD,
    "lincir": _PSEUDO_WORD,
    "pic2word": replace(_AND_CAP, caption_join="star_reversed"),
    "bge_vl": replace(_AND_CAP, caption_join="comma_and"),
    "covr": replace(_AND_CAP, exclude_reference=True, caption_join="and_precaption", train_join="and_precaption"),
    "artemis": replace(
        _AND_CAP,
        exclude_reference=True,
        caption_join="both_orders_separate",
        train_join="both_orders_separate",
        query_unit="order",
    ),
    "val": replace(
        _AND_CAP,
        gallery="val_split",
        exclude_reference=True,
        caption_join="each_caption",
        train_join="each_caption",
        query_unit="caption",
        recall_at=(1, 10, 50),
    ),
    "composeae": replace(_AND_CAP, gallery="all", caption_join="category_it", train_join="category_it"),
    "clip_benchmark": _CAPTIONS,
    "zero_shot_imagenet": replace(_CLASSES, caption_join="imagenet_templates"),
    "zero_shot_cifar": replace(_CLASSES, caption_join="cifar_templates"),
    "zero_shot_plain": replace(_CLASSES, caption_join="class_name", prompt="a photo of a {}."),
}

_CIRR = Protocol(
    exclude_reference=True, caption_join="caption", train_join="caption", recall_at=(1, 5, 10, 50), subset_at=(1, 2, 3)
)
_CIRR_WORD = replace(_CIRR, prompt="a photo of $ that {}")
CIRR_PROTOCOLS: dict[str, Protocol] = {
    **dict.fromkeys(("clip4cir", "bi_blip4cir", "candidate_reranking", "sprc"), _CIRR),
    **dict.fromkeys(("searle", "lincir"), _CIRR_WORD),
    "pic2word": replace(_CIRR, exclude_reference=False, prompt="a photo of * , {}"),  # its own removal has no effect
    "covr": replace(_CIRR, caption_join="precaption", train_join="precaption"),
    **dict.fromkeys(("cirplant", "artemis"), replace(_CIRR, target="soft")),
}

_CIRCO = Protocol(
    caption_join="caption",
    train_join="caption",
    prompt="a photo of $ that {}",
    recall_at=(5, 10, 25, 50),
    map_at=(5, 10, 25, 50),
)
CIRCO_PROTOCOLS: dict[str, Protocol] = {
    **dict.fromkeys(("searle", "lincir"), _CIRCO),
    "bge_vl": replace(_CIRCO, caption_join="shared_concept", prompt="{}"),
    "covr": replace(_CIRCO, exclude_reference=True, caption_join="precaption", prompt="{}"),
    "plain": replace(_CIRCO, prompt="{}"),
}

_TRIPLETS = Protocol(caption_join="each_caption", train_join="random1", query_unit="caption", recall_at=(1, 5, 10, 50))
TRIPLETS_PROTOCOLS: dict[str, Protocol] = {
    "plain": _TRIPLETS,
    "each_caption": replace(_TRIPLETS, train_join="each_caption"),
}


MOST = 2**31 - 1  # of ranks and captions: no gallery is larger, and tensors hold it
FIELDS = tuple(item.name for item in fields(Protocol) if item.name not in ("name", "hit"))


def make_protocol(
    part: Mapping[str, Any],
    table: Mapping[str, Protocol] = PROTOCOLS,
    effective: Collection[str] = FIELDS,
    dataset: str = "any",
) -> Protocol:
    """`{name: clip4cir, gallery: val_split}` -> the named protocol with fields changed; its name then says which.

    The same name means another row in the table of another data set. Raises UserError for an unknown name, field or
    value, each with the closest match, and for a change to a field that is not `effective` on the data set: the name
    would tell of a difference that no number shows.
    """
    check_part("protocol", dict.fromkeys(table, Protocol), part, given=("hit",))  # what a hit is, the data set says
    name = part["name"]
    base = replace(table[name], name=name)
    changes = {key: tuple(value) if isinstance(value, list) else value for key, value in part.items() if key != "name"}
    differing = {key: value for key, value in changes.items() if getattr(base, key) != value}
    if not differing:
        return base
    idle = [key for key in differing if key not in effective]
    if idle:
        raise UserError(
            f"protocol '{name}': {idle[0]}={part[idle[0]]} changes nothing on the data set {dataset}; fields that do: "
            f"{', '.join(effective)}"
        )
    for key in ("recall_at", "map_at", "subset_at"):
        ranks = differing.get(key, (1,))
        if not all(1 <= k <= MOST for k in ranks) or (not ranks and key == "recall_at"):
            raise UserError(f"protocol '{name}': {key} must name ranks from 1 to {MOST}, got {part[key]}")
    per_image = part.get("captions_per_image")
    if per_image is not None and not 1 <= per_image <= MOST:
        raise UserError(f"protocol '{name}': captions_per_image must be from 1 to {MOST}, got {per_image}")
    if re.findall(r"\{.*?\}|[{}]", str(differing.get("prompt", "{}"))) != ["{}"]:
        raise UserError(f"protocol '{name}': prompt must hold {{}} once, where the text goes, got '{part['prompt']}'")
    join = differing.get("caption_join", base.caption_join)
    if (join in get_args(ClassJoin)) != (base.hit == "class"):
        fitting = [name for name, row in table.items() if row.caption_join == join]
        raise UserError(f"protocol '{name}' can't have caption_join={join}; it belongs to: {', '.join(fitting)}")
    _check_fits_table(name, differing, table)
    shown = ", ".join(f"{key}={value}" for key, value in sorted(differing.items()))
    return replace(base, **differing, name=f"{name} ({shown})")


def _check_fits_table(name: str, differing: Mapping[str, Any], table: Mapping[str, Protocol]) -> None:
    """Raise UserError for what no protocol of this data set has: joins of other records."""
    for key in ("caption_join", "train_join") if table is not PROTOCOLS else ():
        known = sorted({getattr(row, key) for row in table.values()})
        if key in differing and differing[key] not in known:
            hint = f"this data set has: {', '.join(known)}"
            raise UserError(f"protocol '{name}' can't have {key}={differing[key]}; {hint}")


@dataclass(frozen=True)
class Benchmark:
    """Queries, a gallery and the truth between them.

    Ids are rows: `row_id` of `queries`, `target_id` and `reference_id` of `gallery`. A query that is asked in several
    wordings is several rows with one `query_id`; the evaluation averages their unit embeddings and ranks once. So it
    does with the wordings of a target, which `wording_of` tells: ids of the gallery then are targets, not rows.
    """

    name: str  # prefix of its metrics: dress, t2i
    protocol: Protocol
    queries: (
        Dataset  # columns query_id, reference_id (-1 = none in the gallery), image (path or None), text (str or None)
    )
    gallery: Dataset  # columns id, image (path or None), text (str or None)
    positives: list[list[int]]  # by query_id: rows of the gallery that are hits
    query_names: list[str]  # by query_id: what to print
    transpose: Benchmark | None = None  # the same embeddings asked the other way round (t2i -> i2t)
    excluded: Mapping[str, int] = field(default_factory=dict)  # what a `report` policy left out, counted
    wording_of: list[int] | None = None  # by gallery row: the target it words; null = each row is a target
    relevant: list[list[int]] | None = None  # by query_id: rows that count for mAP; null = the positives
    subsets: list[list[int]] | None = None  # by query_id: rows that a subset recall is restricted to
    gains: list[dict[int, float]] | None = None  # by query_id: soft targets; R@K then is the best gain within the top K
    blind: bool = False  # the targets are known to a test server alone: predictions and no metrics
    groups: dict[str, list[int]] | None = None  # aspect -> query_ids, for mAP@10/ASPECT

    @property
    def directions(self) -> tuple[Benchmark, ...]:
        """This benchmark and, if there is one, its transpose."""
        return (self,) if self.transpose is None else (self, self.transpose)

    def references(self) -> list[int]:
        """By query_id: the gallery row of the query's reference image, -1 where there is none."""
        rows = [-1] * len(self.positives)
        for query_id, reference_id in zip(self.queries["query_id"], self.queries["reference_id"], strict=True):
            rows[query_id] = reference_id
        return rows


def metric_names(recall_at: Sequence[int], subset_at: Sequence[int] = (), map_at: Sequence[int] = ()) -> list[str]:
    """What a protocol reports per benchmark, besides averages; evaluation.metrics averages it over benchmarks."""
    return [f"{name}@{k}" for name, at in (("R", recall_at), ("Rsubset", subset_at), ("mAP", map_at)) for k in at]
