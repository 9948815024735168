"""nn.Module faces of the objectives: hyperparameters at construction, tensors per call."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from fused_pref import functional, validate
from fused_pref.head.inputs import per_call
from fused_pref.keywords import (
    BCOLinearKeywords,
    BCOLogitsKeywords,
    CPOLinearKeywords,
    CPOLogitsKeywords,
    DPOLinearKeywords,
    DPOLogitsKeywords,
    KTOLinearKeywords,
    KTOLogitsKeywords,
    accepts,
)
from fused_pref.losses.pair import pair_normalizers
from fused_pref.losses.pair_spec import cpo_spec, dpo_normalizers, dpo_shift, dpo_spec
from fused_pref.losses.reward_shift import RewardShift, reward_shift
from fused_pref.losses.unpaired import bco_normalizers, bco_spec, kto_numbers, kto_spec
from fused_pref.outputs import BCOOutput, KTOOutput, PairOutput
from fused_pref.spec import linear_spec, logits_spec


class ObjectiveModule(nn.Module):
    """Keeps an objective's keywords; one that is given per call, not None, takes precedence.

    A malformed keyword raises ``ValueError`` or ``TypeError`` at construction.

    Tensors among them (``bias``, normalizers) are kept as they are: no parameters, not moved by ``.to()``, not saved.

    Attributes:
        function: what the module evaluates, of :mod:`fused_pref.functional`.
    """

    function: Callable[..., Any]

    def __init__(self, keywords: Mapping[str, Any], *checks: Callable[[Mapping[str, Any]], Any]) -> None:
        super().__init__()
        for check in (*checks, per_call):
            check(keywords)
        self.keywords = dict(keywords)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the required tensors after the arguments of ``forward``."""
        return self.names_in({})

    def names_in(self, batch: Mapping[str, Any]) -> tuple[str, ...]:
        """The same, and the optional ones that ``batch`` has."""
        return ()

    def call_keywords(self, **given: Any) -> dict[str, Any]:
        """The keywords of one call."""
        return {**self.keywords, **{name: value for name, value in given.items() if value is not None}}

    def call(self, *tensors: Tensor, **given: Any) -> Any:
        """Evaluate the objective on the tensors of ``forward``; any keyword of its function can be given per call."""
        return self.function(*tensors, **self.call_keywords(**given))

    def extra_repr(self) -> str:
        """The keywords that are not None."""
        shown = {name: value for name, value in self.keywords.items() if value is not None}
        return ", ".join(f"{name}={validate.describe(value)}" for name, value in shown.items())


class ShiftModule(ObjectiveModule):
    """An objective with δ: a :class:`RewardShift` given as ``delta`` is a submodule."""

    def __init__(self, keywords: Mapping[str, Any], *checks: Callable[[Mapping[str, Any]], Any]) -> None:
        super().__init__(keywords, *checks, reward_shift)
        self.delta = self.keywords.pop("delta")

    def call_keywords(self, **given: Any) -> dict[str, Any]:
        """The keywords of one call, δ among them."""
        return {"delta": self.delta, **super().call_keywords(**given)}

    def extra_repr(self) -> str:
        """The keywords that are set; δ is shown as a submodule when it is one."""
        shown = super().extra_repr()
        return shown if isinstance(self.delta, RewardShift) else f"delta={self.delta!r}, {shown}"


class CPOLoss(ObjectiveModule):
    """:func:`fused_pref.cpo_loss` as a module."""

    function = staticmethod(functional.cpo_loss)

    @accepts(CPOLogitsKeywords)
    def __init__(self, **keywords: Unpack[CPOLogitsKeywords]) -> None:
        super().__init__(keywords, cpo_spec, logits_spec, pair_normalizers)

    @accepts(CPOLogitsKeywords, per_call=True)
    def forward(self, logits: Tensor, labels: Tensor, **given: Any) -> PairOutput:
        """See :func:`fused_pref.cpo_loss`."""
        return self.call(logits, labels, **given)


class DPOLoss(ShiftModule):
    """:func:`fused_pref.dpo_loss` as a module; a :class:`RewardShift` given as ``delta`` is its submodule."""

    function = staticmethod(functional.dpo_loss)

    @accepts(DPOLogitsKeywords)
    def __init__(self, **keywords: Unpack[DPOLogitsKeywords]) -> None:
        super().__init__(keywords, dpo_spec, logits_spec, dpo_normalizers, dpo_shift)

    @accepts(DPOLogitsKeywords, per_call=True)
    def forward(self, logits: Tensor, labels: Tensor, ref_logps: Tensor, **given: Any) -> PairOutput:
        """See :func:`fused_pref.dpo_loss`."""
        return self.call(logits, labels, ref_logps, **given)


class BCOLoss(ShiftModule):
    """:func:`fused_pref.bco_loss` as a module; a :class:`RewardShift` given as ``delta`` is its submodule."""

    function = staticmethod(functional.bco_loss)

    @accepts(BCOLogitsKeywords)
    def __init__(self, **keywords: Unpack[BCOLogitsKeywords]) -> None:
        super().__init__(keywords, bco_spec, logits_spec, bco_normalizers)

    @accepts(BCOLogitsKeywords, per_call=True)
    def forward(self, logits: Tensor, labels: Tensor, desirable: Tensor, ref_logps: Tensor, **given: Any) -> BCOOutput:
        """See :func:`fused_pref.bco_loss`."""
        return self.call(logits, labels, desirable, ref_logps, **given)


class KTOLoss(ObjectiveModule):
    """:func:`fused_pref.kto_loss` as a module."""

    function = staticmethod(functional.kto_loss)

    @accepts(KTOLogitsKeywords)
    def __init__(self, **keywords: Unpack[KTOLogitsKeywords]) -> None:
        super().__init__(keywords, kto_spec, logits_spec, kto_numbers)

    @accepts(KTOLogitsKeywords, per_call=True)
    def forward(self, logits: Tensor, labels: Tensor, desirable: Tensor, ref_logps: Tensor, **given: Any) -> KTOOutput:
        """See :func:`fused_pref.kto_loss`."""
        return self.call(logits, labels, desirable, ref_logps, **given)


class LinearCPOLoss(ObjectiveModule):
    """:func:`fused_pref.linear_cpo_loss` as a module."""

    function = staticmethod(functional.linear_cpo_loss)

    @accepts(CPOLinearKeywords)
    def __init__(self, **keywords: Unpack[CPOLinearKeywords]) -> None:
        super().__init__(keywords, cpo_spec, linear_spec, pair_normalizers)

    @accepts(CPOLinearKeywords, per_call=True)
    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, **given: Any) -> PairOutput:
        """See :func:`fused_pref.linear_cpo_loss`."""
        return self.call(hidden, weight, labels, **given)


class LinearDPOLoss(ShiftModule):
    """:func:`fused_pref.linear_dpo_loss` as a module; a :class:`RewardShift` given as ``delta`` is its submodule."""

    function = staticmethod(functional.linear_dpo_loss)

    @accepts(DPOLinearKeywords)
    def __init__(self, **keywords: Unpack[DPOLinearKeywords]) -> None:
        super().__init__(keywords, dpo_spec, linear_spec, dpo_normalizers, dpo_shift)

    @accepts(DPOLinearKeywords, per_call=True)
    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, **given: Any) -> PairOutput:
        """See :func:`fused_pref.linear_dpo_loss`."""
        return self.call(hidden, weight, labels, ref_logps, **given)


class LinearBCOLoss(ShiftModule):
    """:func:`fused_pref.linear_bco_loss` as a module; a :class:`RewardShift` given as ``delta`` is its submodule."""

    function = staticmethod(functional.linear_bco_loss)

    @accepts(BCOLinearKeywords)
    def __init__(self, **keywords: Unpack[BCOLinearKeywords]) -> None:
        super().__init__(keywords, bco_spec, linear_spec, bco_normalizers)

    @accepts(BCOLinearKeywords, per_call=True)
    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, desirable: Tensor, ref_logps: Tensor, **given: Any
    ) -> BCOOutput:
        """See :func:`fused_pref.linear_bco_loss`."""
        return self.call(hidden, weight, labels, desirable, ref_logps, **given)


class LinearKTOLoss(ObjectiveModule):
    """:func:`fused_pref.linear_kto_loss` as a module."""

    function = staticmethod(functional.linear_kto_loss)

    @accepts(KTOLinearKeywords)
    def __init__(self, **keywords: Unpack[KTOLinearKeywords]) -> None:
        super().__init__(keywords, kto_spec, linear_spec, kto_numbers)

    @accepts(KTOLinearKeywords, per_call=True)
    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, desirable: Tensor, ref_logps: Tensor, **given: Any
    ) -> KTOOutput:
        """See :func:`fused_pref.linear_kto_loss`."""
        return self.call(hidden, weight, labels, desirable, ref_logps, **given)
