"""How the towers of a config learn: LoRA, batch norms that keep their statistics."""

from torch.nn.modules.batchnorm import _BatchNorm

from cliplab.config import Config, ModelConfig
from cliplab.errors import UserError
from cliplab.models.clip import DualEncoder
from cliplab.models.lora import TARGETS, adapt
from cliplab.registry import closest

_TOWERS = ("image_encoder", "text_encoder")


def check_adaptation(config: Config) -> None:
    """Raise UserError for parts and targets that there are not, and for a tower that is to be frozen and adapted."""
    lora = config.model.lora
    for key, names, known in (("parts", lora.parts, _TOWERS), ("targets", lora.targets, TARGETS)):
        for name in names:
            if name not in known:
                raise UserError(f"model.lora.{key}: unknown '{name}': {closest(name, known)}")
        if not names or len(set(names)) < len(names):
            raise UserError(f"model.lora.{key} must name one or more of {', '.join(known)}, each once, got {names}")
    both = [part for part in lora.parts if part in config.model.freeze] if lora.rank else []
    if both:
        raise UserError(f"model.freeze and model.lora.parts both name {both[0]}: leave it out of one of them")


def adapt_towers(model: ModelConfig, clip: DualEncoder) -> None:
    """Put in place what the config asks for. Raises UserError where a tower can't have it."""
    lora = model.lora
    if lora.rank and "image_encoder" in lora.parts:
        adapt(clip.visual, clip.visual.parameters(), lora.rank, lora.alpha, lora.targets)
    if lora.rank and "text_encoder" in lora.parts:
        text = clip.text_tower
        # The encoder alone: a text tower at the root of the model has the image tower below it.
        adapt(text.get_submodule("transformer"), text.text_parameters(), lora.rank, lora.alpha, lora.targets)
    if model.freeze_bn:
        clip.visual.freeze_norms([module for module in clip.visual.modules() if isinstance(module, _BatchNorm)])
