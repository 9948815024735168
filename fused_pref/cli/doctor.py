"""``python -m fused_pref doctor``: which backend would be used here and why, and whether it is right."""

import argparse
import importlib.metadata
import itertools
import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fused_pref as fp
from fused_pref.cli import constants
from fused_pref.ops import backend

# Bounds of docs/numerics.md: values, and gradients beyond what rounding them to the dtype costs.
VALUE_BOUND, GRADIENT_BOUND = 2e-5, 5e-5
# The same through the linear head, whose gradients carry the rounding of its products; in 16 bits those round, too.
LINEAR_BOUNDS = {torch.float32: (VALUE_BOUND, 1e-4), torch.bfloat16: (2e-2, 2e-2)}

EPILOG = """\
For each device: the backend and why it is taken, whether plans follow from figures that were measured
here, and the errors of every objective against the float64 reference. The exit status is 1 if one is
too large.

example:
  %(prog)s

See docs/faq.md#machines for the devices that are supported.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 if every self-check holds, else 1."""
    print(f"fused_pref {fp.__version__}, Python {platform.python_version()} on {platform.platform()}")
    # With its build, which its package may leave out.
    print(f"  torch {torch.__version__}")
    for package in ("triton", "transformers", "trl", "scikit-learn"):
        try:
            print(f"  {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {package} is not installed")
    worst = 0
    for device in devices():
        obstacle = backend.triton_obstacle(device)
        chosen = backend.resolve("auto", torch.float32, device)
        print(f"{describe(device)}: backend {chosen!r}" + (f", because {obstacle}" if obstacle else ""))
        for line in constants.notes(device):
            print(f"  {line}")
        for name, dtype, value, gradient in self_checks(device):
            linear = name.startswith("linear_")
            value_bound, gradient_bound = LINEAR_BOUNDS[dtype] if linear else (VALUE_BOUND, GRADIENT_BOUND)
            good = value <= value_bound and gradient <= gradient_bound
            worst |= not good
            kind = str(dtype).removeprefix("torch.")
            print(
                f"  {'ok  ' if good else 'BAD '} {name} {kind}: value error {value:.1e}, gradient error {gradient:.1e}"
            )
    print(
        "every self-check holds" if not worst else "a self-check failed: results on this machine are not to be trusted"
    )
    return int(worst)


def devices() -> list[torch.device]:
    """The CPU and the first device of each accelerator that computes in float64."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type != "mps":
            found.append(torch.device(accelerator.type, 0))
    return found


def describe(device: torch.device) -> str:
    """Name of a device."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def self_checks(device: torch.device) -> Iterator[tuple[str, torch.dtype, float, float]]:
    """(objective, dtype, value error, gradient error) against the float64 reference on a small batch."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 9, 4099, generator=generator) * 3
    hidden, weight = torch.randn(4, 9, 64, generator=generator), torch.randn(4099, 64, generator=generator) * 0.3
    labels = torch.randint(0, 4099, (4, 9), generator=generator)
    labels[:, :2] = -100
    ref_logps = torch.randn(4, generator=generator) * 4 - 40
    desirable = torch.tensor([True, False, True, False])
    cases: dict[str, tuple[Any, ...]] = {
        "cpo_loss": (labels,),
        "dpo_loss": (labels, ref_logps),
        "bco_loss": (labels, desirable, ref_logps),
        "kto_loss": (labels, desirable, ref_logps),
    }
    for dtype, linear in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        for name, tensors in cases.items():
            own = f"linear_{name}" if linear else name
            leaves = (hidden, weight) if linear else (logits,)
            yield own, dtype, *errors(own, [x.to(device, dtype) for x in leaves], [x.to(device) for x in tensors])


def errors(name: str, leaves: list[Tensor], rest: list[Tensor]) -> tuple[float, float]:
    """Value error, and relative gradient error beyond that of rounding, of an objective against the reference."""
    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    truth = [leaf.double().requires_grad_() for leaf in leaves]
    loss, true_loss = getattr(fp, name)(*ours, *rest).loss, getattr(fp.reference, name)(*truth, *rest).loss
    excesses = []
    pairs = zip(torch.autograd.grad(loss, ours), torch.autograd.grad(true_loss, truth), strict=True)
    for gradient, true_gradient in pairs:
        rounding = (true_gradient.to(gradient.dtype).double() - true_gradient).norm()
        excesses.append(((gradient.double() - true_gradient).norm() - 1.05 * rounding) / true_gradient.norm())
    worst = torch.stack(excesses).amax().clamp(min=0)  # NaN stays NaN
    return abs(loss.item() - true_loss.item()) / max(1.0, abs(true_loss.item())), worst.item()
