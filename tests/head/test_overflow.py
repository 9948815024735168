"""More scored tokens than ``max_valid_tokens``: on a GPU, whose number the host does not read, everything is NaN."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import make_hidden
from head_cases import PLANS, only

import fused_pref as fp
from fused_pref.head import engine
from fused_pref.layout import ValidRows, valid_rows

BOUND = 30
WANTED = {"grouped": "hw", "vocab_major": "hw", "frozen_head": "h", "logprob": ""}


def rows_on_a_gpu(targets: torch.Tensor, cu_seqlens: Any, spec: Any, *others: Any) -> ValidRows:
    """What a GPU finds: the first rows, the counts of all."""
    rows = valid_rows(targets, cu_seqlens, replace(spec, max_valid_tokens=targets.numel()), *others)
    assert rows.indices is not None
    assert rows.padding is not None
    parts = (rows.indices[:BOUND], rows.targets[:BOUND], rows.counts, (), rows.padding[:BOUND])
    return ValidRows(*parts, torch.tensor(int(rows.counts.sum()) > BOUND))


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("plan", PLANS)
def test_everything_is_nan(
    plan: str, softcap: float | None, device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        monkeypatch.setattr(engine, "valid_rows", rows_on_a_gpu)
    batch = make_hidden(6, 7, 12, 29, device=device, mask="none")
    leaves = {name: getattr(batch, tensor) for name, tensor in (("h", "hidden"), ("w", "weight"))}
    wanted = [leaves[name].requires_grad_() for name in WANTED[plan]]
    with only(plan):
        output = fp.linear_cpo_loss(
            batch.hidden, batch.weight, batch.labels, max_valid_tokens=BOUND, softcap=softcap, backend=backend,
            logits_mean="completion", token_metrics=True,
        )  # fmt: skip
    for name in ("loss", "chosen_logps", "rejected_logps", "entropy", "accuracy"):
        assert getattr(output, name).isnan().all(), name
    if softcap:  # else they are those of hidden states and the mean of the weight
        assert output.chosen_logits_mean.isnan().all()
    for gradient in torch.autograd.grad(output.loss, wanted) if wanted else ():
        assert gradient.isnan().any()


def test_no_sum_reads_beyond_the_rows() -> None:
    counts = torch.tensor([3, 4, 5])
    rows = ValidRows(torch.arange(6), torch.zeros(6), counts, (), None, torch.tensor(True))
    assert rows.sums(torch.ones(6)).tolist() == [3, 3, 0]
