"""What the demo keeps of a training."""

from dataclasses import dataclass, field

import torch

from fused_pref.cli.demo.objectives import Objective
from fused_pref.cli.doctor import LINEAR_BOUNDS


@dataclass(frozen=True)
class Point:
    """Held-out measures after ``step`` steps; a tie counts as half right.

    Attributes:
        step: steps taken.
        accuracy: share of pairs whose chosen completion has the higher log-prob per token.
        reward_accuracy: share of pairs whose chosen completion has the higher reward.
        margin: mean of the chosen reward minus the rejected one.
    """

    step: int
    accuracy: float
    reward_accuracy: float
    margin: float


@dataclass(frozen=True)
class Check:
    """Errors of the first step against the reference in float64, relative to max(1, |loss|) and to the gradient.

    Attributes:
        loss_error: of the loss.
        gradient_error: of the gradient of the last hidden states.
        dtype: of the products in the step: bfloat16 under mixed precision.
    """

    loss_error: float
    gradient_error: float
    dtype: torch.dtype = torch.float32

    @property
    def bounds(self) -> tuple[float, float]:
        """What either error may be at most by the numerics contract of the linear head."""
        return LINEAR_BOUNDS[self.dtype]

    @property
    def holds(self) -> bool:
        """Whether both errors are within their bounds."""
        loss, gradient = self.bounds
        return self.loss_error <= loss and self.gradient_error <= gradient


@dataclass
class History:
    """What happened in a training: losses of the steps taken, and evaluations, the first before the first step."""

    objective: Objective
    planned: int
    check: Check | None = None
    losses: list[float] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    @property
    def stopped(self) -> bool:
        """Whether the deadline came before the last step."""
        return len(self.losses) < self.planned
