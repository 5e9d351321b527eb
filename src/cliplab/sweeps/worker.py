"""One run in a process of its own: python -m cliplab.sweeps.worker REQUEST

It does what train.py or eval.py do, on a config that the sweep has resolved. The lock of its run directory is held
meanwhile: a worker that outlives its sweep is waited for by the next one and never doubled.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cliplab.cli import run_script
from cliplab.config import Config, merge_config
from cliplab.errors import UserError
from cliplab.files import alone
from cliplab.results import write_json
from cliplab.run import RunDirectory, checkpoint_of, move_aside, read_checkpoint, run_directory
from cliplab.sweeps.held import Held, beside, holds, read_json, require_whole

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> None:
    """Take the lock, make room, run; nothing to do where another worker has done it meanwhile."""
    if len(arguments) != 1:
        raise UserError("python -m cliplab.sweeps.worker takes the REQUEST that a sweep has written")
    path = Path(arguments[0])
    request = read_json(path)
    if request is None:
        raise UserError(f"can't read the request {path}")
    config = merge_config([(str(path), request["config"])])
    if os.environ.get("LOCAL_RANK", "0") != "0":  # started by Lightning, beside the process that holds the lock
        _run(config, request)
        return
    directory = run_directory(config).path
    directory.parent.mkdir(parents=True, exist_ok=True)
    with alone(beside(directory, "lock"), f"another process is at {directory}", str(directory)):
        held = holds(directory, request["identity"], request["evaluated"], request["keeps_checkpoint"])
        if held.missing:
            make_room(directory, request, held)
            _run(config, request)


def make_room(directory: Path, request: dict[str, Any], held: Held) -> None:
    """Move aside what the run may not continue from, then say what the directory holds.

    Of a finished training that was damaged, the results alone are made again where its checkpoints are whole.
    """
    run = RunDirectory(directory)
    started = beside(directory, "started.json")
    there = [path for path in (run.best, run.last) if path.is_file()]
    try:
        for path in there:
            require_whole(path)
        is_whole = run.last.is_file() and bool(read_checkpoint(run.last))
    except UserError as error:
        log.warning("%s: starting afresh", error)
        is_whole = False
    if read_json(started) == request["identity"] and is_whole and not request["evaluated"]:
        if held.is_damaged:
            move_aside(run.results)
    elif started.is_file() or run.holds_run:
        move_aside(directory, is_ours=True)
    write_json(started, request["identity"])


def _run(config: Config, request: dict[str, Any]) -> None:
    from cliplab.build import check

    if not request["evaluated"]:
        dataset = check(config)
        from cliplab.execute import train

        train(config, dataset)
        return
    given = request["checkpoint"]
    checkpoint = checkpoint_of(given) if given is not None else None
    stored = read_checkpoint(checkpoint) if checkpoint is not None else None
    dataset = check(config, train=False, from_checkpoint=stored is not None)
    from cliplab.execute import evaluate

    evaluate(config, dataset, checkpoint, stored, run_directory(config))


if __name__ == "__main__":
    run_script(main)
