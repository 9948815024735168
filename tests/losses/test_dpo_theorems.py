"""What the papers prove of the DPO losses, and what TRL computes."""

import math
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closed_forms import assert_same, double
from harness import Batch, make_batch, run
from test_dpo_losses import MPO, near_reference
from torch import Tensor

import fused_pref as fp
from fused_pref import reference
from fused_pref.losses.pair import DPO_LOSS_TYPES

# The names that TRL has, too; a name of this library alone is not among them.
TRL_LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop", "sft", "aot", "aot_unpaired"),
)


def swapped(batch: Batch, ref: Tensor) -> tuple[Batch, Tensor]:
    """The batch whose labels of preference are flipped."""
    return Batch(batch.logits.roll(len(ref) // 2, 0), batch.labels.roll(len(ref) // 2, 0)), ref.roll(len(ref) // 2)


def loss_of(batch: Batch, ref: Tensor, **keywords: Any) -> Tensor:
    return fp.dpo_loss(batch.logits, batch.labels, ref, **keywords).loss


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.45])
def test_robust_is_unbiased_under_flips(epsilon: float) -> None:
    """Where a preference is flipped with probability ε, the mean of robust is DPO's loss of the true preferences."""
    batch = double(8, 6, 11)
    ref = near_reference(batch.logits, batch.labels)
    keywords = {"loss_type": "robust", "label_smoothing": epsilon, "beta": 0.6}
    expected = (1 - epsilon) * loss_of(batch, ref, **keywords) + epsilon * loss_of(*swapped(batch, ref), **keywords)
    assert_same(expected, loss_of(batch, ref, beta=0.6), 1e-9)


@pytest.mark.parametrize("delta", [-30.0, -1.0, 0.0, 0.4, 7.0])
def test_bco_pair_bounds_sigmoid(delta: float) -> None:
    batch = double(2, 6, 11)
    for noise in range(20):
        ref = near_reference(batch.logits, batch.labels) + torch.randn(
            2, generator=torch.Generator().manual_seed(noise)
        )
        bound = loss_of(batch, ref, loss_type="bco_pair", delta=delta, beta=1.0)
        assert bound >= loss_of(batch, ref, beta=1.0)


def test_minimisers() -> None:
    """Of sppo_hard r = ±½, of exo_pair σ(βΔ) = 1 − ε, of ipo Δ = 1/(2β): loss and gradient are 0."""
    batch, beta = double(4, 6, 11), 0.25
    logps = fp.sequence_logps(batch.logits, batch.labels)
    lengths = (batch.labels[:, 1:] != -100).sum(1)
    signs = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64)
    for keywords, ratios in (
        ({"loss_type": "sppo_hard"}, signs / beta),
        ({"loss_type": "exo_pair", "label_smoothing": 0.2}, signs * math.log(0.8 / 0.2) / beta),
        ({"loss_type": "ipo"}, signs * lengths / (2 * beta)),
    ):
        output, grad = run(fp.dpo_loss, batch.logits, batch.labels, logps - ratios, beta=beta, **keywords)
        assert abs(output.loss) < 1e-12
        assert grad.abs().max() < 1e-12


def test_a_mixture_is_the_mixture(backend: str) -> None:
    """Loss and gradient."""
    batch = make_batch(6, 4, 11)
    ref = near_reference(batch.logits, batch.labels)
    weights = torch.linspace(-1, 2, len(DPO_LOSS_TYPES)).tolist()
    keywords = {"label_smoothing": 0.1, "beta": 0.3, "backend": backend}
    whole = {"loss_type": DPO_LOSS_TYPES, "loss_weights": weights}
    mixed, mixed_grad = run(fp.dpo_loss, batch.logits, batch.labels, ref, **keywords, **whole)
    parts = [run(fp.dpo_loss, batch.logits, batch.labels, ref, **keywords, loss_type=name) for name in DPO_LOSS_TYPES]
    loss = sum(weight * output.loss for weight, (output, _) in zip(weights, parts, strict=True))
    grad = sum(weight * part for weight, (_, part) in zip(weights, parts, strict=True))
    torch.testing.assert_close(mixed.loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed_grad, grad, rtol=1e-4, atol=1e-5)


def test_sorting(backend: str) -> None:
    """AOT of one pair is cDPO; pairs in another order, and other partners in aot_unpaired, have the same loss."""
    batch = make_batch(8, 3, 11)
    ref = near_reference(batch.logits, batch.labels)
    order = torch.tensor([2, 0, 3, 1])
    keywords: dict[str, Any] = {"label_smoothing": 0.2, "beta": 0.4, "backend": backend}
    for name in ("aot", "aot_unpaired"):
        losses = [loss_of(batch, ref, loss_type=name, **keywords)]
        both = torch.cat((order, order + 4))
        losses.append(loss_of(Batch(batch.logits[both], batch.labels[both]), ref[both], loss_type=name, **keywords))
        if name == "aot":
            losses.append(loss_of(batch, ref[both], loss_type=name, **keywords))
        else:
            both = torch.cat((torch.arange(4), order + 4))
            losses.append(loss_of(Batch(batch.logits[both], batch.labels[both]), ref[both], loss_type=name, **keywords))
        for loss in losses[1:]:
            torch.testing.assert_close(loss, losses[0])
        one = Batch(batch.logits[::4], batch.labels[::4])
        torch.testing.assert_close(
            loss_of(one, ref[::4], loss_type=name, **keywords), loss_of(one, ref[::4], **keywords)
        )


def test_mpo_is_what_trl_recommends() -> None:
    batch = double(8, 6, 11)
    ref = near_reference(batch.logits, batch.labels)
    total = 0.8 * loss_of(batch, ref) + 0.2 * loss_of(batch, ref, loss_type="bco_pair")
    total += fp.cpo_loss(batch.logits, batch.labels).nll_loss
    assert_same(loss_of(batch, ref, **MPO), total)


@pytest.fixture(scope="module")
def trl_dpo() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("trl", minversion="1.16")
        from trl import DPOTrainer
    return DPOTrainer


def trl_loss(trl_dpo: Any, logits: Tensor, labels: Tensor, ref: Tensor, **keywords: Any) -> Tensor:
    """What TRL's trainer computes of a model with these logits."""
    targets = labels[:, 1:]
    mask = (targets != -100).to(torch.int64)
    logp = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * mask
    zeros = torch.zeros_like(logp)
    outputs = SimpleNamespace(log_probs=logp, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    names = keywords["loss_type"]
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
        args=SimpleNamespace(discopop_tau=keywords.get("discopop_tau", 0.05)),
        f_divergence_type=keywords.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=keywords.get("f_alpha_divergence_coef", 1.0),
        loss_types=[names] if isinstance(names, str) else list(names),
        loss_weights=list(keywords.get("loss_weights", [1.0])),
        beta=keywords["beta"],
        label_smoothing=keywords["label_smoothing"],
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = ref.chunk(2)
    completions = torch.cat((torch.zeros_like(mask[:, :1]), mask), 1)
    inputs = {"completion_mask": completions, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    inputs |= {"input_ids": labels.clamp(min=0), "attention_mask": torch.ones_like(labels)}
    return trl_dpo._compute_loss(trainer, lambda **_: outputs, inputs, False)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("loss_type", [*TRL_LOSS_TYPES, MPO["loss_type"]], ids=str)
def test_trl(trl_dpo: Any, loss_type: Any, divergence: str) -> None:
    """The library and its reference, loss and gradient; our sigmoid honours label smoothing, TRL's does not."""
    # TRL takes float32 for the powers of an alpha divergence, and log ε of exo_pair.
    dtype, tolerance = (torch.float32, 1e-5) if divergence == "alpha_divergence" else (torch.float64, 1e-8)
    batch = make_batch(8, 7, 11, dtype=dtype)
    batch.labels[:, 0] = -100
    ref = near_reference(batch.logits, batch.labels).to(dtype)
    keywords = {"loss_type": loss_type, "beta": 0.3, "f_divergence_type": divergence, "f_alpha_divergence_coef": 0.7}
    keywords["label_smoothing"] = 0.0 if "sigmoid" in loss_type else 0.125  # exact in float32
    keywords |= {"loss_weights": MPO["loss_weights"]} if isinstance(loss_type, tuple) else {}
    leaf = batch.logits.clone().requires_grad_()
    truth = trl_loss(trl_dpo, leaf, batch.labels, ref, **keywords)
    truth.backward()
    assert leaf.grad is not None
    for function in (fp.dpo_loss, reference.dpo_loss):
        output, grad = run(function, batch.logits, batch.labels, ref, **keywords)
        torch.testing.assert_close(output.loss, truth.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(grad, leaf.grad, rtol=100 * tolerance, atol=tolerance)
