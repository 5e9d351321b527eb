"""The two towers as data, in open_clip's words: what stands under `vision_cfg` and `text_cfg` of an architecture."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from cliplab.errors import UserError
from cliplab.registry import closest, fits

Cfg = TypeVar("Cfg", "CLIPVisionCfg", "CLIPTextCfg")

# Options of open_clip that no dual encoder of its 144 configs sets: CoCa's, and experimental attention blocks. A config
# may spell out their defaults; another value is refused, not ignored.
_BLOCK = {
    "block_type": (None, "default"),
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads"), (False,)),
    **dict.fromkeys(("scale_attn_inner", "scale_attn", "scale_fc"), (False,)),
}
_NOT_BUILT: dict[str, dict[str, tuple[Any, ...]]] = {
    "vision_cfg": {"attentional_pool": (False,), "output_tokens": (False,), "pos_embed_type": ("learnable",), **_BLOCK},
    "text_cfg": {"embed_cls": (False,), "output_tokens": (False,), "final_ln_after_pool": (False,), **_BLOCK},
}
_NULL_MEANS_NONE = ("timm_proj", "hf_proj_type", "hf_pooler_type")  # elsewhere null is the default
_WITHOUT_EFFECT = {"vision_cfg": {"attn_pooler_queries", "attn_pooler_heads"}, "text_cfg": {"pad_id"}}


@dataclass(frozen=True)
class CLIPVisionCfg:
    """The image tower: a ViT; a ModifiedResNet where `layers` is a list of four; timm by `timm_model_name`."""

    layers: int | tuple[int, int, int, int] = 12
    width: int = 768
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_size: int = 16
    image_size: int | tuple[int, int] = 224  # height, width

    ls_init_value: float | None = None  # layer scale; None = off
    patch_dropout: float = 0.0  # share of the patches left out in training; 0.5 halves the cost of the tower
    no_ln_pre: bool = False
    final_ln_after_pool: bool = False
    pool_type: str = "tok"  # tok: class token, avg: mean of the patches, none: all tokens
    act_kwargs: Mapping[str, Any] | None = None
    norm_kwargs: Mapping[str, Any] | None = None

    timm_model_name: str | None = None
    timm_model_pretrained: bool = False  # timm's own weights for the trunk; needs the network
    timm_pool: str = "avg"  # any pooling of the trunk, '' its own, abs_attn or rot_attn
    timm_proj: str | None = "linear"  # linear, mlp, none; '' or null: the trunk's classifier projects
    timm_proj_bias: bool = False
    timm_drop: float = 0.0
    timm_drop_path: float | None = None
    timm_kwargs: Mapping[str, Any] | None = None  # more options of timm's constructor; ours, open_clip has none

    def __post_init__(self) -> None:
        for key in ("layers", "image_size"):  # JSON has lists
            if isinstance(getattr(self, key), list):
                object.__setattr__(self, key, tuple(getattr(self, key)))


@dataclass(frozen=True)
class CLIPTextCfg:
    """The text tower: CLIP's transformer, or a Hugging Face encoder where `hf_model_name` is set."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0

    ls_init_value: float | None = None
    no_causal_mask: bool = False
    pool_type: str = "argmax"  # argmax: the largest id, eos: the first eos_id, first, last, none: all tokens
    eos_id: int = 2
    proj_type: str = "linear"  # linear, none
    proj_bias: bool = False  # False: a matrix without bias, as in OpenAI's CLIP
    act_kwargs: Mapping[str, Any] | None = None
    norm_kwargs: Mapping[str, Any] | None = None

    hf_model_name: str | None = None  # of the hub, or a local folder
    hf_model_pretrained: bool = False  # the encoder's own weights; open_clip's default is True
    hf_proj_type: str | None = "mlp"  # mlp, linear; null: none, where the widths are equal
    hf_pooler_type: str | None = "mean_pooler"  # mean_pooler, max_pooler, cls_pooler, cls_last_hidden_state_pooler

    hf_tokenizer_name: str | None = None
    tokenizer_mode: str | None = None
    tokenizer_kwargs: Mapping[str, Any] | None = None


def vision_cfg_of(value: CLIPVisionCfg | Mapping[str, Any]) -> CLIPVisionCfg:
    """A mapping as the dataclass. Raises UserError for unknown options and sizes that can't be."""
    cfg = _read("vision_cfg", CLIPVisionCfg, value)
    _check_types("vision_cfg", cfg)
    sizes = cfg.image_size if isinstance(cfg.image_size, tuple) else (cfg.image_size,)
    layers = cfg.layers if isinstance(cfg.layers, tuple) else (cfg.layers,)
    if min(*sizes, *layers, cfg.width, cfg.head_width) < 1:
        raise UserError(f"vision_cfg: sizes must be 1 or more: {cfg}")
    if isinstance(cfg.layers, int) and cfg.timm_model_name is None and min(sizes) < cfg.patch_size:
        raise UserError(f"vision_cfg: image_size {cfg.image_size} is smaller than a patch of {cfg.patch_size}")
    _check_choice("vision_cfg.pool_type", cfg.pool_type, ("tok", "avg", "none"))
    _check_choice("vision_cfg.timm_proj", cfg.timm_proj or "", ("linear", "mlp", "none", ""))
    return cfg


def text_cfg_of(value: CLIPTextCfg | Mapping[str, Any]) -> CLIPTextCfg:
    """A mapping as the dataclass. Raises UserError for unknown options and sizes that can't be."""
    cfg = _read("text_cfg", CLIPTextCfg, value)
    _check_types("text_cfg", cfg)
    if min(cfg.context_length, cfg.vocab_size, cfg.width, cfg.heads, cfg.layers) < 1:
        raise UserError(f"text_cfg: sizes must be 1 or more: {cfg}")
    _check_choice("text_cfg.pool_type", cfg.pool_type, ("argmax", "eos", "first", "last", "none"))
    _check_choice("text_cfg.proj_type", cfg.proj_type, ("linear", "none"))
    return cfg


def _read(section: str, schema: type[Cfg], given: Any) -> Cfg:
    known = {item.name: item for item in fields(schema)}
    mapping = (
        asdict(given) if is_dataclass(given) and not isinstance(given, type) else given
    )  # ours, or open_clip's own
    if not isinstance(mapping, Mapping):
        raise UserError(f"{section} must be a mapping of options, got {given!r}")
    taken: dict[str, Any] = {}
    for key, value in mapping.items():
        if key in _WITHOUT_EFFECT[section]:
            continue
        if key in _NOT_BUILT[section]:
            if value not in _NOT_BUILT[section][key]:
                raise UserError(f"{section}.{key}={value!r}: such towers (CoCa's, custom blocks) aren't built here")
        elif key not in known:
            raise UserError(f"{section} has no option '{key}': {closest(key, known)}")
        elif (
            value is None
            and known[key].default is not None
            and key not in ("timm_proj", "hf_proj_type", "hf_pooler_type")
        ):
            assert known[key].default is not MISSING  # null in a config: open_clip's default
        else:
            taken[key] = tuple(value) if isinstance(value, list) else value
    return schema(**taken)


def _check_types(section: str, cfg: CLIPVisionCfg | CLIPTextCfg) -> None:
    hints = get_type_hints(type(cfg))
    for item in fields(cfg):
        value = getattr(cfg, item.name)
        if not fits(value, hints[item.name]):
            raise UserError(f"{section}.{item.name} must be {item.type}, got {value!r}")
    if (cfg.act_kwargs or {}).get("approximate", "none") not in ("none", "tanh"):
        raise UserError(f"{section}.act_kwargs: approximate must be none or tanh, got {cfg.act_kwargs!r}")


def _check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{key} must be one of {', '.join(word or repr('') for word in known)}, got '{value}'")


def mapping_of(cfg: CLIPVisionCfg | CLIPTextCfg) -> dict[str, Any]:
    """The options that differ from the defaults, and the sizes: what a config file states."""
    sizes = {"image_size"} if isinstance(cfg, CLIPVisionCfg) else {"context_length", "vocab_size"}
    if isinstance(cfg, CLIPVisionCfg) and cfg.timm_model_name is None:
        sizes |= {"layers", "width", *({"patch_size"} if isinstance(cfg.layers, int) else ())}
    if isinstance(cfg, CLIPTextCfg) and cfg.hf_model_name is None:
        sizes |= {"width", "heads", "layers"}
    stated = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name in sizes or getattr(cfg, f.name) != f.default}
    return {
        key: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v for key, v in stated.items()
    }
