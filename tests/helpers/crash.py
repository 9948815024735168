"""A training run that saves after every step and may be killed in the middle of one: ``python crash.py FILE STEP``."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import fused_pref as fp

STEPS = 6


def train(path: Path, update: str, killed: int | None = None) -> dict[str, Tensor]:
    """Train from where ``path`` left off, to the end or to the backward of a step; gives weight, δ and its counts."""
    torch.manual_seed(0)
    head = nn.Linear(8, 50)
    loss = fp.LinearBCOLoss(delta=fp.RewardShift("ema", update=update))
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    parts = {"head": head, "loss": loss, "optimizer": optimizer}
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
        output = loss(hidden, head.weight, labels, desirable, torch.full((4,), -20.0), bias=head.bias)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.delta.step()
        partial = path.with_suffix(".partial")
        torch.save({"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}}, partial)
        partial.replace(path)
    return {**head.state_dict(), **loss.state_dict()}


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
