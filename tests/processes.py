"""Work in several real processes that form one gloo group."""

from __future__ import annotations

import gc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(work: Callable[..., None], directory: Path, *args: Any, size: int = 2) -> None:
    """Run ``work(rank, *args)`` in so many processes; what one raises is raised here.

    What ``work`` made is gone before the group is: a ``DistributedDataParallel`` that outlives its group joins gloo's
    threads while it holds the interpreter lock that they wait for.
    """
    mp.spawn(_run, args=(work, size, str(directory), args), nprocs=size, join=True)


def _run(rank: int, work: Callable[..., None], size: int, directory: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/group", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    work(rank, *args)
    gc.collect()  # a DistributedDataParallel stands in cycles
    dist.barrier()
    dist.destroy_process_group()
