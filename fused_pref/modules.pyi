# Written by `python3 dev.py stubs` from modules.py and keywords.py; do not edit.
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from fused_pref.keywords import DPOLossType, Number
from fused_pref.losses.reward_shift import RewardShift
from fused_pref.outputs import BCOOutput, KTOOutput, PairOutput

class ObjectiveModule(nn.Module):
    function: Callable[..., Any]
    keywords: Any

    def __init__(self, keywords: Mapping[str, Any], *checks: Callable[[Mapping[str, Any]], Any]) -> None: ...
    @property
    def tensor_names(self) -> tuple[str, ...]: ...
    def names_in(self, batch: Mapping[str, Any]) -> tuple[str, ...]: ...
    def call_keywords(self, **given: Any) -> dict[str, Any]: ...
    def call(self, *tensors: Tensor, **given: Any) -> Any: ...
    def extra_repr(self) -> str: ...

class ShiftModule(ObjectiveModule):
    delta: Any

    def __init__(self, keywords: Mapping[str, Any], *checks: Callable[[Mapping[str, Any]], Any]) -> None: ...
    def call_keywords(self, **given: Any) -> dict[str, Any]: ...
    def extra_repr(self) -> str: ...

class CPOLoss(ObjectiveModule):
    def __init__(
        self,
        *,
        beta: float = 0.1,
        pair_normalizer: Number | Tensor | None = None,
        token_normalizer: Number | Tensor | None = None,
        loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = "sigmoid",
        label_smoothing: float = 0.0,
        cpo_alpha: float = 1.0,
        simpo_gamma: float = 0.5,
        alpha: float = 0.0,
        nll_reduction: Literal["token", "sequence"] = "token",
        token_weight: Tensor | None = None,
        token_metrics: bool = False,
        ignore_index: int = -100,
        shift: bool = True,
        cu_seqlens: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        backend: Literal["auto", "triton", "torch"] = "auto",
        logits_mean: Literal["all", "completion"] | None = "all",
        cp_group: Any = None,
        inplace_backward: bool = False,
    ) -> None: ...
    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        pair_normalizer: Number | Tensor | None = None,
        token_normalizer: Number | Tensor | None = None,
        token_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> PairOutput: ...

class DPOLoss(ShiftModule):
    def __init__(
        self,
        *,
        beta: float = 0.1,
        pair_normalizer: Number | Tensor | None = None,
        token_normalizer: Number | Tensor | None = None,
        loss_type: DPOLossType | Sequence[DPOLossType] = "sigmoid",
        loss_weights: Sequence[float] | None = None,
        label_smoothing: float | Sequence[float] = 0.0,
        delta: RewardShift | float | Tensor = 0.0,
        discopop_tau: float = 0.05,
        f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl",
        f_alpha_divergence_coef: float = 1.0,
        token_weight: Tensor | None = None,
        token_metrics: bool = False,
        ignore_index: int = -100,
        shift: bool = True,
        cu_seqlens: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        backend: Literal["auto", "triton", "torch"] = "auto",
        logits_mean: Literal["all", "completion"] | None = "all",
        cp_group: Any = None,
        inplace_backward: bool = False,
    ) -> None: ...
    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        ref_logps: Tensor,
        *,
        pair_normalizer: Number | Tensor | None = None,
        token_normalizer: Number | Tensor | None = None,
        token_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> PairOutput: ...

class BCOLoss(ShiftModule):
    def __init__(
        self,
        *,
        beta: float = 0.1,
        delta: RewardShift | float | Tensor = 0.0,
        sample_weight: Tensor | None = None,
        reduction: Literal["mean", "class_mean"] = "mean",
        sequence_normalizer: Number | Tensor | None = None,
        class_normalizer: tuple[Number | Tensor, Number | Tensor] | None = None,
        token_weight: Tensor | None = None,
        token_metrics: bool = False,
        ignore_index: int = -100,
        shift: bool = True,
        cu_seqlens: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        backend: Literal["auto", "triton", "torch"] = "auto",
        logits_mean: Literal["all", "completion"] | None = "all",
        cp_group: Any = None,
        inplace_backward: bool = False,
    ) -> None: ...
    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        desirable: Tensor,
        ref_logps: Tensor,
        *,
        sample_weight: Tensor | None = None,
        sequence_normalizer: Number | Tensor | None = None,
        class_normalizer: tuple[Number | Tensor, Number | Tensor] | None = None,
        token_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> BCOOutput: ...

class KTOLoss(ObjectiveModule):
    def __init__(
        self,
        *,
        kl: float | Tensor = 0.0,
        beta: float = 0.1,
        loss_type: Literal["kto", "apo_zero_unpaired"] = "kto",
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        sequence_normalizer: Number | Tensor | None = None,
        token_weight: Tensor | None = None,
        token_metrics: bool = False,
        ignore_index: int = -100,
        shift: bool = True,
        cu_seqlens: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        backend: Literal["auto", "triton", "torch"] = "auto",
        logits_mean: Literal["all", "completion"] | None = "all",
        cp_group: Any = None,
        inplace_backward: bool = False,
    ) -> None: ...
    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        desirable: Tensor,
        ref_logps: Tensor,
        *,
        kl: float | Tensor | None = None,
        sequence_normalizer: Number | Tensor | None = None,
        token_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> KTOOutput: ...

class LinearCPOLoss(ObjectiveModule):
    def __init__(
        self,
        *,
        beta: float = 0.1,
        pair_normalizer: Number | Tensor | None = None,
        token_normalizer: Number | Tensor | None = None,
        loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = "sigmoid",
        label_smoothing: float = 0.0,
        cpo_alpha: float = 1.0,
        simpo_gamma: float = 0.5,
        alpha: float = 0.0,
        nll_reduction: Literal["token", "sequence"] = "token",
        token_weight: Tensor | None = None,
        token_metrics: bool = False,
        ignore_index: int = -100,
        shift: bool = True,
        cu_seqlens: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        backend: Literal["auto", "triton", "torch"] = "auto",
        logits_mean: Literal["all", "completion"] | None = "all",
        cp_group: Any = None,
        bias: Tensor | None = None,
        memory_budget: int | None = None,
        tp_group: Any = None,
        tp_partial: bool = False,
        max_valid_tokens: int | None = None,
        skip_mass: float | None = None,
    ) -> None: ...
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        pair_normalizer: Number | Tensor | None = None,
        token_normalizer: Number | Tensor | None = None,
        token_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> PairOutput: ...

class LinearDPOLoss(ShiftModule):
    def __init__(
        self,
        *,
        beta: float = 0.1,
        pair_normalizer: Number | Tensor | None = None,
        token_normalizer: Number | Tensor | None = None,
        loss_type: DPOLossType | Sequence[DPOLossType] = "sigmoid",
        loss_weights: Sequence[float] | None = None,
        label_smoothing: float | Sequence[float] = 0.0,
        delta: RewardShift | float | Tensor = 0.0,
        discopop_tau: float = 0.05,
        f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl",
        f_alpha_divergence_coef: float = 1.0,
        token_weight: Tensor | None = None,
        token_metrics: bool = False,
        ignore_index: int = -100,
        shift: bool = True,
        cu_seqlens: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        backend: Literal["auto", "triton", "torch"] = "auto",
        logits_mean: Literal["all", "completion"] | None = "all",
        cp_group: Any = None,
        bias: Tensor | None = None,
        memory_budget: int | None = None,
        tp_group: Any = None,
        tp_partial: bool = False,
        max_valid_tokens: int | None = None,
        skip_mass: float | None = None,
    ) -> None: ...
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ref_logps: Tensor,
        *,
        pair_normalizer: Number | Tensor | None = None,
        token_normalizer: Number | Tensor | None = None,
        token_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> PairOutput: ...

class LinearBCOLoss(ShiftModule):
    def __init__(
        self,
        *,
        beta: float = 0.1,
        delta: RewardShift | float | Tensor = 0.0,
        sample_weight: Tensor | None = None,
        reduction: Literal["mean", "class_mean"] = "mean",
        sequence_normalizer: Number | Tensor | None = None,
        class_normalizer: tuple[Number | Tensor, Number | Tensor] | None = None,
        token_weight: Tensor | None = None,
        token_metrics: bool = False,
        ignore_index: int = -100,
        shift: bool = True,
        cu_seqlens: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        backend: Literal["auto", "triton", "torch"] = "auto",
        logits_mean: Literal["all", "completion"] | None = "all",
        cp_group: Any = None,
        bias: Tensor | None = None,
        memory_budget: int | None = None,
        tp_group: Any = None,
        tp_partial: bool = False,
        max_valid_tokens: int | None = None,
        skip_mass: float | None = None,
    ) -> None: ...
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        desirable: Tensor,
        ref_logps: Tensor,
        *,
        sample_weight: Tensor | None = None,
        sequence_normalizer: Number | Tensor | None = None,
        class_normalizer: tuple[Number | Tensor, Number | Tensor] | None = None,
        token_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> BCOOutput: ...

class LinearKTOLoss(ObjectiveModule):
    def __init__(
        self,
        *,
        kl: float | Tensor = 0.0,
        beta: float = 0.1,
        loss_type: Literal["kto", "apo_zero_unpaired"] = "kto",
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        sequence_normalizer: Number | Tensor | None = None,
        token_weight: Tensor | None = None,
        token_metrics: bool = False,
        ignore_index: int = -100,
        shift: bool = True,
        cu_seqlens: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        backend: Literal["auto", "triton", "torch"] = "auto",
        logits_mean: Literal["all", "completion"] | None = "all",
        cp_group: Any = None,
        bias: Tensor | None = None,
        memory_budget: int | None = None,
        tp_group: Any = None,
        tp_partial: bool = False,
        max_valid_tokens: int | None = None,
        skip_mass: float | None = None,
    ) -> None: ...
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        desirable: Tensor,
        ref_logps: Tensor,
        *,
        kl: float | Tensor | None = None,
        sequence_normalizer: Number | Tensor | None = None,
        token_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> KTOOutput: ...
