"""Functions of tests in several processes that form one gloo group, as a multi-process run does."""

import datetime
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing


def in_processes(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returned in each of `world` processes, by rank."""
    root = str(Path(__file__).parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)  # the processes import the test that `function` stands in as `tests....`
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_join, (world, folder, function, arguments), nprocs=world)
        return [torch.load(Path(folder) / str(rank)) for rank in range(world)]


def _join(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    address = f"file://{folder}/rendezvous"
    distributed.init_process_group("gloo", address, timeout=timeout, world_size=world, rank=rank)
    torch.save(function(rank, *arguments), Path(folder) / str(rank))
    distributed.barrier()
    distributed.destroy_process_group()
