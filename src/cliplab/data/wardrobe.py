"""The wardrobe: a small rendered data set in the layouts of FashionIQ and of Karpathy's captions.

ROOT/captions/cap.{dress,shirt,toptee}.{train,val,test}.json         the test files name no target
ROOT/image_splits/split.{dress,shirt,toptee}.{train,val,test}.json
ROOT/images/ID.png
ROOT/dataset_wardrobe.json     captions of the train and val images, five each; half of the val images are its test
ROOT/attributes.json           the garment of every image, by id
ROOT/wardrobe.json             the specification it was rendered from
"""

import errno
import itertools
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cliplab.data.dataset import read_json
from cliplab.data.fashioniq import SPLITS, FashionIQ
from cliplab.data.garment_words import describe_change, describe_garment
from cliplab.data.garments import ATTRIBUTES, CATEGORIES, Garment, all_garments, draw
from cliplab.data.karpathy import Karpathy
from cliplab.errors import UserError

Gallery = dict[str, Garment]  # by image id

_FORMAT = 1  # raise it when the same specification gives other bytes
_CAPTIONS_PER_IMAGE = 5
_SINGLE_CHANGE_SHARE = 0.25


@dataclass(frozen=True)
class WardrobeSpec:
    """What to render; the numbers of images and triplets are per category."""

    seed: int = 0
    image_size: int = 64
    train_images: int = 1500
    val_images: int = 480
    test_images: int = 120
    train_triplets: int = 2500
    val_triplets: int = 400
    test_triplets: int = 60

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be rendered."""
        distinct = len(all_garments(CATEGORIES[0]))
        for split in ("val", "test"):
            images, triplets = self.images(split), self.triplets(split)
            if not triplets <= images <= distinct:
                raise UserError(
                    f"{split}_images={images}, {split}_triplets={triplets}: each garment and each target of {split} "
                    f"occurs once, so triplets <= images <= {distinct} is needed"
                )

    def images(self, split: str) -> int:
        """Images of one category in a split."""
        return getattr(self, f"{split}_images")

    def triplets(self, split: str) -> int:
        """Triplets of one category in a split."""
        return getattr(self, f"{split}_triplets")


DEFAULT_SPEC = WardrobeSpec()


class Wardrobe(FashionIQ):
    """Composed retrieval among the rendered garments; rendered on first use."""

    benchmark_name = "wardrobe"

    def prepare(self) -> None:
        """Render the default wardrobe unless there is one of any specification."""
        _render_first(self.root)


class WardrobeCaptions(Karpathy):
    """Caption retrieval among the rendered garments; rendered on first use."""

    benchmark_name = "wardrobe_captions"

    def prepare(self) -> None:
        """Render the default wardrobe unless there is one of any specification."""
        _render_first(self.root)


def render_wardrobe(root: Path, spec: WardrobeSpec = DEFAULT_SPEC) -> None:
    """Render the data set into root unless it is already there; equal specifications give equal bytes.

    The folder appears complete or not at all, so several processes may render the same root at once.
    Raises UserError where root holds anything else than this wardrobe.
    """
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file: the wardrobe needs a folder (data.root)")
    if root.exists() and any(root.iterdir()):
        _require_same(root, spec)
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        made = Path(scratch) / root.name
        _write(made, spec)
        try:
            made.rename(root)
        except OSError as error:
            # Another process was first: its copy stays, ours goes with the scratch folder.
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            _require_same(root, spec)


def _manifest(spec: WardrobeSpec) -> dict[str, int]:
    return {"format": _FORMAT, **asdict(spec)}


def _found(root: Path) -> dict[str, int]:
    """The manifest of what root holds; empty unless it is a wardrobe."""
    path = root / "wardrobe.json"
    return read_json(path) if path.is_file() else {}


def _render_first(root: Path) -> None:
    if _found(root).get("format") != _FORMAT:
        render_wardrobe(root)


def _require_same(root: Path, spec: WardrobeSpec) -> None:
    if _found(root) != _manifest(spec):
        held = f"the wardrobe {_found(root)}" if _found(root) else "something else"
        raise UserError(
            f"{root} should hold the wardrobe {_manifest(spec)} but holds {held}: remove it or name another folder"
        )


def _write(folder: Path, spec: WardrobeSpec) -> None:
    galleries = _sample_galleries(spec)
    for name in ("captions", "image_splits", "images"):
        (folder / name).mkdir(parents=True)
    for number, (split, category) in enumerate(galleries):
        gallery = galleries[split, category]
        rng = np.random.default_rng((spec.seed, 1, number))
        pairs = sample_pairs(gallery, spec.triplets(split), rng, unique_targets=split != "train")
        _dump(folder / f"image_splits/split.{category}.{split}.json", list(gallery))
        _dump(folder / f"captions/cap.{category}.{split}.json", list(_records(gallery, pairs, split, rng)))
    garments = {name: garment for gallery in galleries.values() for name, garment in gallery.items()}
    for number, (name, garment) in enumerate(garments.items()):
        # A generator of its own: no picture depends on how many came before it.
        picture = draw(garment, spec.image_size, np.random.default_rng((spec.seed, 2, number)))
        picture.save(folder / f"images/{name}.png", compress_level=1)
    _dump(folder / "dataset_wardrobe.json", _karpathy(galleries, np.random.default_rng((spec.seed, 3))))
    _dump(folder / "attributes.json", {name: asdict(garment) for name, garment in garments.items()})
    _dump(folder / "wardrobe.json", _manifest(spec))


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n")


def _sample_galleries(spec: WardrobeSpec) -> dict[tuple[str, str], Gallery]:
    """Garments by (split, category); only train may hold a garment twice."""
    rng = np.random.default_rng((spec.seed, 0))
    names = (f"WD0{number:07d}" for number in itertools.count())
    galleries = {}
    for split, category in itertools.product(SPLITS, CATEGORIES):
        world = all_garments(category)
        rows = rng.choice(len(world), spec.images(split), replace=split == "train")
        galleries[split, category] = {next(names): world[row] for row in rows}
    return galleries


def sample_pairs(
    gallery: Gallery, count: int, rng: np.random.Generator, *, unique_targets: bool
) -> list[tuple[str, str]]:
    """Distinct (reference, target) ids that differ in one attribute (a quarter) or two, attributes equally often.

    A gallery too small for the wanted changes gets others, of one or two attributes all the same. Raises UserError
    where even those run out.
    """
    names_of = defaultdict(list)
    for name, garment in gallery.items():
        names_of[garment].append(name)
    targets, pairs = list(gallery), {}  # a dict, because a set has no order
    for wanted in _change_sets(count, rng):
        found = _find_pair(gallery, names_of, targets, pairs, wanted, rng)
        if found is None:
            raise UserError(
                f"only {len(pairs)} of {count} triplets could be formed among {len(gallery)} images of a category: "
                "ask for fewer triplets or more images"
            )
        pairs[found] = None
        if unique_targets:
            targets.remove(found[1])
    return list(pairs)


_CHANGE_SETS = [changed for size in (1, 2) for changed in itertools.combinations(ATTRIBUTES, size)]


def _change_sets(count: int, rng: np.random.Generator) -> list[tuple[str, ...]]:
    """The attributes to change in each of count pairs."""
    singles = round(count * _SINGLE_CHANGE_SHARE)
    wanted = []
    for size, number in ((1, singles), (2, count - singles)):
        sets = [changed for changed in _CHANGE_SETS if len(changed) == size]
        wanted += [sets[k % len(sets)] for k in range(number)]
    return [wanted[k] for k in rng.permutation(count)]


def _find_pair(
    gallery: Gallery,
    names_of: dict[Garment, list[str]],
    targets: list[str],
    taken: dict[tuple[str, str], None],
    wanted: tuple[str, ...],
    rng: np.random.Generator,
) -> tuple[str, str] | None:
    """A random new pair that differs in the wanted attributes, else in as many others, else in one or two."""
    sets = [wanted] + [_CHANGE_SETS[k] for k in rng.permutation(len(_CHANGE_SETS))]
    for changed in sorted(sets, key=lambda names: len(names) != len(wanted)):
        for target in (targets[k] for k in rng.permutation(len(targets))):
            similar = [name for other in _variants(gallery[target], changed) for name in names_of.get(other, ())]
            references = [name for name in similar if (name, target) not in taken]
            if references:
                return references[int(rng.integers(len(references)))], target
    return None


def _variants(garment: Garment, changed: tuple[str, ...]) -> Iterator[Garment]:
    """All garments that differ in exactly these attributes."""
    values = [[value for value in ATTRIBUTES[name] if value != getattr(garment, name)] for name in changed]
    for choice in itertools.product(*values):
        yield replace(garment, **dict(zip(changed, choice, strict=True)))


def _records(
    gallery: Gallery, pairs: list[tuple[str, str]], split: str, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Annotations of one category as FashionIQ has them."""
    for reference, target in pairs:
        captions = list(describe_change(gallery[reference], gallery[target], rng))
        hidden = {} if split == "test" else {"target": target}
        yield {**hidden, "candidate": reference, "captions": captions}


def _karpathy(galleries: dict[tuple[str, str], Gallery], rng: np.random.Generator) -> dict[str, Any]:
    """Five captions of every train and val image; the second half of each val gallery is the test split."""
    images = []
    for (split, _), gallery in galleries.items():
        if split == "test":
            continue
        for position, (name, garment) in enumerate(gallery.items()):
            part = "test" if split == "val" and position >= len(gallery) / 2 else split
            images.append(_karpathy_image(len(images), name, garment, part, rng))
    return {"images": images, "dataset": "wardrobe"}


def _karpathy_image(imgid: int, name: str, garment: Garment, split: str, rng: np.random.Generator) -> dict[str, Any]:
    captions: dict[str, None] = {}
    while len(captions) < _CAPTIONS_PER_IMAGE:
        captions[describe_garment(garment, rng)] = None
    sentids = range(imgid * _CAPTIONS_PER_IMAGE, (imgid + 1) * _CAPTIONS_PER_IMAGE)
    sentences = [
        {"tokens": re.findall(r"[a-z]+", raw), "raw": raw, "imgid": imgid, "sentid": sentid}
        for raw, sentid in zip(captions, sentids, strict=True)
    ]
    return {
        "sentids": list(sentids),
        "imgid": imgid,
        "sentences": sentences,
        "split": split,
        "filename": f"{name}.png",
    }
