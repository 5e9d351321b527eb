"""Classification of an image folder by class names: each picture asks which class it shows.

ROOT/{train,validation or val,test}/CLASS/*.jpg; a ROOT without such folders holds ROOT/CLASS/*.jpg, all of it test.
ROOT/classes.json     optional: {"CLASS folder": "name in the prompts"}

A folder's name becomes the class's name with spaces for underscores; hyphens and case stay (`t-shirt`, `polar_bear` ->
`polar bear`). classes.json names what this does not make readable, such as n02123045 or polar-bear.
"""

import itertools
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

from cliplab.benchmark import PROTOCOLS, Benchmark, Protocol
from cliplab.data.captions import EVAL_JOINS, training_samples
from cliplab.data.dataset import TRAIN_FEATURES, RetrievalDataset, gallery_table, query_table, read_json
from cliplab.data.images import EXTENSIONS
from cliplab.errors import UserError
from cliplab.registry import closest

SPLITS = {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}
CLASS_NAMES = "classes.json"


class ImageFolderDataset(RetrievalDataset):
    """Pictures in one folder per class. All classes of all splits are candidates in each split."""

    benchmark_name = "image_folder"
    default_protocol = "zero_shot_imagenet"
    protocols = tuple(name for name, protocol in PROTOCOLS.items() if protocol.hit == "class")
    protocol_fields = ("caption_join", "train_join")

    def __init__(
        self, root: str | Path, images: str | Path | None = None, categories: Iterable[str] | None = None
    ) -> None:
        if images is not None:
            raise UserError(f"data.images={images}: an image folder is its own data.root; leave data.images out")
        super().__init__(root, root, categories)
        self._pictures: dict[str, list[list[Path]]] = {}
        self.own_split = "test" if "test" in self.split_folders else "val"  # ImageNet's test labels are not public

    @cached_property
    def split_folders(self) -> dict[str, Path]:
        """Split -> folder. Raises UserError for a root that is not there or names a split twice."""
        if not self.root.is_dir():
            raise UserError(f"no folder {self.root.resolve()} (data.root or zero_shot.root); needed: {_LAYOUT}")
        found: dict[str, Path] = {}
        for split, names in SPLITS.items():
            # A class may be called train: its folder holds pictures and no folders.
            there = [self.root / name for name in names if _folders(self.root / name)]
            if len(there) > 1:
                raise UserError(f"{self.root} has both {' and '.join(path.name for path in there)}: keep one of them")
            if there:
                found[split] = there[0]
        return found or {"test": self.root}

    @property
    def all_categories(self) -> tuple[str, ...]:
        """The class folders, sorted; the class with the label n is the n-th of `categories`."""
        return self._class_folders

    @cached_property
    def _class_folders(self) -> tuple[str, ...]:
        names = sorted({path.name for folder in self.split_folders.values() for path in _folders(folder)})
        if not names:
            raise UserError(f"{self.root.resolve()} holds no class folder; needed: {_LAYOUT}")
        return tuple(names)

    def annotation_files(self) -> list[Path]:
        """classes.json, if there is one."""
        path = self.root / CLASS_NAMES
        return [path] if path.is_file() else []

    @cached_property
    def class_names(self) -> list[str]:
        """By label: the name that goes into the prompts. Raises UserError for a bad classes.json or equal names."""
        given = self._given_names()
        names = [given.get(folder, " ".join(folder.replace("_", " ").split())) for folder in self.categories]
        first: dict[str, str] = {}
        for folder, name in zip(self.categories, names, strict=True):
            if first.setdefault(name.lower(), folder) != folder:
                raise UserError(
                    f"{self.root}: the classes {first[name.lower()]} and {folder} would both be called '{name}', "
                    f"and no prompt could tell them apart: give them names in {self.root / CLASS_NAMES}"
                )
        return names

    def _given_names(self) -> dict[str, str]:
        given: dict[str, str] = {}
        for path in self.annotation_files():
            given = read_json(path)
            if not isinstance(given, dict):
                raise UserError(f'{path} must be an object {{"folder": "class name"}}, found {type(given).__name__}')
            for folder, name in given.items():
                if folder not in self.all_categories:
                    near = closest(folder, self.all_categories)
                    raise UserError(f"{path}: there is no class folder '{folder}': {near}")
                if not isinstance(name, str) or not name.strip():
                    raise UserError(f"{path}: the name of '{folder}' must be a text, found {name!r}")
        return given

    def pictures(self, split: str) -> list[list[Path]]:
        """By label: the files of a split, sorted. Raises UserError for a split or for pictures that are not there."""
        if split not in self.split_folders:
            there = ", ".join(path.name for path in self.split_folders.values() if path != self.root)
            has = f"it has {there}" if there else "without split folders all of it is test"
            raise UserError(f"{self.root} has no split '{split}', {has}; needed: {_LAYOUT}")
        if split not in self._pictures:
            folder = self.split_folders[split]
            self._pictures[split] = [_files(folder / name) for name in self.categories]
            if not any(self._pictures[split]):
                raise UserError(f"{folder} holds none of the classes {', '.join(self.categories)}")
        return self._pictures[split]

    def check(self, protocol: Protocol, splits: Iterable[str]) -> None:
        """The splits that are needed are there, those that are there have pictures, and no class names are equal."""
        self.wordings(protocol)
        for split in dict.fromkeys([*splits, *self.split_folders]):
            self.pictures(split)

    def check_headers(self, split: str) -> None:
        """Raise UserError naming the first file of a split that is no picture; decodes nothing."""
        for path in itertools.chain.from_iterable(self.pictures(split)):
            try:
                with Image.open(path):
                    pass
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise UserError(f"can't read the image {path}: {error}. Replace or remove it") from error

    def check_probe(self) -> None:
        """Raise UserError unless a linear probe can be fitted, chosen and tested."""
        missing = [split for split in SPLITS if split not in self.split_folders]
        if missing:
            raise UserError(
                f"linear_probe=true needs pictures to fit, choose and test on: {self.root} has no "
                f"{', '.join('/'.join(SPLITS[split]) for split in missing)} folder"
            )
        train, val, test = (self.pictures(split) for split in SPLITS)
        rows = list(zip(self.categories, train, val, test, strict=True))
        if sum(bool(files) for files in train) < 2:
            raise UserError(f"linear_probe=true needs two classes or more in {self.split_folders['train']}")
        unseen = [name for name, fitted, chosen, tested in rows if tested and not fitted and not chosen]
        if unseen:
            raise UserError(f"linear_probe=true: no picture to learn {', '.join(unseen)} from in {self.root}")

    def wordings(self, protocol: Protocol) -> list[list[str]]:
        """By label: the prompts of a class."""
        join = EVAL_JOINS[protocol.caption_join]
        return [[protocol.prompt.format(text) for text in join([name], "")] for name in self.class_names]

    def train_table(self, protocol: Protocol) -> Dataset:
        """Each picture against a random prompt of its class (Goyal et al., 2023, "Finetune like you pretrain").

        Pictures of one class in a batch count as each other's negatives, as they do there.
        """
        if protocol.train_join not in ("random1", "each_caption"):
            raise UserError(
                f"data.protocol.train_join={protocol.train_join} joins pairs: use random1 or each_caption here"
            )
        samples = [
            (str(path), texts)
            for files, wordings in zip(self.pictures("train"), self.wordings(protocol), strict=True)
            for path in files
            for texts in training_samples(protocol.train_join, wordings, "")
        ]
        rows = {path: row for row, path in enumerate(dict.fromkeys(path for path, _ in samples))}
        table = {
            "reference": [None] * len(samples),
            "target": [path for path, _ in samples],
            "reference_id": [-1] * len(samples),
            "target_id": [rows[path] for path, _ in samples],
            "texts": [texts for _, texts in samples],
        }
        return Dataset.from_dict(table, features=TRAIN_FEATURES)

    def benchmarks(self, protocol: Protocol, split: str) -> list[Benchmark]:
        """Pictures ask, classes are the gallery: R@1 is top-1 accuracy, R@5 top-5 (100 with five classes or fewer).

        Not the other way round with this as its transpose: finding the pictures of a class is another measure, and
        the mean of both would be none.
        """
        labelled = [(label, path) for label, files in enumerate(self.pictures(split)) for path in files]
        wordings = self.wordings(protocol)
        prompts = [(label, text) for label, texts in enumerate(wordings) for text in texts]
        return [
            Benchmark(
                "zero_shot",
                protocol,
                query_table(images=[str(path) for _, path in labelled]),
                gallery_table([self.categories[label] for label, _ in prompts], texts=[text for _, text in prompts]),
                [[label] for label, _ in labelled],
                [f"{self.categories[label]}/{path.name}" for label, path in labelled],
                wording_of=[label for label, _ in prompts],
            )
        ]

    def counts(self) -> dict[str, Any]:
        """By split: pictures, in all and per class."""
        return {
            split: {
                "images": sum(len(files) for files in self.pictures(split)),
                "per_class": {name: len(f) for name, f in zip(self.categories, self.pictures(split), strict=True)},
            }
            for split in self.split_folders
        }

    def image_sizes(self) -> list[tuple[str, int]]:
        """(split/class/file, bytes) of every picture, by split and class."""
        return [
            (path.relative_to(self.root).as_posix(), os.stat(path).st_size)
            for split in self.split_folders
            for files in self.pictures(split)
            for path in files
        ]


_LAYOUT = "ROOT/{train,validation,test}/CLASS/*.jpg, or ROOT/CLASS/*.jpg where all is test (.jpg, .jpeg or .png)"


def _folders(path: Path) -> list[Path]:
    """The folders in a folder, hidden ones left out; none where there is no folder."""
    return [item for item in path.iterdir() if item.is_dir() and item.name[0] != "."] if path.is_dir() else []


def _files(folder: Path) -> list[Path]:
    """The pictures of a class, sorted; none where it has no folder. Raises UserError for a folder without any."""
    if not folder.is_dir():
        return []
    files = sorted(p for p in folder.iterdir() if p.name.lower().endswith(EXTENSIONS) and p.name[0] != ".")
    if not files:
        raise UserError(f"the class folder {folder} holds no .jpg, .jpeg or .png: add its pictures or remove it")
    return files
