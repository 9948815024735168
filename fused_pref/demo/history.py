"""What the demo keeps of a training."""

from dataclasses import dataclass, field

import torch

from fused_pref.demo.objectives import Objective
from fused_pref.doctor import LINEAR_BOUNDS

VALUE_BOUND, GRADIENT_BOUND = LINEAR_BOUNDS[torch.float32]


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
    """Errors of the first step against the reference in float64, relative to max(1, |loss|) and to the gradient."""

    loss_error: float
    gradient_error: float

    @property
    def holds(self) -> bool:
        """Whether both are within the numerics contract of the linear head in float32."""
        return self.loss_error <= VALUE_BOUND and self.gradient_error <= GRADIENT_BOUND


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
