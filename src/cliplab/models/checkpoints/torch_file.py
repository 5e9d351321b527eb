"""Files written by torch.save, read without running any pickled code."""

import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from cliplab.errors import UserError
from cliplab.models.checkpoints.torchscript import is_torchscript, read_torchscript

# What torch.load raises for files that are cut off, of another kind or damaged inside.
_DAMAGED = (
    struct.error,
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_torch_file(path: Path) -> Any:
    """Tensors and plain builtins on the CPU (`weights_only`); of a TorchScript archive its tensors.

    Raises UserError naming the file.
    """
    try:
        if is_torchscript(path):
            return read_torchscript(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"can't read {path}: it is damaged, or holds pickled code, which is never run") from error
    except _DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"can't read {path}: {reason}. Is the file complete?") from error
