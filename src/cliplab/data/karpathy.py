"""Caption retrieval: images and all their captions, both directions. COCO, Flickr30k, Flickr8k and what is like them.

ROOT/, ROOT/annotations/   the captions, in one of the forms of caption_files.py or caption_tables.py
ROOT/images/               the pictures, also in direct sub-folders; without it those of ROOT's sub-folders (val2017/)

A data set with its own file names is a subclass with its own `patterns`, as in coco.py.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset

from cliplab.benchmark import PROTOCOLS, Benchmark, Protocol
from cliplab.data.caption_files import (
    OFFICIAL,
    CaptionedImage,
    Patterns,
    find_files,
    named_splits,
    patterns_of,
    read_captions,
    require_distinct,
)
from cliplab.data.caption_tables import Picture, open_hub, open_parquet, read_table, write_pictures
from cliplab.data.captions import training_samples
from cliplab.data.dataset import (
    TRAIN_FEATURES,
    RetrievalDataset,
    gallery_table,
    no_rows,
    query_table,
)
from cliplab.data.images import ImageFolder
from cliplab.errors import UserError

log = logging.getLogger(__name__)

TRAIN_SPLITS = ("train", "restval")  # COCO's restval belongs to training
HUB = "hub:"


class Karpathy(RetrievalDataset):
    """Captions in any of the forms. `annotations` names their file (or a pattern of files, or hub:NAME) below root."""

    benchmark_name = "karpathy"
    default_protocol = "clip_benchmark"
    protocols = tuple(name for name, protocol in PROTOCOLS.items() if protocol.hit == "any_positive")
    protocol_fields = ("captions_per_image", "train_join", "missing_images")
    same_image = "separate"
    patterns: ClassVar[Patterns] = patterns_of("*") | OFFICIAL

    def __init__(
        self,
        root: str | Path,
        images: str | Path | None = None,
        categories: Iterable[str] | None = None,
        annotations: str | None = None,
    ) -> None:
        super().__init__(root, images, categories)
        self.annotations = annotations
        self._images_named = images is not None
        self._pictures: dict[str, Picture] = {}  # by stem: what a table holds of them

    @property
    def own_split(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride] - known once the file is read
        """Test where the annotations have it, else val: COCO's own captions of the test images are not public."""
        splits = {image.split for image in self.images}
        return "test" if "test" in splits or "val" not in splits else "val"

    @property
    def folder(self) -> ImageFolder:
        """The image folder, listed once. Raises UserError where two of its pictures share a name."""
        if self._folder is None:
            if not self._images_named and not self.image_root.is_dir() and self.root.is_dir():
                self.image_root = self.root
            for one, other in super().folder.same_name[:1]:
                raise UserError(
                    f"{one} and {other} share a name, and pictures are found by name: keep one of them, or name the "
                    "folder that is meant with data.images"
                )
        return super().folder

    def annotation_files(self) -> list[Path]:
        """The files that hold the captions; none where there is nothing or more than one form."""
        if self.annotations is None:
            forms = list(find_files(self.root, self.patterns).values())
            return forms[0] if len(forms) == 1 else []
        return [] if self.annotations.startswith(HUB) else _named_files(self.root, self.annotations)

    @cached_property
    def source(self) -> str:
        """Where the captions are from, for messages. Raises UserError unless that is clear."""
        if self.annotations is not None:
            if not self.annotations.startswith(HUB) and not self.annotation_files():
                raise UserError(f"data.annotations={self.annotations}: no such file in {self.root.resolve()}")
            return self.annotations
        forms = find_files(self.root, self.patterns)
        if not forms:
            needed = "; ".join(f"{', '.join(names)} ({form})" for form, names in self.patterns.items())
            raise UserError(
                f"{self.root.resolve()} holds no captions for data.name={self.benchmark_name}. Needed, there or in its "
                f"annotations/, is one of: {needed}. Set data.root, name another file with data.annotations, or run "
                "without any download: python train.py --config configs/quickstart.yaml"
            )
        found = "; ".join(f"{form}: {', '.join(path.name for path in files)}" for form, files in forms.items())
        form, files = next(iter(forms.items()))
        if len(forms) > 1 or (form == "Karpathy's JSON" and len(files) > 1):
            raise UserError(
                f"{self.root.resolve()} holds more than one set of captions: {found}. Say which one is meant, for "
                f"example data.annotations={files[0].relative_to(self.root).as_posix()}"
            )
        log.info("captions: %s in %s", found, self.root)
        return ", ".join(str(path) for path in files)

    @cached_property
    def images(self) -> list[CaptionedImage]:
        """All images in the files' order. Raises UserError naming file and record."""
        images: list[CaptionedImage] = []
        hub = self.annotations is not None and self.annotations.startswith(HUB)
        tables = open_hub(self.source.removeprefix(HUB)) if hub else {}
        for path in self.annotation_files() if self.source else []:
            if path.suffix == ".parquet":
                tables[str(path)] = open_parquet(path)
            else:
                images += read_captions(path)
        for origin, table in tables.items():
            found, pictures = read_table(table, origin)
            images += found
            self._pictures |= pictures
        require_distinct(images)
        return images

    def split(self, name: str) -> list[CaptionedImage]:
        """The images of a split; `train` includes restval."""
        wanted = TRAIN_SPLITS if name == "train" else (name,)
        return [image for image in self.images if image.split in wanted]

    def _asked(self, name: str) -> list[CaptionedImage]:
        """The images of a split. Raises UserError naming the file that should hold them."""
        images = self.split(name)
        if not images:
            there = ", ".join(sorted({image.split for image in self.images})) or "no image at all"
            files = [str(path) for path in self.annotation_files() if named_splits(path) == {name}]
            why = f"no image of the split '{name}' (there is: {there})"
            raise no_rows(", ".join(files) or self.source, name, why)
        return images

    def check(self, protocol: Protocol, splits: Iterable[str]) -> None:
        """Annotations there and well formed; images there unless the policy is `report`."""
        needed: list[str] = []
        for name in dict.fromkeys(splits):
            images = self._asked(name)
            needed += [image.stem for image in images]
            _evaluated(images, protocol)
        self._provide(needed)
        self.check_images(needed, protocol.missing_images)

    def _provide(self, stems: list[str]) -> None:
        """Write the pictures that only a table holds into the image folder."""
        absent = [stem for stem in self.folder.missing(stems) if stem in self._pictures] if self._pictures else []
        if absent:
            if not self._images_named:
                self.image_root = self.root / "images"
            log.info("writing %d pictures from %s into %s", len(absent), self.source, self.image_root)
            write_pictures(self._pictures, absent, self.image_root)
            self._folder = None

    def _present(self, split: str, protocol: Protocol) -> list[CaptionedImage]:
        images = self._asked(split)
        stems = [image.stem for image in images]
        self._provide(stems)
        self.check_images(stems, protocol.missing_images)
        return [image for image in images if image.stem in self.folder]

    def train_table(self, protocol: Protocol) -> Dataset:
        """Text against image: one random caption per image and epoch, or each caption as a sample of its own."""
        if protocol.train_join not in ("random1", "each_caption"):
            raise UserError(
                f"data.protocol.train_join={protocol.train_join} joins pairs: use random1 or each_caption here"
            )
        images = self._present("train", protocol)
        samples = [
            (row, texts)
            for row, image in enumerate(images)
            for texts in training_samples(protocol.train_join, image.captions, "")
        ]
        table = {
            "reference": [None] * len(samples),
            "target": [self.folder.path(images[row].stem) for row, _ in samples],
            "reference_id": [-1] * len(samples),
            "target_id": [row for row, _ in samples],
            "texts": [[protocol.prompt.format(text) for text in texts] for _, texts in samples],
        }
        return Dataset.from_dict(table, features=TRAIN_FEATURES)

    def benchmarks(self, protocol: Protocol, split: str) -> list[Benchmark]:
        """Text to image; its transpose is image to text, where any of an image's captions is a hit."""
        images = self._present(split, protocol)
        if not images:
            raise UserError(f"{self.source}: no image of the split '{split}' is left in {self.image_root}")
        of_image = _evaluated(images, protocol)
        captions = [(row, caption) for row, texts in enumerate(of_image) for caption in texts]
        paths = [self.folder.path(image.stem) for image in images]
        names = [image.filename for image in images]
        caption_rows: list[list[int]] = [[] for _ in images]
        for number, (row, _) in enumerate(captions):
            caption_rows[row].append(number)
        texts = [protocol.prompt.format(caption) for _, caption in captions]
        text_names = [f"{names[row]}#{number - caption_rows[row][0]}" for number, (row, _) in enumerate(captions)]
        lost_images = len(self.split(split)) - len(images)
        lost_captions = sum(map(len, _evaluated(self.split(split), protocol))) - len(captions)
        excluded = {"gallery_rows": lost_images, "queries": lost_captions}
        transposed = {"gallery_rows": lost_captions, "queries": lost_images}
        image_to_text = Benchmark(
            "i2t",
            protocol,
            query_table(images=paths),
            gallery_table(text_names, texts=texts),
            caption_rows,
            names,
            None,
            transposed,
        )
        return [
            Benchmark(
                "t2i",
                protocol,
                query_table(texts=texts),
                gallery_table(names, images=paths),
                [[row] for row, _ in captions],
                text_names,
                image_to_text,
                excluded,
            )
        ]

    def counts(self) -> dict[str, Any]:
        """Images and captions per split of the file."""
        found: dict[str, dict[str, int]] = {}
        for image in self.images:
            entry = found.setdefault(image.split, {"images": 0, "captions": 0, "empty_captions": 0})
            entry["images"] += 1
            entry["captions"] += len(image.captions)
            entry["empty_captions"] += sum(not caption.strip() for caption in image.captions)
        return found

    def images_by_captions(self) -> dict[str, dict[int, int]]:
        """Per split of the file: number of captions -> how many images have so many."""
        sizes: dict[str, Counter[int]] = {}
        for image in self.images:
            sizes.setdefault(image.split, Counter())[len(image.captions)] += 1
        return {split: dict(sorted(counter.items())) for split, counter in sizes.items()}

    def summary(self) -> dict[str, Any]:
        """What results.json says of the data, and from which files the captions are."""
        names = [
            path.relative_to(self.root).as_posix() for path in self.annotation_files() if path.is_relative_to(self.root)
        ]
        by_captions = self.images_by_captions()
        return super().summary() | {"annotations": names or self.source, "images_by_captions": by_captions}


def _evaluated(images: list[CaptionedImage], protocol: Protocol) -> list[tuple[str, ...]]:
    """The captions of each image that are ranked. Raises UserError for an image with too few."""
    wanted = protocol.captions_per_image
    for image in images:
        if wanted is not None and len(image.captions) < wanted:
            raise UserError(
                f"{image.origin} ({image.filename}) has {len(image.captions)} caption(s), fewer than "
                f"data.protocol.captions_per_image={wanted}"
            )
    return [image.captions[:wanted] for image in images]


def _named_files(root: Path, pattern: str) -> list[Path]:
    if Path(pattern).is_absolute():
        return [Path(pattern)] if Path(pattern).is_file() else []
    return sorted(path for path in root.glob(pattern) if path.is_file())
