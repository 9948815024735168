"""The reference on degenerate and non-finite input."""

import math
from typing import Any

import pytest
import torch
from closed_forms import TRANSFORMS, assert_same, double, every_objective, objective
from harness import IGNORE, Batch

from fused_pref import reference


@every_objective
@pytest.mark.parametrize("cover", ["all", "completion"])
def test_nothing_to_score(name: str, keywords: dict[str, Any], cover: str) -> None:
    batch = double(4, 5, 6, mask="all")
    output, grad = objective(name, batch, logits_mean=cover, **keywords)
    assert all(value.isfinite().all() for value in output)
    assert output.loss.requires_grad
    assert grad.shape == batch.logits.shape
    assert not grad.any()
    if name not in ("bco_loss", "kto_loss"):
        assert output.nll_loss == 0
        assert not output.chosen_logps.any()
    assert (output.chosen_logits_mean == 0) == (cover == "completion")


@every_objective
def test_an_empty_completion_has_no_gradient(name: str, keywords: dict[str, Any]) -> None:
    output, grad = objective(name, double(4, 5, 6, mask="empty"), **{"beta": 0.01, **keywords})
    assert all(value.isfinite().all() for value in output)
    rejected = keywords.get("loss_type") != "sft"
    assert [bool(rows.any()) for rows in grad] == [True, True, False, rejected]
    logps = output.logps[2] if name in ("bco_loss", "kto_loss") else output.rejected_logps[0]
    assert logps == 0


@pytest.mark.parametrize("shape", [(0, 4, 5), (0, 0, 5), (2, 0, 5), (2, 1, 5)], ids=str)
@every_objective
def test_empty_shapes(shape: tuple[int, int, int], name: str, keywords: dict[str, Any]) -> None:
    batch = double(*shape, mask="none")
    assert reference.token_logps(batch.logits, batch.labels).shape == (shape[0], max(shape[1] - 1, 0))
    assert reference.token_logps(batch.logits, batch.labels, shift=False).shape == shape[:2]
    assert reference.sequence_logps(batch.logits, batch.labels).tolist() == [0.0] * shape[0]
    output, grad = objective(name, batch, **keywords)
    assert all(value.isfinite().all() for value in output)
    assert grad.shape == shape
    assert not grad.any()
    if shape[0] == 0:
        packed, _ = objective(
            name, Batch(batch.logits.view(0, 5), batch.labels.view(0)), cu_seqlens=torch.zeros(1, dtype=torch.int32),
            **keywords,
        )  # fmt: skip
        assert output.loss == packed.loss == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@every_objective
def test_unscored_positions_may_hold_anything(
    bad: float, transform: dict[str, float], name: str, keywords: dict[str, Any]
) -> None:
    batch = double(4, 5, 6)
    batch.labels[1, 2] = IGNORE
    clean, clean_grad = objective(name, batch, logits_mean="completion", **keywords, **transform)
    batch.logits[1, 1] = batch.logits[:, -1] = bad
    output, grad = objective(name, batch, logits_mean="completion", **keywords, **transform)
    assert all(torch.equal(value, other) for value, other in zip(output, clean, strict=True))
    assert torch.equal(grad, clean_grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sequence", [0, 3])
@every_objective
def test_non_finite_logits_show(bad: float, sequence: int, name: str, keywords: dict[str, Any]) -> None:
    batch = double(4, 5, 6, mask="none")
    batch.logits[sequence, 2, 4] = bad
    output, _ = objective(name, batch, **keywords)
    # The third sequence is a rejected one, which sft does not look at.
    assert output.loss.isnan() == (keywords.get("loss_type") != "sft" or sequence == 0)
    tokens = reference.token_logps(batch.logits, batch.labels)
    assert tokens.isnan().nonzero().tolist() == [[sequence, 2]]
    sums = reference.sequence_logps(batch.logits, batch.labels)
    assert sums.isnan().nonzero().flatten().tolist() == [sequence]


@every_objective
def test_masked_vocabulary_entries(name: str, keywords: dict[str, Any]) -> None:
    """A −inf logit is an entry that is not there."""
    batch = double(4, 5, 9, mask="none")
    batch.labels.clamp_(max=6)
    batch.logits[..., 7:] = -torch.inf
    ours, grad = objective(name, batch, logits_mean=None, **keywords)
    small = Batch(batch.logits[..., :7], batch.labels)
    truth, true_grad = objective(name, small, logits_mean=None, **keywords)
    assert_same(ours.loss, truth.loss)
    assert_same(grad[..., :7], true_grad)
    assert not grad[..., 7:].any()


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_targets_of_probability_zero(side: str) -> None:
    batch = double(2, 3, 5, mask="none")
    sequence = 0 if side == "chosen" else 1
    batch.logits[sequence, 0, batch.labels[sequence, 1]] = -torch.inf
    assert reference.token_logps(batch.logits, batch.labels)[sequence, 0] == -torch.inf
    output, grad = objective("cpo_loss", batch, cpo_alpha=0.0)
    assert output.loss == (torch.inf if side == "chosen" else 0)
    assert grad.isfinite().all()


@pytest.mark.parametrize("label", [7, 2**31 - 1, -1, -101])
@every_objective
def test_labels_outside_the_vocabulary(label: int, name: str, keywords: dict[str, Any]) -> None:
    """NaN there and nowhere else, and counted as scored; a first label is not scored with shift."""
    batch = double(4, 5, 7)
    scored = batch.labels[0, 1:] != IGNORE
    batch.labels[0, 0] = label
    clean, _ = objective(name, batch, logits_mean="completion", **keywords)
    assert clean.loss.isfinite()
    batch.labels[0, 2] = label
    assert scored[1]
    tokens = reference.token_logps(batch.logits, batch.labels)
    assert tokens.isnan().nonzero().tolist() == [[0, 1]]
    output, grad = objective(name, batch, logits_mean="completion", **keywords)
    assert output.loss.isnan()
    assert grad[0, 1].isnan().all()
    assert torch.equal(output.chosen_logits_mean, clean.chosen_logits_mean)
