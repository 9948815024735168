"""The reference against TRL's trainer."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from closed_forms import assert_same, double, objective

from fused_pref import reference


@pytest.fixture(scope="module")
def trl_cpo() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("trl")
        from trl.experimental.cpo import CPOTrainer
    return CPOTrainer


@pytest.mark.parametrize("average", [True, False])
def test_trl_sequence_logps(trl_cpo: Any, average: bool) -> None:
    batch = double(4, 6, 9)
    truth = trl_cpo.get_batch_logps(batch.logits, batch.labels, average_log_prob=average)
    assert_same(reference.sequence_logps(batch.logits, batch.labels, average=average), truth)


@pytest.mark.parametrize("alpha", [0.0, 0.3, -0.2])
@pytest.mark.parametrize("cpo_alpha", [0.0, 0.7])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.15])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo", "alphapo"])
def test_trl_loss(trl_cpo: Any, loss_type: str, label_smoothing: float, cpo_alpha: float, alpha: float) -> None:
    """Loss, gradient and every metric of TRL's trainer."""
    batch = double(6, 6, 9)
    keywords = {"beta": 0.4, "label_smoothing": label_smoothing, "simpo_gamma": 0.8, "alpha": alpha}
    ours, grad = objective("cpo_loss", batch, loss_type=loss_type, cpo_alpha=cpo_alpha, **keywords)
    inputs = {f"concatenated_{name}": batch.labels for name in ("input_ids", "attention_mask", "labels")}
    trainer = SimpleNamespace(
        **keywords,
        # What TRL's trainer makes of "alphapo".
        loss_type="simpo" if loss_type == "alphapo" else loss_type,
        cpo_alpha=0.0 if loss_type == "alphapo" else cpo_alpha,
        is_encoder_decoder=False,
        aux_loss_enabled=False,
        pad_token_id=0,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value),
        concatenated_inputs=lambda *_, **__: inputs,
        concatenated_forward=lambda *args: trl_cpo.concatenated_forward(trainer, *args),
        get_batch_logps=trl_cpo.get_batch_logps,
        cpo_loss=lambda *args: trl_cpo.cpo_loss(trainer, *args),
    )
    leaf = batch.logits.clone().requires_grad_()
    loss, metrics = trl_cpo.get_batch_loss_metrics(
        trainer, lambda *_, **__: SimpleNamespace(logits=leaf), {"chosen_labels": batch.labels[:3]}
    )
    loss.backward()
    assert leaf.grad is not None
    assert_same(ours.loss, loss.detach())
    assert_same(grad, leaf.grad)
    mine = {name: value.item() for name, value in ours.metrics().items()}
    assert mine.pop("rewards/accuracies") == pytest.approx(metrics.pop("rewards/accuracies"))  # float32 in TRL
    assert mine == pytest.approx(metrics, rel=1e-12)
