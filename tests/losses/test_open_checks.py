"""Objectives of the user's: what checks see, and what is taken and warned of."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import make_batch, make_hidden, run
from torch import Tensor

import fused_pref as fp


def sigmoid(chosen: fp.Sequences, rejected: fp.Sequences) -> Tensor:
    return -F.logsigmoid(0.1 * (chosen.logps - rejected.logps))


COUPLED: dict[str, Callable[[fp.Sequences, fp.Sequences], Tensor]] = {
    "the first unit": lambda c, r: sigmoid(c, r) + c.logps[0].detach(),
    "those before": lambda c, r: sigmoid(c, r) + c.logps.cumsum(0),
    "slopes alone": lambda c, r: sigmoid(c, r) + (c.logps.mean() - c.logps.mean().detach()),
    "chance": lambda c, r: sigmoid(c, r) * torch.rand(len(c.logps), dtype=torch.float64),
}


@pytest.mark.parametrize("kind", COUPLED)
def test_checks_see_what_couples_units(kind: str) -> None:
    batch = make_hidden(8, 5, 12, 29)
    with fp.checks(), pytest.raises(ValueError, match="depends on it alone"):
        fp.linear_preference_loss(batch.hidden.requires_grad_(), batch.weight, batch.labels, COUPLED[kind])


@pytest.mark.parametrize("unit", [2, 1, None])
def test_losses_of_any_floating_dtype(unit: int | None) -> None:
    batch = make_hidden(4, 5, 12, 29)

    def objective(*sequences: fp.Sequences, dtype: torch.dtype = torch.float64) -> Tensor:
        losses = torch.tanh(sequences[0].average)
        return (losses if unit else losses.mean()).to(dtype)

    hidden, weight, labels = batch.hidden.requires_grad_(), batch.weight, batch.labels
    truth = fp.linear_preference_loss(hidden, weight, labels, objective, unit=unit)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        output = fp.linear_preference_loss(hidden, weight, labels, partial(objective, dtype=dtype), unit=unit)
        assert output.loss.dtype == output.losses.dtype == torch.float32
        torch.testing.assert_close(output.loss, truth.loss, rtol=1e-2, atol=1e-2)
        output.loss.backward()


def test_parameters_of_an_objective_are_warned_of() -> None:
    module: torch.nn.Module = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="the parameters of objective get no gradient"):
        fp.LinearPreferenceLoss(module)
    batch = make_batch(4, 5, 9, mask="none")

    class Scaled(torch.nn.Linear):
        def forward(self, chosen: fp.Sequences, rejected: fp.Sequences) -> torch.Tensor:
            return self.bias[0] * (rejected.logps - chosen.logps)

    module = Scaled(2, 2)
    with pytest.warns(UserWarning, match="the parameters of objective get no gradient") as warned:
        fp.preference_loss(batch.logits, batch.labels, module)
    assert [entry.filename for entry in warned] == [__file__]
    fp.PreferenceLoss(module)(batch.logits, batch.labels)  # once for a module
    with pytest.warns(UserWarning, match="the parameters of objective get no gradient") as warned:
        fp.linear_preference_loss(torch.randn(4, 5, 3), torch.randn(9, 3), batch.labels, Scaled(2, 2))
    assert [entry.filename for entry in warned] == [__file__]
    fp.PreferenceLoss(Scaled(2, 2).requires_grad_(False))


def test_a_reference_that_was_not_given() -> None:
    batch = make_batch(4, 5, 9, mask="none")

    def objective(chosen: fp.Sequences, rejected: fp.Sequences) -> torch.Tensor:
        return rejected.logps - rejected.ref_logps + chosen.logps  # type: ignore[operator]

    with pytest.raises(TypeError, match="objective failed; ref_logps was not given, and is None in it: unsupported"):
        fp.preference_loss(batch.logits, batch.labels, objective)
    with pytest.raises(TypeError, match="ref_logps was not given, and is None in it: 'NoneType' object has no attr"):
        fp.preference_loss(batch.logits, batch.labels, lambda w, l: w.logps - w.ref_logps.detach())


def test_a_nan_of_weight_0_is_not_hidden(backend: str) -> None:
    """Its gradient is NaN, and so is the loss; a token of probability 0 contributes nothing."""
    batch = make_batch(4, 5, 9, mask="none")
    weight = torch.ones(4, 5)
    weight[1, 3] = 0
    batch.logits[1, 2, batch.labels[1, 3]] = -torch.inf
    output, grad = run(fp.cpo_loss, batch.logits, batch.labels, token_weight=weight, logits_mean=None, backend=backend)
    assert output.loss.isfinite()
    assert grad.isfinite().all()
    batch.logits[1, 2] = torch.nan
    output, grad = run(fp.cpo_loss, batch.logits, batch.labels, token_weight=weight, logits_mean=None, backend=backend)
    assert output.loss.isnan()
    assert grad[1, 2].isnan().any()
