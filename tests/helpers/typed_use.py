"""A user's program as a type checker sees it: every public entry, with the types that it promises."""

# pyright: reportUnnecessaryTypeIgnoreComment=true
import torch
from torch import Tensor
from typing_extensions import assert_type

import fused_pref as fp
from fused_pref.models import preference_forward
from fused_pref.testing import check_parity


def train(hidden: Tensor, head: torch.nn.Linear, labels: Tensor, ref_logps: Tensor, desirable: Tensor) -> float:
    """Uses of functions and modules."""
    out = fp.linear_cpo_loss(hidden, head.weight, labels, bias=head.bias, beta=0.2, loss_type="simpo", simpo_gamma=1.0)
    assert_type(out, fp.PairOutput)
    assert_type(out.loss, Tensor)
    assert_type(out.metrics(), dict[str, Tensor])
    shift = fp.RewardShift("ema", update="step")
    bco = fp.LinearBCOLoss(beta=0.1, delta=shift)
    assert_type(fp.linear_bco_loss(hidden, head.weight, labels, desirable, ref_logps, delta=shift), fp.BCOOutput)
    assert_type(fp.linear_kto_loss(hidden, head.weight, labels, desirable, ref_logps, kl=ref_logps[0]), fp.KTOOutput)
    assert_type(fp.linear_sequence_logps(hidden, head.weight, labels, average=True), Tensor)
    assert_type(fp.token_logps(head(hidden), labels, temperature=2.0), Tensor)
    assert_type(fp.dpo_loss(head(hidden), labels, ref_logps, label_smoothing=0.1).chosen_rewards, Tensor)
    mpo = fp.DPOLoss(loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=[0.8, 0.2, 1.0], delta=shift)
    mpo(head(hidden), labels, ref_logps).loss.backward()
    assert_type(fp.dpo_loss(head(hidden), labels, ref_logps, loss_type="bco_pair").delta, Tensor | None)
    assert_type(fp.explain("llama-3-8b", tokens=8192).peak_bytes, int)
    bco(hidden, head.weight, labels, desirable, ref_logps, bias=head.bias).loss.backward()
    shift.step()
    return out.loss.item()


def mistakes(logits: Tensor, labels: Tensor) -> None:
    """What a type checker refuses; an error that is missing is one too."""
    fp.cpo_loss(logits, labels, bta=0.1)  # type: ignore[call-arg]
    fp.cpo_loss(logits, labels, loss_type="sigmod")  # type: ignore[arg-type]
    fp.dpo_loss(logits, labels, labels, loss_type=("sigmoid", "simpo"))  # type: ignore[arg-type]
    fp.RewardShift("mean")  # type: ignore[arg-type]


__all__ = ["check_parity", "mistakes", "preference_forward", "train"]
