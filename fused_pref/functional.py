"""The public functions, of logits and of a linear head: validate everything, score the tokens, evaluate the objective.

Keywords are described in :mod:`fused_pref.keywords` and shown by ``help()`` of each function. A malformed argument
raises ``ValueError`` or ``TypeError`` before anything is computed or changed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_pref import validate
from fused_pref.head.autograd import KnownSlopeFunction
from fused_pref.head.inputs import Inputs, LinearInputs, LogitsInputs, on_all_ranks
from fused_pref.keywords import (
    BCOLinearKeywords,
    BCOLogitsKeywords,
    CPOLinearKeywords,
    CPOLogitsKeywords,
    DPOLinearKeywords,
    DPOLogitsKeywords,
    KTOLinearKeywords,
    KTOLogitsKeywords,
    LinearKeywords,
    LogitsKeywords,
    SequenceLinearKeywords,
    SequenceLogitsKeywords,
    accepts,
)
from fused_pref.losses.pair import PairObjective, pair_normalizers
from fused_pref.losses.pair_spec import cpo_spec, dpo_normalizers, dpo_shift, dpo_spec
from fused_pref.losses.reward_shift import RewardShift, reward_shift
from fused_pref.losses.scores import narrow
from fused_pref.losses.unpaired import UnpairedObjective, bco_normalizers, bco_spec, kto_numbers, kto_spec
from fused_pref.ops.interface import PairSpec, UnpairedSpec
from fused_pref.outputs import BCOOutput, KTOOutput, PairOutput


@accepts(LogitsKeywords)
def token_logps(logits: Tensor, labels: Tensor, **keywords: Unpack[LogitsKeywords]) -> Tensor:
    """Log-prob of every scored token, differentiable.

    Args:
        logits: (S, T, V), or (N_total, V) with ``cu_seqlens``; float32, bfloat16, float16 or float64; any strides.
        labels: (S, T) or (N_total,) int64 or int32, as causal-LM labels come (see ``shift``).

    Returns:
        (S, T-1) with ``shift``, (S, T) without, (N_total,) packed; float32, float64 for float64 logits. 0 where
        nothing is scored, never above 0, NaN for a label outside the vocabulary.

    Raises:
        ValueError, TypeError: a malformed argument.
    """
    return _token_logps(LogitsInputs.of(logits, labels, keywords, means=False))


@accepts(SequenceLogitsKeywords)
def sequence_logps(logits: Tensor, labels: Tensor, **keywords: Unpack[SequenceLogitsKeywords]) -> Tensor:
    """Log-prob of every completion, differentiable: the sum over its scored tokens, or their average.

    Args:
        logits: (S, T, V), or (N_total, V) with ``cu_seqlens``; floating, as of :func:`token_logps`.
        labels: (S, T) or (N_total,).

    Returns:
        (S,) float32, float64 for float64 logits; 0 for an empty completion.

    Raises:
        ValueError, TypeError: a malformed argument.
    """
    average = validate.flag("average", keywords["average"])
    return _sequence_logps(LogitsInputs.of(logits, labels, keywords, means=False), average)


@accepts(CPOLogitsKeywords)
def cpo_loss(logits: Tensor, labels: Tensor, **keywords: Unpack[CPOLogitsKeywords]) -> PairOutput:
    """Contrastive preference optimisation (arXiv 2401.08417): mean over pairs of L_prefer, plus cpo_alpha · NLL.

    With Δ = logps_w − logps_l, summed over completions or, for ipo and simpo, averaged, L_prefer is by ``loss_type``

    - ``"sigmoid"``: −(1−ε) logσ(βΔ) − ε logσ(−βΔ);
    - ``"hinge"``: relu(1 − βΔ) (SLiC, arXiv 2305.10425);
    - ``"ipo"``: (Δ − 1/(2β))² (arXiv 2310.12036);
    - ``"simpo"``: as sigmoid, of βΔ − γ (arXiv 2405.14734); ``"alphapo"``: the same without NLL.

    With ``alpha`` ≠ 0 every logps in Δ is replaced by −expm1(min(−α·logps, 80))/α (AlphaPO, arXiv 2501.03884). NLL is
    the negative mean log-prob of the chosen tokens.

    Args:
        logits: (2B, T, V), chosen sequences first, then rejected; or (N_total, V) with ``cu_seqlens``; floating, as of
            :func:`token_logps`.
        labels: (2B, T) or (N_total,) int64 or int32.

    Returns:
        :class:`PairOutput`, float32 (float64 for float64 inputs); only ``loss`` carries a gradient.

    Raises:
        ValueError, TypeError: a malformed argument.
    """
    objective = PairObjective(cpo_spec(keywords), None, *pair_normalizers(keywords))
    return LogitsInputs.of(logits, labels, keywords, pairs=True).evaluate(objective)


@accepts(DPOLogitsKeywords)
def dpo_loss(logits: Tensor, labels: Tensor, ref_logps: Tensor, **keywords: Unpack[DPOLogitsKeywords]) -> PairOutput:
    """Direct preference optimisation (arXiv 2305.18290) against a reference model, by ``loss_type``.

    With r = β (logps − ref_logps) and Δ = (logps_w − ref_w) − (logps_l − ref_l), of a pair

    - ``"sigmoid"``, ``"hinge"``: as in :func:`cpo_loss`; ``"ipo"``: too, both log-ratios divided by their length;
    - ``"sigmoid_norm"``: −logσ(βΔ), both log-ratios divided by their length;
    - ``"robust"``: [−(1−ε) logσ(βΔ) + ε logσ(−βΔ)] / (1−2ε) (arXiv 2403.00409);
    - ``"exo_pair"``: q log(q/(1−ε)) + (1−q) log((1−q)/ε), q = σ(βΔ) (arXiv 2402.00856);
    - ``"nca_pair"``: −logσ(r_w) − ½ logσ(−r_w) − ½ logσ(−r_l) (arXiv 2402.05369);
    - ``"bco_pair"``: −logσ(r_w − δ) − logσ(−(r_l − δ)), δ = ``delta`` (arXiv 2404.04656);
    - ``"sppo_hard"``: (r_w/β − 1/(2β))² + (r_l/β + 1/(2β))² (arXiv 2405.00675);
    - ``"apo_zero"``: 1 − σ(r_w) + σ(r_l); ``"apo_down"``: σ(r_w) + 1 − σ(r_w − r_l) (arXiv 2408.06266);
    - ``"discopop"``: −logσ(x)(1−m) + m e^(−x), x = βΔ, m = σ(x/τ), τ = ``discopop_tau`` (arXiv 2406.08414);
    - ``"aot"``: sigmoid of sorted logps_w − logps_l less sorted ref_w − ref_l of the batch; ``"aot_unpaired"``: of
      sorted logps_w − ref_w less sorted logps_l − ref_l (arXiv 2406.05882);
    - ``"sft"``: the negative mean log-prob of the chosen tokens.

    ``f_divergence_type`` puts f′ in the place of a log-ratio x (arXiv 2309.16240): x itself, 1 − e^(−x),
    log 2 + logσ(x) or (e^((α−1)x) − 1)/(α−1), exponents clamped at 80. A sequence of names is their sum by
    ``loss_weights``, as MPO (arXiv 2411.10442): ``("sigmoid", "bco_pair", "sft")`` by ``(0.8, 0.2, 1.0)``. To a
    :class:`RewardShift`, chosen completions are desirable and rejected ones are not.

    Args:
        logits: (2B, T, V), chosen sequences first, then rejected; or (N_total, V) with ``cu_seqlens``; floating, as of
            :func:`token_logps`.
        labels: (2B, T) or (N_total,) int64 or int32.
        ref_logps: (2B,) floating, the reference model's log-probs summed over the completions.

    Returns:
        :class:`PairOutput`, float32 (float64 for float64 inputs); only ``loss`` carries a gradient; ``nll_loss`` is the
        unweighted sft, 0 without it.

    Raises:
        ValueError, TypeError: a malformed argument.
    """
    spec = dpo_spec(keywords)
    return _dpo_loss(LogitsInputs.of(logits, labels, keywords, pairs=True), spec, keywords, ref_logps)


@accepts(BCOLogitsKeywords)
def bco_loss(
    logits: Tensor, labels: Tensor, desirable: Tensor, ref_logps: Tensor, **keywords: Unpack[BCOLogitsKeywords]
) -> BCOOutput:
    """Binary classifier optimisation (arXiv 2404.04656): −logσ(r − δ) for desirable, −ρ logσ(−(r − δ)) for others.

    Rewards are r = β (logps − ref_logps), δ is ``delta`` and ρ is ``sample_weight``, which multiplies the loss of a
    desirable sequence, too; in the paper it is 1 there. No gradient flows through δ. A :class:`RewardShift` is updated
    as the last thing of a successful call.

    Args:
        logits: (S, T, V), or (N_total, V) with ``cu_seqlens``; sequences in any order; floating, as of
            :func:`token_logps`.
        labels: (S, T) or (N_total,) int64 or int32.
        desirable: bool (S,).
        ref_logps: (S,) floating, the reference model's log-probs summed over the completions.

    Returns:
        :class:`BCOOutput`, float32 (float64 for float64 inputs); only ``loss`` carries a gradient.

    Raises:
        ValueError, TypeError: a malformed argument.
    """
    spec, normalizers = bco_spec(keywords), bco_normalizers(keywords)
    inputs = LogitsInputs.of(logits, labels, keywords)
    delta = reward_shift(keywords, inputs.targets.device)
    return _unpaired_loss(inputs, spec, desirable, ref_logps, delta, keywords["sample_weight"], *normalizers)


@accepts(KTOLogitsKeywords)
def kto_loss(
    logits: Tensor, labels: Tensor, desirable: Tensor, ref_logps: Tensor, **keywords: Unpack[KTOLogitsKeywords]
) -> KTOOutput:
    """Kahneman-Tversky optimisation (arXiv 2402.01306): the mean over sequences of w⁺σ(β·kl − r) or w⁻σ(r − β·kl).

    Rewards are r = β (logps − ref_logps), and σ(β·kl − r) = 1 − σ(r − β·kl). w⁺ is ``desirable_weight``, for desirable
    sequences, and w⁻ ``undesirable_weight``, for others. ``loss_type="apo_zero_unpaired"`` (APO, arXiv 2408.06266) has
    0 in place of kl. No gradient flows through kl, which is not estimated here: the paper takes the mean of logps −
    ref_logps over completions of other prompts of the batch, clamped at 0.

    Args:
        logits: (S, T, V), or (N_total, V) with ``cu_seqlens``; sequences in any order; floating, as of
            :func:`token_logps`.
        labels: (S, T) or (N_total,) int64 or int32.
        desirable: bool (S,).
        ref_logps: (S,) floating, the reference model's log-probs summed over the completions.

    Returns:
        :class:`KTOOutput`, float32 (float64 for float64 inputs); only ``loss`` carries a gradient.

    Raises:
        ValueError, TypeError: a malformed argument.
    """
    spec, (kl, sequences) = kto_spec(keywords), kto_numbers(keywords)
    inputs = LogitsInputs.of(logits, labels, keywords)
    return _unpaired_loss(inputs, spec, desirable, ref_logps, kl, None, sequences, None)


@accepts(LinearKeywords)
@on_all_ranks
def linear_token_logps(hidden: Tensor, weight: Tensor, labels: Tensor, **keywords: Unpack[LinearKeywords]) -> Tensor:
    """:func:`token_logps` of the logits hidden · weightᵀ + bias, which are never made.

    Args:
        hidden: (S, T, D), or (N_total, D) with ``cu_seqlens``; float32, bfloat16, float16 or float64; any strides.
        weight: (V, D) of the dtype of ``hidden`` (under autocast of any but float64).
        labels: (S, T) or (N_total,) int64 or int32, as causal-LM labels come (see ``shift``).

    Returns:
        As :func:`token_logps`; differentiable in ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError, TypeError: a malformed argument, or a ``memory_budget`` that no plan fits.
    """
    return _token_logps(LinearInputs.of(hidden, weight, labels, keywords, means=False))


@accepts(SequenceLinearKeywords)
@on_all_ranks
def linear_sequence_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, **keywords: Unpack[SequenceLinearKeywords]
) -> Tensor:
    """:func:`sequence_logps` of the logits hidden · weightᵀ + bias, which are never made.

    Args:
        hidden: (S, T, D), or (N_total, D) with ``cu_seqlens``; it and the weight as of :func:`linear_token_logps`.
        weight: (V, D).
        labels: (S, T) or (N_total,) int64 or int32.

    Returns:
        (S,) float32, float64 for float64 inputs; 0 for an empty completion.

    Raises:
        ValueError, TypeError: a malformed argument, or a ``memory_budget`` that no plan fits.
    """
    average = validate.flag("average", keywords["average"])
    return _sequence_logps(LinearInputs.of(hidden, weight, labels, keywords, means=False), average)


@accepts(CPOLinearKeywords)
@on_all_ranks
def linear_cpo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, **keywords: Unpack[CPOLinearKeywords]
) -> PairOutput:
    """:func:`cpo_loss` from hidden states and the head's weight, in the memory of the gradients.

    Only scored tokens enter the products. Every pair is on its own, so that three products are enough for loss and
    gradients. :func:`fused_pref.explain` shows the plan a call takes.

    Args:
        hidden: (2B, T, D), chosen sequences first, then rejected; or (N_total, D) with ``cu_seqlens``; it and the
            weight as of :func:`linear_token_logps`.
        weight: (V, D).
        labels: (2B, T) or (N_total,) int64 or int32.

    Returns:
        :class:`PairOutput`, float32 (float64 for float64 inputs); only ``loss`` carries a gradient.

    Raises:
        ValueError, TypeError: a malformed argument, or a ``memory_budget`` that no plan fits.
    """
    objective = PairObjective(cpo_spec(keywords), None, *pair_normalizers(keywords))
    return LinearInputs.of(hidden, weight, labels, keywords, pairs=True).evaluate(objective)


@accepts(DPOLinearKeywords)
@on_all_ranks
def linear_dpo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, **keywords: Unpack[DPOLinearKeywords]
) -> PairOutput:
    """:func:`dpo_loss` from hidden states and the head's weight, as :func:`linear_cpo_loss`.

    Three products; three to four for aot and aot_unpaired, and where this batch moves the δ of bco_pair.

    Args:
        hidden: (2B, T, D), chosen sequences first, then rejected; or (N_total, D) with ``cu_seqlens``; it and the
            weight as of :func:`linear_token_logps`.
        weight: (V, D).
        labels: (2B, T) or (N_total,) int64 or int32.
        ref_logps: (2B,) floating, the reference model's log-probs summed over the completions.

    Returns:
        :class:`PairOutput`, float32 (float64 for float64 inputs); only ``loss`` carries a gradient.

    Raises:
        ValueError, TypeError: a malformed argument, or a ``memory_budget`` that no plan fits.
    """
    spec = dpo_spec(keywords)
    return _dpo_loss(LinearInputs.of(hidden, weight, labels, keywords, pairs=True), spec, keywords, ref_logps)


@accepts(BCOLinearKeywords)
@on_all_ranks
def linear_bco_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    desirable: Tensor,
    ref_logps: Tensor,
    **keywords: Unpack[BCOLinearKeywords],
) -> BCOOutput:
    """:func:`bco_loss` from hidden states and the head's weight, in the memory of the gradients.

    Three products where δ is known beforehand: a number, a tensor, or a :class:`RewardShift` with ``update="step"``;
    three to four where this batch moves it.

    Args:
        hidden: (S, T, D), or (N_total, D) with ``cu_seqlens``; sequences in any order; it and the weight as of
            :func:`linear_token_logps`.
        weight: (V, D).
        labels: (S, T) or (N_total,) int64 or int32.
        desirable: bool (S,).
        ref_logps: (S,) floating, the reference model's log-probs summed over the completions.

    Returns:
        :class:`BCOOutput`, float32 (float64 for float64 inputs); only ``loss`` carries a gradient.

    Raises:
        ValueError, TypeError: a malformed argument, or a ``memory_budget`` that no plan fits.
    """
    spec, normalizers = bco_spec(keywords), bco_normalizers(keywords)
    inputs = LinearInputs.of(hidden, weight, labels, keywords)
    delta = reward_shift(keywords, inputs.targets.device)
    return _unpaired_loss(inputs, spec, desirable, ref_logps, delta, keywords["sample_weight"], *normalizers)


@accepts(KTOLinearKeywords)
@on_all_ranks
def linear_kto_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    desirable: Tensor,
    ref_logps: Tensor,
    **keywords: Unpack[KTOLinearKeywords],
) -> KTOOutput:
    """:func:`kto_loss` from hidden states and the head's weight, in the memory of the gradients: three products.

    Args:
        hidden: (S, T, D), or (N_total, D) with ``cu_seqlens``; sequences in any order; it and the weight as of
            :func:`linear_token_logps`.
        weight: (V, D).
        labels: (S, T) or (N_total,) int64 or int32.
        desirable: bool (S,).
        ref_logps: (S,) floating, the reference model's log-probs summed over the completions.

    Returns:
        :class:`KTOOutput`, float32 (float64 for float64 inputs); only ``loss`` carries a gradient.

    Raises:
        ValueError, TypeError: a malformed argument, or a ``memory_budget`` that no plan fits.
    """
    spec, (kl, sequences) = kto_spec(keywords), kto_numbers(keywords)
    inputs = LinearInputs.of(hidden, weight, labels, keywords)
    return _unpaired_loss(inputs, spec, desirable, ref_logps, kl, None, sequences, None)


def _token_logps(inputs: Inputs) -> Tensor:
    logp = inputs.tokens().logp
    validate.values("the log-prob of each token", logp, torch.isfinite, "finite")
    return logp[:, :-1] if inputs.spec.shift and inputs.cu_seqlens is None else logp


def _sequence_logps(inputs: Inputs, average: bool) -> Tensor:
    tokens = inputs.tokens()
    scores = inputs.scores(tokens.logp.detach(), tokens.means)
    sums = KnownSlopeFunction.apply(tokens.logp, inputs.cu_seqlens, scores.sums, None, inputs.spec.backend)
    return (sums / scores.counts.clamp(min=1) if average else sums).to(inputs.dtype)  # type: ignore[operator]


def _dpo_loss(inputs: Inputs, spec: PairSpec, keywords: Mapping[str, Any], ref_logps: Any) -> PairOutput:
    ref_logps, normalizers = inputs.per_sequence("ref_logps", ref_logps), dpo_normalizers(keywords)
    delta = dpo_shift(keywords, inputs.targets.device)
    output = inputs.evaluate(PairObjective(spec, ref_logps, *normalizers, delta))
    if delta is not None:
        # A RewardShift that this batch moves is moved before it is used.
        used = delta.current() if isinstance(delta, RewardShift) else delta
        output.delta = narrow(output.loss.new_zeros((), dtype=torch.float64) + used, output.loss.dtype)
    return output


def _unpaired_loss(
    inputs: Inputs, spec: UnpairedSpec, desirable: Any, ref_logps: Any, shift: Any, weight: Any, *normalizers: Any
) -> Any:
    desirable = inputs.per_sequence("desirable", desirable, (torch.bool,))
    ref_logps = inputs.per_sequence("ref_logps", ref_logps)
    if weight is not None:
        validate.tensor_or_none("sample_weight", weight, "(S,)")
        weight = inputs.per_sequence(
            "sample_weight", weight, good=lambda weight: weight.isfinite() & (weight >= 0), expected=">= 0"
        )
    output = inputs.evaluate(UnpairedObjective(spec, desirable, ref_logps, shift, weight, *normalizers))
    output.desirable = desirable
    return output
