"""Modules, outputs and metrics."""

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from harness import make_batch, reference_logps

import fused_pref as fp

BATCH = make_batch(4, 5, 11)
REF = reference_logps(4)
DESIRABLE = torch.tensor([True, False, True, True])


def same(first: Any, second: Any) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_modules_equal_functions() -> None:
    cpo = {"beta": 0.3, "loss_type": "simpo", "alpha": 0.1, "temperature": 0.8, "logits_mean": None}
    args = (BATCH.logits, BATCH.labels)
    assert same(fp.CPOLoss(**cpo)(*args), fp.cpo_loss(*args, **cpo))
    assert same(fp.DPOLoss(label_smoothing=0.1)(*args, REF), fp.dpo_loss(*args, REF, label_smoothing=0.1))
    bco = {"delta": 0.5, "reduction": "class_mean", "softcap": 4.0}
    args = (*args, DESIRABLE, REF)
    assert same(fp.BCOLoss(**bco)(*args), fp.bco_loss(*args, **bco))


def test_keywords_per_call() -> None:
    logits, labels, ends = BATCH.packed([4, 5, 2, 3])
    module = fp.CPOLoss(pair_normalizer=3)
    expected = fp.cpo_loss(logits, labels, cu_seqlens=ends, pair_normalizer=9, token_normalizer=50)
    assert same(module(logits, labels, cu_seqlens=ends, pair_normalizer=9, token_normalizer=50), expected)
    module = fp.BCOLoss(reduction="class_mean")
    weights = torch.rand(4)
    keywords = {"cu_seqlens": ends, "sample_weight": weights, "class_normalizer": (5, 6)}
    expected = fp.bco_loss(logits, labels, DESIRABLE, REF, reduction="class_mean", **keywords)
    assert same(module(logits, labels, DESIRABLE, REF, **keywords), expected)


def test_normalizers_make_accumulation_exact() -> None:
    """Two microbatches with global counts sum to the loss and gradient of one batch."""
    batch = make_batch(8, 6, 13, dtype=torch.float64)
    logits = batch.logits.requires_grad_()
    halves = [torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])]
    tokens = (batch.labels[:4, 1:] != -100).sum()
    parts = [fp.cpo_loss(logits[h], batch.labels[h], pair_normalizer=4, token_normalizer=tokens).loss for h in halves]
    whole = fp.cpo_loss(logits, batch.labels).loss
    torch.testing.assert_close(sum(parts), whole)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (sum(parts), whole)]
    torch.testing.assert_close(*grads)
    ref, desirable = reference_logps(8), torch.arange(8) < 3
    for reduction, normalizer in (("mean", {"sequence_normalizer": 8}), ("class_mean", {"class_normalizer": (3, 5)})):
        keywords: dict[str, Any] = {"reduction": reduction, **normalizer}
        parts = [fp.bco_loss(logits[h], batch.labels[h], desirable[h], ref[h], **keywords).loss for h in halves]
        torch.testing.assert_close(
            sum(parts), fp.bco_loss(logits, batch.labels, desirable, ref, reduction=reduction).loss
        )


def test_pair_metrics() -> None:
    output = fp.cpo_loss(BATCH.logits, BATCH.labels)
    metrics = output.metrics()
    assert set(metrics) == {
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
        "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "nll_loss",
    }  # fmt: skip
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    torch.testing.assert_close(metrics["rewards/margins"], (output.chosen_rewards - output.rejected_rewards).mean())
    wins = [bool(c > r) for c, r in zip(output.chosen_rewards, output.rejected_rewards, strict=True)]
    assert metrics["rewards/accuracies"] == sum(wins) / len(wins)
    assert "logits/chosen" not in fp.cpo_loss(BATCH.logits, BATCH.labels, logits_mean=None).metrics()


def test_bco_metrics() -> None:
    output = fp.bco_loss(BATCH.logits, BATCH.labels, DESIRABLE, REF, delta=0.25)
    metrics = output.metrics()
    assert len(output) == 8
    assert (metrics["count/chosen"], metrics["count/rejected"], metrics["delta"]) == (3, 1, 0.25)
    torch.testing.assert_close(metrics["rewards/chosen"], output.rewards[DESIRABLE].mean())
    torch.testing.assert_close(metrics["logps/rejected_sum"], output.logps[~DESIRABLE].sum())
    torch.testing.assert_close(metrics["logits/chosen"], BATCH.logits[DESIRABLE].mean())
    torch.testing.assert_close(metrics["logits/chosen_sum"], BATCH.logits[DESIRABLE].mean() * 3)
    torch.testing.assert_close(metrics["rewards/margins"], metrics["rewards/chosen"] - metrics["rewards/rejected"])
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    lonely = fp.bco_loss(BATCH.logits, BATCH.labels, torch.ones(4, dtype=torch.bool), REF).metrics()
    assert lonely["rewards/margins"] == lonely["rewards/rejected"] == 0


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies(copier: str) -> None:
    def through_torch(module: Any) -> Any:
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        buffer.seek(0)
        fresh = fp.BCOLoss(delta=fp.RewardShift("ema"))
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        return fresh

    make = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": through_torch}
    module = fp.BCOLoss(delta=fp.RewardShift("ema"))
    module(BATCH.logits, BATCH.labels, DESIRABLE, REF)
    copied = make[copier](module)
    args = (BATCH.logits * 2, BATCH.labels, DESIRABLE, REF)
    assert same(copied(*args), module(*args))
    assert copied.delta is not module.delta


def test_a_copied_shift_is_of_its_class() -> None:
    """With what a subclass adds, its own state, and the group, which nothing can copy."""

    class Noted(fp.RewardShift):
        def __init__(self, note: str) -> None:
            super().__init__("ema", update="step")
            self.note, self.process_group = note, threading.Lock()

    module = Noted("mine").eval()
    module.mean += 2
    copied = copy.deepcopy(module)
    assert (type(copied), copied.note, copied.kind, copied.update) == (Noted, "mine", "ema", "step")
    assert copied.process_group is module.process_group
    assert not copied.training
    module.mean += 1
    assert copied.mean.tolist() == [2, 2]
    assert module.__getstate__()["process_group"] is None


def test_a_compiled_shift_is_copied_without_its_graphs() -> None:
    """As PyTorch copies other modules."""
    module = fp.RewardShift("ema")
    module._compiled_call_impl = lambda: None  # what ``module.compile()`` sets; it cannot be pickled
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert "_compiled_call_impl" not in vars(copied)


def test_module_repr_shows_what_is_set() -> None:
    assert "beta=0.2" in repr(fp.CPOLoss(beta=0.2))
    assert "RewardShift('ema', decay=0.5" in repr(fp.BCOLoss(delta=fp.RewardShift("ema", decay=0.5)))
    assert "delta=0.5" in repr(fp.BCOLoss(delta=0.5))
