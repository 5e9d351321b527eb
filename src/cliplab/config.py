"""Every option of a run: typed defaults <- one YAML file <- key=value.

A YAML states only what differs from the defaults below. A named part (composer, loss, protocol) is a flat mapping
`{name: ..., option: value}` or, without options, just its name. Naming a part starts it afresh: options of the part
that stood there before are dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cliplab.config_layers import PART, Part, check_keys, merge_layer, name_parts, set_parts, without_parts
from cliplab.errors import UserError


def _part(name: str) -> Any:
    return field(default_factory=lambda: {"name": name}, metadata=PART)


@dataclass
class LoraConfig:
    """Low-rank updates of the attention weights of frozen towers (Hu et al., 2022); saved models hold the sum."""

    rank: int = 0  # 4 to 32; 0 = off
    alpha: float = 16.0  # the update is alpha / rank * up down
    parts: list[str] = field(default_factory=lambda: ["image_encoder", "text_encoder"])  # the towers
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v"])  # rows of the packed projection


@dataclass
class ModelConfig:
    """The towers and the composer."""

    arch: str = "ViT-B-32"  # architecture of open_clip or ours (ViT-tiny-8-64), JSON file, hf-hub:org/name, folder, run
    weights: str | None = None  # open_clip tag (openai, ...), file, folder or run; null = the folder's own, else random
    image_size: int | None = None  # positions are resized; null = the architecture's
    attention: str = "sdpa"  # sdpa, eager, flash (torch's flash kernel; on a GPU in half precision)
    compile: bool = False  # torch.compile of the blocks: faster steps after a minute or more of compiling
    grad_checkpointing: bool = False  # recompute activations in the backward pass: less memory, about a third slower
    composer: Part | None = field(default=None, metadata=PART)  # null: a dual encoder, no composed queries
    chunk_size: int | None = None  # pictures or texts at a time, computed twice: large batches; null = all at once
    freeze: list[str] = field(default_factory=list)  # of image_encoder, text_encoder, composer, temperature
    freeze_bn: bool = False  # batch norms of the image tower keep their statistics in training (CLIP4Cir)
    lora: LoraConfig = field(default_factory=LoraConfig)
    fixed_scale: float | None = None  # scale of the cosine logits; null = learned, clamped to 100 (CLIP4Cir: 100)


@dataclass
class DataConfig:
    """The data set, its protocol and the loaders."""

    name: str = "wardrobe"  # fashioniq, wardrobe, wardrobe_captions, coco, flickr30k, flickr8k, karpathy, image_folder,
    #   cirr, circo, triplets
    root: str = "data/wardrobe"  # folder of the annotations; image_folder: of the splits or classes
    images: str | None = None  # folder of the pictures; null = images/ below root
    annotations: str | None = None  # of captions: file or pattern below root, or hub:ORG/NAME; null = the one set there
    categories: list[str] | None = None  # train and evaluate on these only; null = all
    split: str | None = (
        None  # that `test/...` is measured on; test of CIRR and CIRCO gives a submission; null = its own
    )
    protocol: Part | None = field(default=None, metadata=PART)  # clip4cir, searle, val, ...; null = the data set's own
    batch_size: int = 128  # good values: 128 to 4096 for contrastive losses; per process
    same_image: str | None = None  # separate: targets differ within a global batch; positives: equal ones all count;
    #   ignore: equal ones are negatives; null = the data set's own, separate for captions and ignore for the others
    eval_batch_size: int = 256
    num_workers: int = 1  # loader processes; 0 = none
    pad: str = "none"  # none, square, target (pads to an aspect ratio of at most 1.25, CLIP4Cir)
    crop_scale: float = 1.0  # smallest area share of a random resized crop in training; 1 = the evaluation crop
    flip: bool = False  # random horizontal flip in training; wrong where captions say left or right
    hard_negatives: int = 0  # mined images a query, drawn each epoch; data sets that name them (triplets): 3 in BGE-VL
    feature_cache: str | None = (
        "auto"  # folder of the features of frozen towers; auto: OUTPUT_DIR/feature_cache; null: none
    )
    image_backend: str = "exact"  # exact: Pillow's bits; fast: torch's, twice as fast, at most 2 grey levels apart


@dataclass
class ZeroShotConfig:
    """Zero-shot classification of an image folder while a model trains: logs zero_shot/top1 and zero_shot/top5."""

    root: str | None = None  # laid out as for data.name=image_folder; null = off
    split: str = "test"  # train, val, test
    protocol: Part = _part("zero_shot_imagenet")  # the templates; zero_shot_cifar, zero_shot_plain
    every_n_epochs: int = 0  # in the validation of every n-th epoch, a multiple of check_val_every_n_epoch; 0 = off


@dataclass
class OptimConfig:
    """AdamW with warm-up and a schedule."""

    lr: float = 1e-4  # 1e-3 from scratch, 1e-5 to 1e-6 for pretrained towers
    weight_decay: float = 0.01  # none for norms, biases, positional embeddings, temperature
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-6
    warmup: float = 0.05  # share of all steps with linearly rising lr
    schedule: str = "cosine"  # cosine, linear, constant
    lr_multipliers: dict[str, float] = field(default_factory=dict)  # per part, named as in model.freeze
    layer_decay: float = 1.0  # of the lr per layer, from the top of each tower down (BEiT); 0.6 to 0.9 to fine-tune


@dataclass
class TrainerConfig:
    """What goes to Lightning's Trainer, under its own names."""

    max_epochs: int = 10
    max_steps: int = -1  # stops earlier than max_epochs if reached; -1 = off
    accelerator: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    precision: str = "32-true"  # bf16-mixed on hardware that has it; the loss is computed in fp32 anyway
    matmul_precision: str = "highest"  # medium: bf16 inside fp32 products where the CPU or GPU can; high: TF32
    gradient_clip_val: float | None = 1.0
    check_val_every_n_epoch: int = 1
    log_every_n_steps: int = 10
    monitor: str = "val/mean/R@10"  # the best checkpoint is the one with the highest value
    early_stopping_patience: int | None = None  # validations without improvement; null = off
    weight_averaging: Part | None = field(default=None, metadata=PART)  # ema or swa: what is validated, kept and tested


@dataclass
class TeacherConfig:
    """What loss=distillation learns from: a trained model of the same image size and tokenizer."""

    arch: str | None = None  # as model.arch; of composed queries a run with a composer; null = none
    weights: str | None = None  # as model.weights


@dataclass
class Config:
    """One run."""

    name: str = ""  # folder below output_dir; empty = the YAML's file name
    seed: int = 0
    resume: str = "auto"  # auto: continue an interrupted run of the same config; never; or a checkpoint file
    linear_probe: bool = False  # data.name=image_folder: test/linear_probe/top1, fitted on train, chosen on validation
    debug: bool = False  # debug=true on the command line shows the traceback of a user error
    output_dir: str = "runs"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    zero_shot: ZeroShotConfig = field(default_factory=ZeroShotConfig)
    loss: Part = _part("info_nce")
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, check every key and type. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no config file {path}; configs here: {_listing(path)}")
    config = merge_config([(str(path), read_yaml(path)), ("command line", read_overrides(overrides))])
    config.name = config.name or path.stem
    return config


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`['optim.lr=1e-4', ...]` -> nested dict. Raises UserError for anything that is not key=value."""
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"'{override}' is not an override; write key=value, for example optim.lr=1e-4")
    try:
        layers = [name_parts(_plain(OmegaConf.from_dotlist([override])), Config) for override in overrides]
        return _plain(OmegaConf.merge({}, *layers))  # options of a part and its name belong together in any order
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"can't read the overrides {' '.join(overrides)}: {error}") from error


@cache
def _schema() -> DictConfig:
    """Keys, types and defaults of Config: OmegaConf takes longer to read them than to merge into them."""
    return OmegaConf.structured(Config)


def merge_config(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Config:
    """Merge (source, nested dict) layers over the defaults; later layers win. Raises UserError naming the source."""
    merged: dict[str, Any] = {}
    for source, layer in layers:
        check_keys(layer, Config, source)
        merged = merge_layer(merged, layer, Config)
    try:
        typed = OmegaConf.merge(_schema(), without_parts(merged, Config))  # merge copies what it merges into
        config = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{' + '.join(s for s, layer in layers if layer)}: key '{error.full_key}': {reason}") from error
    assert isinstance(config, Config)
    set_parts(config, merged)
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; duplicate keys are refused. Raises UserError."""
    try:
        plain = _plain(OmegaConf.load(path))
    except yaml.constructor.ConstructorError as error:
        where = f"{path}: line {error.problem_mark.line + 1}" if error.problem_mark is not None else str(path)
        again = "; it stands there twice: rename or remove one" if "duplicate" in str(error.problem) else ""
        raise UserError(f"{where}: {error.problem}{again}") from error
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(plain, dict):
        raise UserError(f"{path} must hold a mapping of config keys, not a list")
    return plain


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def _listing(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    return ", ".join(str(file) for file in sorted(folder.glob("*.yaml"))) or f"none in {folder}"
