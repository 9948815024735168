"""nn.Module faces of the objectives: hyperparameters at construction, tensors per call."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from fused_pref.functional import bco_loss, cpo_loss, dpo_loss
from fused_pref.head.spec import LogitsSpec
from fused_pref.keywords import BCOLogitsKeywords, CPOLogitsKeywords, DPOLogitsKeywords, takes
from fused_pref.objectives import BCOSpec, PairSpec
from fused_pref.outputs import BCOOutput, PairOutput
from fused_pref.shift import RewardShift


class ObjectiveModule(nn.Module):
    """Keeps an objective's keywords, checked at construction; a keyword given per call takes precedence."""

    def __init__(self, keywords: Mapping[str, Any], *checks: Callable[[Mapping[str, Any]], Any]) -> None:
        super().__init__()
        for check in checks:
            check(keywords)
        self.keywords = dict(keywords)

    def call_keywords(self, **given: Any) -> dict[str, Any]:
        """The keywords of one call."""
        return {**self.keywords, **{name: value for name, value in given.items() if value is not None}}

    def extra_repr(self) -> str:
        """The keywords that are set."""
        return ", ".join(f"{name}={value!r}" for name, value in self.keywords.items() if value is not None)


class CPOLoss(ObjectiveModule):
    """:func:`fused_pref.cpo_loss` as a module.

    Raises:
        ValueError, TypeError: a malformed keyword, at construction.
    """

    @takes(CPOLogitsKeywords)
    def __init__(self, **keywords: Unpack[CPOLogitsKeywords]) -> None:
        super().__init__(keywords, PairSpec.cpo, LogitsSpec.of)

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        pair_normalizer: float | Tensor | None = None,
        token_normalizer: float | Tensor | None = None,
    ) -> PairOutput:
        """See :func:`fused_pref.cpo_loss`."""
        keywords = self.call_keywords(
            cu_seqlens=cu_seqlens, pair_normalizer=pair_normalizer, token_normalizer=token_normalizer
        )
        return cpo_loss(logits, labels, **keywords)


class DPOLoss(ObjectiveModule):
    """:func:`fused_pref.dpo_loss` as a module.

    Raises:
        ValueError, TypeError: a malformed keyword, at construction.
    """

    @takes(DPOLogitsKeywords)
    def __init__(self, **keywords: Unpack[DPOLogitsKeywords]) -> None:
        super().__init__(keywords, PairSpec.dpo, LogitsSpec.of)

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        ref_logps: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        pair_normalizer: float | Tensor | None = None,
        token_normalizer: float | Tensor | None = None,
    ) -> PairOutput:
        """See :func:`fused_pref.dpo_loss`."""
        keywords = self.call_keywords(
            cu_seqlens=cu_seqlens, pair_normalizer=pair_normalizer, token_normalizer=token_normalizer
        )
        return dpo_loss(logits, labels, ref_logps, **keywords)


class BCOLoss(ObjectiveModule):
    """:func:`fused_pref.bco_loss` as a module; a :class:`RewardShift` given as ``delta`` is its submodule.

    Raises:
        ValueError, TypeError: a malformed keyword, at construction.
    """

    @takes(BCOLogitsKeywords)
    def __init__(self, **keywords: Unpack[BCOLogitsKeywords]) -> None:
        super().__init__(keywords, BCOSpec.bco, LogitsSpec.of)
        self.delta = self.keywords.pop("delta")

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        desirable: Tensor,
        ref_logps: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        sample_weight: Tensor | None = None,
        sequence_normalizer: float | Tensor | None = None,
        class_normalizer: tuple[float | Tensor, float | Tensor] | None = None,
    ) -> BCOOutput:
        """See :func:`fused_pref.bco_loss`."""
        keywords = self.call_keywords(
            cu_seqlens=cu_seqlens,
            sample_weight=sample_weight,
            sequence_normalizer=sequence_normalizer,
            class_normalizer=class_normalizer,
        )
        return bco_loss(logits, labels, desirable, ref_logps, delta=self.delta, **keywords)

    def extra_repr(self) -> str:
        """The keywords that are set; δ is shown as a submodule when it is one."""
        shown = super().extra_repr()
        return shown if isinstance(self.delta, RewardShift) else f"delta={self.delta!r}, {shown}"
