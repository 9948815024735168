# Written by `python3 dev.py stubs` from preference.py and keywords.py; do not edit.
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

from fused_pref.keywords import Number
from fused_pref.modules import ObjectiveModule
from fused_pref.outputs import PreferenceOutput

Objective = Callable[..., Tensor]

def preference_loss(
    logits: Tensor,
    labels: Tensor,
    objective: Objective,
    *tensors: Tensor,
    unit: Literal[2, 1] | None = 2,
    ref_logps: Tensor | None = None,
    normalizer: Number | Tensor | None = None,
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
) -> PreferenceOutput: ...
def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    objective: Objective,
    *tensors: Tensor,
    unit: Literal[2, 1] | None = 2,
    ref_logps: Tensor | None = None,
    normalizer: Number | Tensor | None = None,
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
) -> PreferenceOutput: ...

class PreferenceLoss(ObjectiveModule):
    objective: Any

    def __init__(
        self,
        objective: Objective,
        *,
        unit: Literal[2, 1] | None = 2,
        ref_logps: Tensor | None = None,
        normalizer: Number | Tensor | None = None,
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
    def call(self, *tensors: Tensor, **given: Any) -> PreferenceOutput: ...
    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *tensors: Tensor,
        ref_logps: Tensor | None = None,
        normalizer: Number | Tensor | None = None,
        token_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> PreferenceOutput: ...

class LinearPreferenceLoss(ObjectiveModule):
    objective: Any

    def __init__(
        self,
        objective: Objective,
        *,
        unit: Literal[2, 1] | None = 2,
        ref_logps: Tensor | None = None,
        normalizer: Number | Tensor | None = None,
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
    def call(self, *tensors: Tensor, **given: Any) -> PreferenceOutput: ...
    def names_in(self, batch: Mapping[str, Any]) -> tuple[str, ...]: ...
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *tensors: Tensor,
        ref_logps: Tensor | None = None,
        normalizer: Number | Tensor | None = None,
        token_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> PreferenceOutput: ...

def constants(keywords: Mapping[str, Any]) -> tuple[int, float | Tensor | None]: ...
