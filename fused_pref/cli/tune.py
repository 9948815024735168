"""The search for launch configurations, which is opt-in, and the file that keeps what it found.

With ``FUSED_PREF_TUNE=1``, set before the library is imported, the first call of each (kernel, dtype, size) on a device
times the candidates of :mod:`fused_pref.ops.triton.configs` and takes the fastest from then on; without it the defaults
are taken and nothing here is read. What was found is saved in ``tune.json`` in the folder that ``FUSED_PREF_CACHE``
names, else in ``fused_pref`` in the user's cache folder, by name of the device and release of Triton. :func:`search`
does the same for one step and gives every time. Kernels that cannot be launched twice on the same memory keep their
defaults.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.errors import TritonError

from fused_pref.cli import cache
from fused_pref.ops.triton import configs
from fused_pref.ops.triton.configs import AnyConfig, Config, Tile
from fused_pref.ops.triton.launch import on

# A launch → milliseconds.
Timer = Callable[[Callable[[], object]], Any]
# Triton's, which needs a GPU: interpreted kernels have no time.
DO_BENCH = triton.testing.do_bench


@dataclass(frozen=True)
class Timing:
    """One candidate of one search.

    Attributes:
        key: what it was searched for, see :func:`key_of`.
        config: the candidate; the first of a key is the default.
        milliseconds: its time; infinite where it does not compile or fit.
    """

    key: str
    config: Config | Tile
    milliseconds: float


@dataclass
class Search:
    """A search under way."""

    timer: Timer
    timings: list[Timing]


_known: dict[str, Config | Tile] = {}
# One for the process: backward passes run in threads of their own.
_search: Search | None = None


def enabled() -> bool:
    """Whether to search: asked for, and launches can be timed here."""
    if _search is None and os.environ.get("FUSED_PREF_TUNE") != "1":
        return False
    captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return not captured and not torch.compiler.is_compiling()


def key_of(kernel: str, device: torch.device, dtype: torch.dtype, size: int) -> str:
    """What a configuration is saved for; ``size`` is D of a product, V of a kernel that streams."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return " | ".join((name, f"triton {triton.__version__}", kernel, str(dtype).removeprefix("torch."), str(size)))


def tuned(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    size: int,
    default: AnyConfig,
    candidates: Iterable[AnyConfig],
    launch: Callable[[AnyConfig], object],
) -> AnyConfig:
    """See :func:`fused_pref.ops.triton.configs.chosen`: as this process, the file, or a search now knows it."""
    if not enabled() or device.type == "meta" or (device.type == "cpu" and _timer() is DO_BENCH):
        return default
    key, choices = key_of(kernel, device, dtype, size), [default, *(c for c in candidates if c != default)]
    searched = _search is not None and key in {timing.key for timing in _search.timings}
    if key not in _known or not (_search is None or searched):
        saved = None if _search else load().get(key)
        # Nothing is launched that this release would not try by itself.
        _known[key] = next((c for c in choices if asdict(c) == saved), None) or _fastest(key, device, choices, launch)
    return _known[key]  # type: ignore[return-value]


def search(step: Callable[[], object], *, timer: Timer | None = None) -> list[Timing]:
    """Search for every kernel that ``step`` launches, whatever was found before, and keep what is found.

    Args:
        step: a forward, or a forward and backward.
        timer: gives the milliseconds of a launch; None: Triton's ``do_bench``.

    Returns:
        A row per kernel and candidate, in the order of their launches; the first of a key is the default.
    """
    global _search
    before, _search = _search, Search(timer or triton.testing.do_bench, [])
    try:
        step()
        return _search.timings
    finally:
        _search = before


def _fastest(
    key: str, device: torch.device, choices: list[AnyConfig], launch: Callable[[AnyConfig], object]
) -> AnyConfig:
    timer = _timer()
    with on(device):  # whose time is measured
        timings = [Timing(key, config, time_of(timer, launch, config)) for config in choices]
    if _search is not None:
        _search.timings.extend(timings)
    best = min(range(len(choices)), key=lambda i: timings[i].milliseconds)
    store(key, choices[best])
    return choices[best]


def _timer() -> Timer:
    return triton.testing.do_bench if _search is None else _search.timer


def time_of(timer: Timer, launch: Callable[[AnyConfig], object], config: AnyConfig) -> float:
    """What the timer says of a launch; infinite where it does not compile or fit."""
    try:
        return float(timer(lambda: launch(config)))
    except TritonError:  # more shared memory than there is, or code that does not compile
        return float("inf")


def cache_path() -> Path:
    """The file that keeps what was found."""
    return cache.path_of("tune.json")


def load() -> dict[str, Any]:
    """Key → fields of a configuration; nothing, with a warning, from a file that is not one of these."""
    return cache.read(cache_path()) or {}


def store(key: str, config: Config | Tile) -> None:
    """Add to the file, see :func:`fused_pref.cli.cache.add`."""
    cache.add(cache_path(), key, asdict(config))


configs.chooser = tuned
