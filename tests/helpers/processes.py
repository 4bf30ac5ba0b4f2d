"""Jobs in two processes on gloo, as torchrun would start them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2


def in_two_processes(folder: Path, *jobs: Callable[[int], Any]) -> list:
    """The results of each job, of each process."""
    torch.multiprocessing.spawn(_work, (str(folder), jobs), nprocs=WORLD)
    return list(zip(*(torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)), strict=True))


def _work(rank: int, folder: str, jobs: tuple[Callable[[int], Any], ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.save([job(rank) for job in jobs], f"{folder}/{rank}.pt")
    dist.barrier()
    # Without the interpreter's shutdown: a thread of gloo that then lets go of its last tensor aborts the process.
    os._exit(0)
