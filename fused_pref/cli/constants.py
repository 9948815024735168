"""Figures of this machine in place of the planner's constants: opt-in, and kept on disk.

``python -m fused_pref tune`` measures them and keeps them in ``devices.json`` in the cache folder, by name of the
processor. With ``FUSED_PREF_TUNE=1``, set before the library is imported, the planner takes those of the processor at
hand; without it nothing here is read, and plans follow from constants alone. A process reads the file once, so that
calls of one size take one plan. Vocab-parallel heads keep the constants: their ranks have to agree.
"""

import datetime
import functools
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fused_pref.cli import cache
from fused_pref.ops import devices
from fused_pref.ops.devices import Device


def path() -> Path:
    """The file that keeps the figures."""
    return cache.path_of("devices.json")


def key_of(device: torch.device) -> str:
    """What figures are kept for: a processor, what PyTorch may use of it, and PyTorch's version."""
    if device.type == "cpu":
        isa = os.environ.get("ONEDNN_MAX_CPU_ISA")
        parts = [_processor(), torch.backends.cpu.get_cpu_capability(), *([f"oneDNN {isa}"] if isa else [])]
        parts.append(f"{torch.get_num_threads()} threads")
    else:
        parts = [str(torch.get_device_module(device).get_device_name(device))]
    return " | ".join([*parts, f"torch {torch.__version__}"])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load(device: torch.device) -> dict[str, Any] | None:
    """The entry of this device, if there is one that :func:`with_figures` takes."""
    entry = (cache.read(path()) or {}).get(key_of(device))
    return entry if with_figures(entry, devices.CPU) is not None else None


def with_figures(entry: Any, constants: Device) -> Device | None:
    """A device with the figures of an entry in place of its own; None where it is not one of ours."""
    try:
        rates = {int(size): _positive(rate) for size, rate in entry["rates"].items()}
        epilogue = entry.get("epilogue")
        return replace(
            constants,
            rates={size: rates.get(size, rate) for size, rate in constants.rates.items()},
            bandwidth=_positive(entry["bandwidth"]),
            epilogue=constants.epilogue if epilogue is None else _positive(epilogue),
            measured=f"this machine, measured on {datetime.date.fromisoformat(entry['date'])}",
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _positive(number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
        raise ValueError(f"expected a positive number; got {number!r}")
    return float(number)


@functools.cache
def figures_at(device: torch.device, constants: Device) -> Device:
    """What the file has of a device, else the constants; one object, by which plans are remembered."""
    if device.type not in ("cpu", "cuda", "xpu"):
        return constants
    return with_figures(load(device), constants) or constants


def use() -> None:
    """Have the planner take what was measured."""
    devices.measured = figures_at


def notes(device: torch.device) -> Iterator[str]:
    """What the plans on a device that is here follow from, in lines."""
    entry = load(device)
    if entry is None:
        yield "planned by constants, not measured here: see python -m fused_pref tune"
        return
    found = f"figures measured on {entry['date']}"
    yield (
        f"planned by {found}" if devices.measured else f"planned by constants; {found} are used with FUSED_PREF_TUNE=1"
    )
    times = entry.get("milliseconds")
    if isinstance(times, dict) and all(isinstance(time, int | float) for time in times.values()):
        yield f"measured, {entry.get('sizes')}: " + ", ".join(f"{name} {time:.3g} ms" for name, time in times.items())
