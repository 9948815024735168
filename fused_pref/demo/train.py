"""Training a model with one objective: the step, the evaluation on held-out pairs, the check of the first step."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from fused_pref.demo.batches import Batch
from fused_pref.demo.model import hidden_states
from fused_pref.demo.objectives import Objective
from fused_pref.doctor import GRADIENT_BOUND, VALUE_BOUND

LEARNING_RATE, WARMUP_STEPS, LARGEST_GRADIENT = 2e-3, 5, 1.0
EVALUATIONS = 5
# Pairs of the first batch that the check compares: float64 logits of all would be the largest tensor of the demo.
CHECKED_PAIRS = 1
# Rewards start at 0 but for the rounding of float32 log-probs: a smaller difference is a tie.
TIE = 1e-5


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
        """Whether both are within the numerics contract."""
        return self.loss_error <= VALUE_BOUND and self.gradient_error <= GRADIENT_BOUND


@dataclass
class History:
    """What happened in a training."""

    objective: Objective
    planned: int
    check: Check | None = None
    losses: list[float] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def stopped(self) -> bool:
        """Whether the deadline came before the last step."""
        return len(self.losses) < self.planned


def train(
    model: LlamaForCausalLM,
    objective: Objective,
    batches: Iterator[Batch],
    heldout: list[Batch],
    steps: int,
    deadline: float,
    watch: Callable[[History], None],
) -> History:
    """Train for ``steps`` steps, evaluating at the ends and in between, or until the deadline is near.

    Args:
        model: changed in place.
        objective: CPO or BCO for this model.
        batches: of pairs to train on, without end.
        heldout: held-out pairs.
        steps: at least 1; one is always taken.
        deadline: of ``time.monotonic()``; no step begins that would probably end, with the last evaluation, later.
        watch: called after every evaluation and step.
    """
    started = time.monotonic()
    history = History(objective, steps)
    inputs = [objective.inputs(batch) for batch in heldout]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))

    def evaluate_now() -> float:
        began = time.monotonic()
        history.points.append(evaluate(model, objective, heldout, inputs, step=len(history.losses)))
        watch(history)
        return time.monotonic() - began

    evaluation = evaluate_now()
    for step in range(1, steps + 1):
        began = time.monotonic()
        batch = next(batches)
        if history.check is None:
            history.check = check_step(model, objective, batch)
        history.losses.append(training_step(model, objective, batch, optimizer))
        schedule.step()
        watch(history)
        now = time.monotonic()
        late = now + (now - began) + evaluation > deadline
        if late or step == steps or step % math.ceil(steps / EVALUATIONS) == 0:
            evaluation = evaluate_now()
        if late:
            break
    history.seconds = time.monotonic() - started
    return history


def forward(model: LlamaForCausalLM, objective: Objective, batch: Batch, inputs: tuple[Tensor, ...]) -> Any:
    """The objective's output for a batch."""
    return objective.loss(model.lm_head(hidden_states(model, batch)), *inputs, cu_seqlens=batch.cu_seqlens)


def training_step(
    model: LlamaForCausalLM, objective: Objective, batch: Batch, optimizer: torch.optim.Optimizer
) -> float:
    """One step of the optimiser; the loss before it."""
    model.train()
    loss = forward(model, objective, batch, objective.inputs(batch)).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, objective: Objective, heldout: list[Batch], inputs: list[tuple[Tensor, ...]], step: int
) -> Point:
    """Measures over all held-out pairs; without gradients, so that BCO's shift stays as it is."""
    model.eval()
    averages, rewards = [], []
    for batch, given in zip(heldout, inputs, strict=True):
        output = forward(model, objective, batch, given)
        averages.append(objective.logps(output) / batch.lengths.view(2, -1))
        rewards.append(objective.rewards(output))
    gap, margin = (chosen - rejected for chosen, rejected in (torch.cat(averages, 1), torch.cat(rewards, 1)))
    return Point(step, _accuracy(gap), _accuracy(margin), margin.mean().item())


def check_step(model: LlamaForCausalLM, objective: Objective, batch: Batch) -> Check:
    """Loss and gradient of the logits on a slice of the batch against the specification in float64."""
    batch = batch.first(CHECKED_PAIRS)
    with torch.no_grad():
        logits = model.lm_head(hidden_states(model, batch))
    inputs, packing = objective.inputs(batch), {"cu_seqlens": batch.cu_seqlens}
    truth = logits.double().requires_grad_()
    true_loss = objective.specification(truth, *inputs, **objective.keywords() | packing).loss
    (true_gradient,) = torch.autograd.grad(true_loss, truth)
    # A copy, because evaluating BCO with gradients moves its shift.
    loss = copy.deepcopy(objective.loss)(logits.requires_grad_(), *inputs, **packing).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    return Check(
        abs(loss.item() - true_loss.item()) / max(1.0, abs(true_loss.item())),
        ((gradient.double() - true_gradient).norm() / true_gradient.norm()).item(),
    )


def _accuracy(difference: Tensor) -> float:
    """Share of differences above 0, a tie counting as half."""
    return ((difference > TIE).double() + (difference.abs() <= TIE).double() / 2).mean().item()


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: a short warm-up, then down in a straight line."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1 - 0.9 * step / steps)
