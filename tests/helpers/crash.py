"""A training run that saves after every step and may be killed in the middle of one: ``python crash.py FILE STEP``."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import fused_pref as fp

STEPS = 6
UPDATES = ("forward", "step")


def train(path: Path, killed: int | None = None) -> dict[str, Tensor]:
    """Train from where ``path`` left off, to the end or to the backward of a step.

    It gives the weight, and δ and its counts of two losses, whose shifts are updated in the forward and by a step.
    """
    torch.manual_seed(0)
    head = nn.Linear(8, 50)
    shifts = {update: fp.RewardShift("ema", update=update) for update in UPDATES}
    losses = nn.ModuleDict({f"of {update}": fp.LinearBCOLoss(delta=shift) for update, shift in shifts.items()})
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    parts = {"head": head, "losses": losses, "optimizer": optimizer}
    start = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        start = saved.pop("step")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    for step in range(start, STEPS):
        generator = torch.Generator().manual_seed(step)
        hidden = torch.randn(4, 6, 8, generator=generator).requires_grad_()
        labels = torch.randint(0, 50, (4, 6), generator=generator)
        desirable = torch.rand(4, generator=generator) < 0.5
        if step == killed:
            hidden.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGKILL))
        tensors = (hidden, head.weight, labels, desirable, torch.full((4,), -20.0))
        torch.stack([loss(*tensors, bias=head.bias).loss for loss in losses.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for shift in shifts.values():
            shift.step()
        partial = path.with_suffix(".partial")
        torch.save({"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}}, partial)
        partial.replace(path)
    return {**head.state_dict(), **losses.state_dict()}


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
