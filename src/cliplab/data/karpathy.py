"""Caption retrieval in Karpathy's JSON layout (COCO, Flickr30k, Flickr8k and whatever is written in it).

{"images": [{"filename", "split", "sentences": [{"raw"}], "filepath"?}], "dataset": name}; images below `images`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset

from cliplab.benchmark import PROTOCOLS, Benchmark, Protocol
from cliplab.data.captions import training_samples
from cliplab.data.dataset import (
    TRAIN_FEATURES,
    RetrievalDataset,
    gallery_table,
    query_table,
    read_json,
)
from cliplab.errors import UserError

TRAIN_SPLITS = ("train", "restval")  # COCO's restval belongs to training


@dataclass(frozen=True)
class CaptionedImage:
    """One image and all its captions."""

    filename: str
    split: str
    captions: tuple[str, ...]

    @property
    def stem(self) -> str:
        """The name under which the image folder knows it."""
        return Path(self.filename).stem


class Karpathy(RetrievalDataset):
    """One `dataset_*.json` (or .json.gz) in the root and the folder of its images."""

    benchmark_name = "karpathy"
    default_protocol = "clip_benchmark"
    protocols = tuple(name for name, protocol in PROTOCOLS.items() if protocol.hit == "any_positive")
    test_split = "test"

    @property
    def all_categories(self) -> tuple[str, ...]:
        """No categories."""
        return ()

    def annotation_files(self) -> list[Path]:
        """The one JSON file."""
        return sorted(path for pattern in ("dataset_*.json", "dataset_*.json.gz") for path in self.root.glob(pattern))

    @cached_property
    def annotation_file(self) -> Path:
        """Raises UserError unless there is exactly one."""
        files = self.annotation_files()
        if len(files) != 1:
            found = ", ".join(path.name for path in files) or "none"
            raise UserError(
                f"{self.root.resolve()} must hold exactly one dataset_*.json (or .json.gz) in Karpathy's layout, found "
                f"{found}. Set data.root, or run without any download: python train.py --config configs/quickstart.yaml"
            )
        return files[0]

    @cached_property
    def images(self) -> list[CaptionedImage]:
        """All images in the file's order. Raises UserError naming file and record."""
        path = self.annotation_file
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("images"), list):
            raise UserError(f"{path} must be an object with a list 'images' (Karpathy's layout)")
        images = [_captioned_image(path, number, row) for number, row in enumerate(content["images"])]
        named: dict[str, str] = {}
        for image in images:
            if named.setdefault(image.stem, image.filename) != image.filename:
                raise UserError(f"{path}: '{image.filename}' and '{named[image.stem]}' would share one picture")
        return images

    def split(self, name: str) -> list[CaptionedImage]:
        """The images of a split; `train` includes restval."""
        wanted = TRAIN_SPLITS if name == "train" else (name,)
        return [image for image in self.images if image.split in wanted]

    def check(self, protocol: Protocol, splits: Iterable[str]) -> None:
        """Annotations there and well formed; images there unless the policy is `report`."""
        needed: list[str] = []
        for name in dict.fromkeys(splits):
            images = self.split(name)
            if not images:
                raise UserError(f"{self.annotation_file} has no image of the split '{name}'")
            needed += [image.stem for image in images]
        self.check_images(needed, protocol.missing_images)

    def _present(self, split: str, protocol: Protocol) -> list[CaptionedImage]:
        self.check_images((image.stem for image in self.split(split)), protocol.missing_images)
        return [image for image in self.split(split) if image.stem in self.folder]

    def train_table(self, protocol: Protocol) -> Dataset:
        """Text against image: one random caption per image and epoch."""
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
            raise UserError(f"{self.annotation_file}: no image of the split '{split}' is left in {self.image_root}")
        captions = [(row, caption) for row, image in enumerate(images) for caption in image.captions]
        paths = [self.folder.path(image.stem) for image in images]
        names = [image.filename for image in images]
        caption_rows: list[list[int]] = [[] for _ in images]
        for number, (row, _) in enumerate(captions):
            caption_rows[row].append(number)
        texts = [protocol.prompt.format(caption) for _, caption in captions]
        text_names = [f"{names[row]}#{number - caption_rows[row][0]}" for number, (row, _) in enumerate(captions)]
        lost_images = len(self.split(split)) - len(images)
        lost_captions = sum(len(image.captions) for image in self.split(split)) - len(captions)
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


class Flickr8k(Karpathy):
    """Flickr8k (Hodosh et al., 2013): dataset_flickr8k.json and the folder images/."""

    benchmark_name = "flickr8k"


def _captioned_image(path: Path, number: int, row: Any) -> CaptionedImage:
    if not isinstance(row, dict):
        raise UserError(f"{path}: image {number} must be an object, found {type(row).__name__}")
    for key in ("filename", "split", "sentences"):
        if key not in row:
            raise UserError(f"{path}: image {number} has no '{key}' (it has: {', '.join(row) or 'nothing'})")
    name, sentences = row["filename"], row["sentences"]
    if not isinstance(name, str):
        raise UserError(f"{path}: image {number}: 'filename' must be a string, found {name!r}")
    if not isinstance(sentences, list) or not sentences:
        raise UserError(f"{path}: image {number} ({name}) has no sentences")
    captions: list[str] = []
    for position, sentence in enumerate(sentences):
        if not isinstance(sentence, dict) or not isinstance(sentence.get("raw"), str):
            raise UserError(f"{path}: image {number} ({name}): sentence {position} has no 'raw' text")
        captions.append(sentence["raw"])
    return CaptionedImage(name, str(row["split"]), tuple(captions))
