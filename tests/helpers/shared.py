"""Work that several tests look at and that takes long: done once, also where several workers run them."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

# The folder of a run of pytest, which its workers inherit.
FOLDER = "FUSED_PREF_SHARED"


def begin() -> None:
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="fused_pref-")


def end() -> None:
    shutil.rmtree(os.environ.pop(FOLDER))


def once(name: str, work: Callable[[], Any]) -> Any:
    """What the work gives: the first worker that asks does it, others wait for it and read it."""
    path = Path(os.environ[FOLDER]) / f"{name}.pt"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            torch.save(work(), path)
        return torch.load(path, weights_only=False)
