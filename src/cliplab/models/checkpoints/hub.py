"""Folders of the Hugging Face hub: what lies on this machine first, then one try over the network."""

import logging
from collections.abc import Sequence
from pathlib import Path

from cliplab.errors import UserError

log = logging.getLogger(__name__)
_SECONDS = 5.0  # to reach the hub at all; huggingface_hub alone tries for 23 seconds, transformers for 46

CONFIG_FILES = ("*.json", "*.txt", "*.model")  # configs, vocabularies, tokenizers
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth")  # the first is preferred


def hub_folder(name: str, patterns: Sequence[str], needed: Sequence[str]) -> Path:
    """The folder of `name`: a local folder as it is, or a repository `org/name` of the hub with its files `patterns`.

    A local folder causes no network access; a repository that was fetched before with one of `needed` neither. Raises
    UserError within seconds where there is no network.
    """
    if Path(name).is_dir():
        return Path(name)
    cached = _cached(name)
    if cached is not None and any(next(cached.glob(pattern), None) for pattern in needed):
        return cached
    return _fetch(name, patterns)


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _fetch(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    message = (
        f"no folder '{name}' here, none in the cache {constants.HF_HUB_CACHE}, and the Hugging Face repository "
        f"'{name}' can't be reached: {{}}. Copy the repository's files to a folder on this machine and give its path"
    )
    if constants.HF_HUB_OFFLINE:
        raise UserError(message.format("HF_HUB_OFFLINE is set"))
    try:
        files = [file.rfilename for file in HfApi().model_info(name, timeout=_SECONDS).siblings or []]
    except Exception as error:  # noqa: BLE001 - what a missing network raises differs with the HTTP library installed
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(message.format(reason)) from error
    if any(file.endswith(".safetensors") for file in files):  # the same weights are often there in other formats too
        patterns = [pattern for pattern in patterns if pattern not in WEIGHT_FILES[1:]]
    log.info("fetching %s from the Hugging Face hub", name)
    try:
        return Path(snapshot_download(name, allow_patterns=[*patterns]))
    except (OSError, ValueError) as error:
        raise UserError(message.format(str(error).splitlines()[0])) from error


def hub_file(name: str, file: str) -> Path:
    """One file of a repository `org/name`, from the cache or the hub. Raises UserError, and FileNotFoundError where the
    repository has no such file.
    """
    cached = _cached(name)
    if cached is not None and (cached / file).is_file():
        return cached / file
    folder = _fetch(name, [file])
    if not (folder / file).is_file():
        raise FileNotFoundError(f"the Hugging Face repository '{name}' has no file {file}")
    return folder / file
