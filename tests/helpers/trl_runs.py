"""Runs of trainers that are compared: every logged number, and the parameters afterwards."""

from typing import Any

import pytest
import torch

UNTIMED = ("runtime", "per_second")


def assert_same_run(ours: Any, stock: Any, tolerance: float = 2e-3, more: frozenset[str] = frozenset()) -> None:
    """All numbers that TRL logs, and the parameters after the run; ``trainer.start`` is the model before.

    Args:
        ours, stock: trainers.
        tolerance: relative.
        more: names that ours logs beside TRL's.
    """
    assert len(ours.state.log_history) == len(stock.state.log_history) >= 3
    for mine, theirs in zip(ours.state.log_history, stock.state.log_history, strict=True):
        assert {name for name in mine if name.removeprefix("eval_") not in more} == theirs.keys()
        for name in theirs:
            if not name.endswith(UNTIMED):
                assert mine[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance / 2), name
    start, mine, theirs = (flat(model) for model in (stock.start, ours.model, stock.model))
    assert (theirs - start).norm() > 0
    assert (mine - theirs).norm() <= tolerance * (theirs - start).norm()


def flat(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
