"""Files that several processes may write: whole or not there, and one process at a time."""

import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8 that nobody ever sees half written. Raises OSError."""
    scratch = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def alone(lock: Path, busy: str, subject: str) -> Iterator[None]:
    """Hold a lock; wait where another process does, and say so: `busy`: waiting for it.

    Some file systems of clusters know no locks: then it goes on without, and says that `subject` can't be locked.
    """
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        log.info("%s: waiting for it", busy)
        held.acquire()
    except (OSError, NotImplementedError) as error:
        log.info("%s can't be locked (%s)", subject, error)
    try:
        yield
    finally:
        held.release()
