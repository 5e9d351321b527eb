"""A user error of one process ends all of them with one message and one exit code.

The others learn of it as a broken connection alone. So the process that meets it leaves the message in a folder, which
the first process makes before Lightning starts the others, and the first process tells it.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from torch import distributed

from cliplab.errors import UserError, message_of

FOLDER = "CLIPLAB_FAILURES"  # in the environment of the processes that Lightning starts


@contextmanager
def shared_failures(trainer: L.Trainer) -> Iterator[None]:
    """Wrap whatever several processes do together. Raises the UserError of any of them in the first.

    Processes that a scheduler has started have no first one that waits for the others: there each tells its own.
    """
    if trainer.strategy.launcher is None:
        yield
    elif FOLDER in os.environ:
        with _told_by_the_first(Path(os.environ[FOLDER])):
            yield
    else:
        with tempfile.TemporaryDirectory(prefix="cliplab-") as folder:
            os.environ[FOLDER] = folder
            try:
                with _telling(_note(Path(folder))):
                    yield
            finally:
                del os.environ[FOLDER]


@contextmanager
def _telling(note: Path) -> Iterator[None]:
    """The first process: a connection that broke is the error that another has noted, if one has."""
    try:
        yield
    except UserError as error:
        note.write_text(message_of(error), encoding="utf-8")
        raise
    except RuntimeError as error:
        if note.is_file():
            raise UserError(note.read_text(encoding="utf-8")) from error
        raise


@contextmanager
def _told_by_the_first(folder: Path) -> Iterator[None]:
    """The others: note the error, or follow in silence where it is noted or the first process has gone.

    They leave with 0, as Lightning kills the first process, which has the message to tell, where one leaves with
    another code. That needs gloo, which notices at once that a process has left; with NCCL the first would wait.
    """
    try:
        yield
    except UserError as error:
        if not (distributed.is_initialized() and distributed.get_backend() == "gloo"):
            raise
        scratch = folder / f"scratch-{os.getpid()}"
        if folder.is_dir():
            scratch.write_text(message_of(error), encoding="utf-8")
            scratch.replace(_note(folder))  # whole or not there
        sys.exit(0)
    except RuntimeError:
        if folder.is_dir() and not _note(folder).is_file():
            raise
        sys.exit(0)


def _note(folder: Path) -> Path:
    return folder / "message.txt"
