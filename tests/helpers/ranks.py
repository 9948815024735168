"""Work done by several processes that gloo joins, and its results."""

import datetime
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Raised(str):
    """What a rank raised."""


def run_ranks(
    world: int, work: Callable[..., Any], *arguments: Any, seconds: float = 60.0, fork: bool = False
) -> list[Any]:
    """Results of ``work(rank, *arguments)``, a function of a module, on every rank.

    ``seconds`` bounds a collective. A rank that raises gives its exception's text as a :class:`Raised`. Ranks that are
    forked need not import anything again; where CUDA is in use, they cannot be.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        start = "fork" if fork and not torch.cuda.is_initialized() else "spawn"
        given = (world, port, folder, work, arguments, seconds)
        mp.start_processes(_rank, given, nprocs=world, start_method=start)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(
    rank: int, world: int, port: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...], seconds: float
) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
    try:
        result: Any = work(rank, *arguments)
    except Exception as error:
        traceback.print_exc()
        result = Raised(f"{type(error).__name__}: {error}")
    torch.save(result, Path(folder) / f"{rank}.pt")
    # Ranks that wait for one that has raised are let go by their own timeout.
    if not isinstance(result, Raised):
        dist.barrier()
        dist.destroy_process_group()
    # Not by the interpreter's end, where a thread that PyTorch has left behind now and then aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
