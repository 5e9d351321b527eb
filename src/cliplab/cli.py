"""What the entry scripts share: two flags and key=value, and user errors as exit code 2."""

import argparse
import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from cliplab.errors import UserError, message_of

EXIT_USER_ERROR = 2
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_KEYS = {"configs": "src/cliplab/config.py", "experiments": "src/cliplab/sweeps/spec.py"}


def parse(
    description: str, flags: Sequence[str], arguments: Sequence[str], folder: str = "configs"
) -> argparse.Namespace:
    """Parse `--config FILE --checkpoint PATH key=value ...`; `--help` lists the YAML files of a folder."""
    configs = "\n".join(f"  {path}  {headline(path)}" for path in sorted(Path(folder).glob("*.yaml")) if path.is_file())
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"{folder}:\n{configs or f'  none in ./{folder}'}\n\nAll keys with their defaults: {_KEYS[folder]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    meanings = {
        "config": "YAML file of a run, or of a sweep",
        "checkpoint": "run directory (its best checkpoint) or a .ckpt file",
    }
    for flag in flags:
        parser.add_argument(f"--{flag}", metavar="FILE" if flag == "config" else "PATH", help=meanings[flag])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optim.lr=1e-4 seed=1 debug=true")
    return parser.parse_intermixed_args(list(arguments))


def headline(path: Path) -> str:
    """What a config is: the first line of its header comment."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().lstrip("# ").strip()


def run_script(main: Callable[[Sequence[str]], None]) -> None:
    """Run an entry script; only UserError becomes exit code 2 with its message, and no traceback unless debug=true."""
    # OpenMP threads that spin while they wait make a training step 5 times slower as soon as anything else needs a core
    # (measured on 2 cores, with one loader process); sleeping threads cost nothing on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    _set_up_logging()
    arguments = sys.argv[1:]
    try:
        main(arguments)
    except UserError as error:
        if any(argument.lower() in ("debug=true", "debug=1", "debug=yes", "debug=on") for argument in arguments):
            raise
        sys.stderr.write(f"error: {message_of(error)}\n")
        sys.exit(EXIT_USER_ERROR)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor, unless the environment already tells it what to do.

    It gives blocks of 32 MB and more back at once, and the system then zeroes the next one page by page: an epoch of a
    Combiner (batch 4,096) took 1.1 to 1.4 times as long, with 10 % less memory at its peak.
    """
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if sys.platform == "linux" and not told:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; others manage memory in their own way
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _set_up_logging() -> None:
    """Our own messages as they are; no warnings about the internals of libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("cliplab")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    # The last: metrics are gathered before they are logged, so every process logs the same number.
    for message in ("LeafSpec", "Experiment logs directory", "does not have many workers", "sync_dist=True"):
        warnings.filterwarnings("ignore", message=f".*{message}")
