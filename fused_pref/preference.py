"""An objective of the user's in one pass: its gradient is formed where the log-probs are."""

import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fused_pref import validate
from fused_pref.head.inputs import Inputs, LinearInputs, LogitsInputs, on_all_ranks
from fused_pref.keywords import PreferenceKeywords, PreferenceLinearKeywords, PreferenceLogitsKeywords, accepts, choices
from fused_pref.losses.open import OpenObjective
from fused_pref.modules import ObjectiveModule
from fused_pref.outputs import PreferenceOutput
from fused_pref.spec import linear_spec, logits_spec

Objective = Callable[..., Tensor]
UNITS: tuple[Any, ...] = choices(PreferenceKeywords, "unit")


@accepts(PreferenceLogitsKeywords)
def preference_loss(
    logits: Tensor, labels: Tensor, objective: Objective, *tensors: Tensor, **keywords: Unpack[PreferenceLogitsKeywords]
) -> PreferenceOutput:
    """The mean over units of an objective of one's own, a plain PyTorch function of per-sequence log-probs.

    - ``unit=2``: ``objective(chosen, rejected, *tensors)`` gives the losses (b,) of b pairs;
    - ``unit=1``: ``objective(sequences, *tensors)`` gives the losses (s,) of s sequences;
    - ``unit=None``: ``objective(sequences, *tensors)`` gives the loss of the batch, 0-d.

    Arguments are :class:`fused_pref.Sequences`: ``logps``, ``lengths``, ``ref_logps``, ``average``. The function may be
    called on a part of the units, more than once: it must be deterministic, and the loss of a unit must not depend on
    other units, except with ``unit=None``. Gradients flow through ``logps`` alone; others are dropped. It runs without
    autocast and outside of a compiler's graph. :func:`fused_pref.checks` tries whether units are independent and
    gradients lost.

    Args:
        logits: (S, T, V), or (N_total, V) with ``cu_seqlens``; for pairs the chosen sequences first, then the rejected.
        labels: (S, T) or (N_total,) int64 or int32.
        objective: the function.
        tensors: handed to it, on the device of the logits, without gradient: cut along their first dimension, one entry
            a unit, to the units of a call; 0-d tensors, and with ``unit=None`` all, are passed whole.

    Returns:
        :class:`PreferenceOutput`, float32 (float64 for float64 inputs); only ``loss`` carries a gradient. Without a
        sequence the loss is 0 and the function is not called.

    Raises:
        ValueError, TypeError: a malformed argument, or losses of another shape or without a gradient.
    """
    return _preference_loss(LogitsInputs.of, (logits, labels), objective, tensors, keywords)


@accepts(PreferenceLinearKeywords)
@on_all_ranks
def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    objective: Objective,
    *tensors: Tensor,
    **keywords: Unpack[PreferenceLinearKeywords],
) -> PreferenceOutput:
    """:func:`preference_loss` from hidden states and the head's weight, in the memory of the gradients.

    Three products for pairs and single sequences, three to four where the batch is coupled (``unit=None``).

    Args:
        hidden: (S, T, D), or (N_total, D) with ``cu_seqlens``; it and the weight as of :func:`linear_token_logps`.
        weight: (V, D).
        labels: (S, T) or (N_total,) int64 or int32.
        objective: the function.
        tensors: handed to it.

    Returns:
        :class:`PreferenceOutput`, float32 (float64 for float64 inputs); only ``loss`` carries a gradient.

    Raises:
        ValueError, TypeError: a malformed argument, losses of another shape or without a gradient, or a
            ``memory_budget`` that no plan fits.
    """
    return _preference_loss(LinearInputs.of, (hidden, weight, labels), objective, tensors, keywords)


class PreferenceLoss(ObjectiveModule):
    """:func:`fused_pref.preference_loss` as a module; an objective that is a module is its submodule."""

    function = staticmethod(preference_loss)

    @accepts(PreferenceLogitsKeywords)
    def __init__(self, objective: Objective, **keywords: Unpack[PreferenceLogitsKeywords]) -> None:
        super().__init__(keywords, logits_spec, constants)
        self.objective: Any = _callable(objective)

    def call(self, *tensors: Tensor, **given: Any) -> PreferenceOutput:
        """See :class:`ObjectiveModule`."""
        return super().call(*tensors[:2], self.objective, *tensors[2:], **given)

    @accepts(PreferenceLogitsKeywords, per_call=True)
    def forward(self, logits: Tensor, labels: Tensor, *tensors: Tensor, **given: Any) -> PreferenceOutput:
        """See :func:`fused_pref.preference_loss`."""
        return self.call(logits, labels, *tensors, **given)


class LinearPreferenceLoss(ObjectiveModule):
    """:func:`fused_pref.linear_preference_loss` as a module; an objective that is a module is its submodule."""

    function = staticmethod(linear_preference_loss)

    @accepts(PreferenceLinearKeywords)
    def __init__(self, objective: Objective, **keywords: Unpack[PreferenceLinearKeywords]) -> None:
        super().__init__(keywords, linear_spec, constants)
        self.objective: Any = _callable(objective)

    def call(self, *tensors: Tensor, **given: Any) -> PreferenceOutput:
        """See :class:`ObjectiveModule`."""
        return super().call(*tensors[:3], self.objective, *tensors[3:], **given)

    def names_in(self, batch: Mapping[str, Any]) -> tuple[str, ...]:
        """What the objective calls its tensors; they go by position, so one with a default needs all before it."""
        function = self.objective.forward if isinstance(self.objective, nn.Module) else self.objective
        try:
            parameters = list(inspect.signature(function).parameters.values())[2 if self.keywords["unit"] == 2 else 1 :]
        except ValueError:  # of a builtin
            return ()
        needed = [i for i, p in enumerate(parameters) if p.default is p.empty or p.name in batch]
        for p in (parameters[i] for i in needed):
            if p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
                expected = "a function that takes its tensors by position, none by keyword alone, with a name for each"
                raise validate.fail("objective", expected, str(p), TypeError)
        return tuple(p.name for p in parameters[: needed[-1] + 1]) if needed else ()

    @accepts(PreferenceLinearKeywords, per_call=True)
    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, *tensors: Tensor, **given: Any
    ) -> PreferenceOutput:
        """See :func:`fused_pref.linear_preference_loss`."""
        return self.call(hidden, weight, labels, *tensors, **given)


def constants(keywords: Mapping[str, Any]) -> tuple[int, float | Tensor | None]:
    """``unit``, 0 for None, and ``normalizer``; ``ref_logps`` is a tensor or None."""
    unit, normalizer = keywords["unit"], keywords["normalizer"]
    validate.tensor_or_none("ref_logps", keywords["ref_logps"], "(S,)")
    if unit is not None and (isinstance(unit, bool) or not isinstance(unit, int) or unit not in UNITS):
        raise validate.fail("unit", "2 (pairs), 1 (sequences) or None (the batch)", unit)
    if normalizer is None:
        return unit or 0, None
    if unit is None:
        raise validate.fail("normalizer", "None with unit=None, whose loss is not a mean", normalizer)
    return unit, validate.normalizer("normalizer", normalizer)


def _preference_loss(*arguments: Any) -> PreferenceOutput:
    """What the user's function does is not for a compiler: the graph breaks around the whole."""
    return (_outside_graphs if torch.compiler.is_compiling() else _evaluate)(*arguments)


def _evaluate(
    make: Callable[..., Inputs],
    arguments: tuple[Tensor, ...],
    objective: Objective,
    tensors: tuple[Tensor, ...],
    keywords: Mapping[str, Any],
) -> PreferenceOutput:
    unit, normalizer = constants(keywords)
    inputs = make(*arguments, keywords, pairs=unit == 2)
    units = inputs.sequences // unit if unit else None
    tensors = tuple(_per_unit(f"tensors[{i}]", tensor, units, inputs) for i, tensor in enumerate(tensors))
    ref_logps = keywords["ref_logps"]
    if ref_logps is not None:
        ref_logps = inputs.per_sequence("ref_logps", ref_logps)
    wanted = inputs.differentiable
    # A linear head's call has a frame more.
    function = _callable(objective, stacklevel=4 + len(arguments))
    return inputs.evaluate(OpenObjective(function, tensors, unit, ref_logps, normalizer, wanted))


# As `torch.compiler.disable`, which would import the compiler here.
_outside_graphs: Any = torch._disable_dynamo(_evaluate)  # type: ignore[attr-defined] - torch calls it so itself


# Modules whose parameters have been warned of.
_warned: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def _callable(objective: Any, stacklevel: int = 4) -> Any:
    """A function; a module with parameters is warned of once, because they get no gradient."""
    if not callable(objective):
        raise validate.fail("objective", "a function of Sequences", objective, TypeError)
    if not isinstance(objective, nn.Module) or objective in _warned:
        return objective
    if any(parameter.requires_grad for parameter in objective.parameters()):
        _warned.add(objective)
        text = "the parameters of objective get no gradient: gradients go to the head alone"
        warnings.warn(text, stacklevel=stacklevel)
    return objective


def _per_unit(name: str, value: Any, units: int | None, inputs: Inputs) -> Tensor:
    """A tensor with one entry a unit (None: of any shape), or a 0-d one."""
    symbol = "of any shape" if units is None else f"(units, ...) with units = {units}, or ()"
    value = validate.tensor(name, value, symbol, None, (), inputs.targets.device)
    if units is not None and value.dim() and value.shape[0] != units:
        raise validate.fail(name, symbol, value)
    if value.requires_grad:
        raise ValueError(f"{name} must not require a gradient: gradients go to the head alone; call .detach()")
    return value
