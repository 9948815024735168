"""Every public keyword, once: name, type, default and meaning.

A keyword table is a ``TypedDict`` whose values are annotated with :class:`Keyword`, or with :class:`PerCall` where the
``forward`` of a module takes the keyword, too. Functions, their references, their linear twins and their modules name
the table they take (``**keywords: Unpack[CPOKeywords]`` for the type checker, ``@accepts(CPOKeywords)`` for the
runtime), so that a default cannot differ between them. For editors ``python3 dev.py stubs`` writes the keywords out,
into ``.pyi`` files beside the modules.
See :mod:`fused_pref.keyword_tables`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from torch import Tensor
from typing_extensions import TypedDict

from fused_pref.keyword_tables import Keyword, PerCall, accepts, choices, defaults, table  # noqa: F401 - re-exported

if TYPE_CHECKING:
    from fused_pref.losses.reward_shift import RewardShift

Number = int | float
DPOLossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "sigmoid_norm",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "aot",
    "aot_unpaired",
]


class TokenKeywords(TypedDict, total=False):
    """Keywords of every function."""

    ignore_index: Annotated[int, Keyword(-100, "label of a position that is not scored")]
    shift: Annotated[
        bool,
        Keyword(True, "position t scores label t+1 of its sequence; False when the caller has shifted the labels"),
    ]
    cu_seqlens: Annotated[
        Tensor | None,
        PerCall(
            None,
            "int32 or int64 (S+1,) boundaries of packed sequences, from 0 to N_total, never falling; inputs are then "
            "(N_total, ...) and a sequence may be empty",
        ),
    ]
    softcap: Annotated[float | None, Keyword(None, "c > 0 of softcap(x) = c tanh(x/c), applied after logit_scale")]
    logit_scale: Annotated[float, Keyword(1.0, "factor on the raw logits, finite and not 0")]
    temperature: Annotated[float, Keyword(1.0, "divisor > 0 of the softcapped logits")]
    backend: Annotated[
        Literal["auto", "triton", "torch"], Keyword("auto", "which implementation computes the token terms")
    ]
    logits_mean: Annotated[
        Literal["all", "completion"] | None,
        Keyword(
            "all",
            "which positions the reported means of the transformed logits cover: all of them (TRL's CPO), the scored "
            "ones (TRL's DPO), or None for no means; without effect on functions that return log-probs only",
        ),
    ]
    cp_group: Annotated[
        Any,
        Keyword(
            None,
            "process group (or 1-d DeviceMesh) over which the positions of every sequence are spread, labels shifted "
            "beforehand (shift=False): sums over a sequence go over all ranks, which then have the same loss, and "
            "gradients are each rank's part; without effect on log-probs of tokens",
        ),
    ]


class LogitsKeywords(TokenKeywords, total=False):
    """Keywords of the functions of logits."""

    inplace_backward: Annotated[
        bool,
        Keyword(
            False,
            "write the gradient over the logits; a second backward then raises; under torch.compile, where the "
            "compiler owns the buffers, the gradient is written apart",
        ),
    ]


class LinearKeywords(TokenKeywords, total=False):
    """Keywords of the functions of hidden states and a weight."""

    bias: Annotated[Tensor | None, PerCall(None, "(V,) of the head, in the dtype of the weight; differentiable")]
    memory_budget: Annotated[
        int | None,
        Keyword(
            None,
            "bytes of workspace beyond inputs, gradients and results (> 0), or an error. None: 1/16 of the GPU's "
            "memory; on a CPU, and where the memory is not known, 256 MiB or the bytes of the weight's gradient, "
            "whichever is more. Where that is too little, about the smallest plan there is, with one warning",
        ),
    ]
    tp_group: Annotated[
        Any,
        Keyword(
            None,
            "process group (or 1-d DeviceMesh) of a vocab-parallel head: weight and bias are this rank's contiguous "
            "rows, in the order of the ranks and of any number; hidden states and labels are the same on all ranks",
        ),
    ]
    tp_partial: Annotated[
        bool,
        Keyword(
            False,
            "leave the gradient of the hidden states as this rank's part of the sum over tp_group, for a "
            "reduce-scatter of sequence parallelism",
        ),
    ]
    max_valid_tokens: Annotated[
        int | None,
        Keyword(
            None,
            "upper bound on N, the number of scored tokens, that spares the one host synchronisation; more tokens "
            "than that raise on a CPU and give NaN elsewhere",
        ),
    ]
    skip_mass: Annotated[
        float | None,
        Keyword(
            None,
            "probability in [0, 1) that the gradient of a token may lose, in whole tiles of the vocabulary without "
            "its target, which are then neither computed again nor multiplied; loss and log-probs stay exact, "
            "and dropped_mass of the output says what was left out (log-probs come without it: no token loses more "
            "than this). With a = the gradient of a token's log-prob, m its dropped mass and s = |logit_scale| / "
            "temperature, dh is wrong by at most s|a|m max|W_v| in that row, dW by the sum over tokens of s|a|m|h|, "
            "the bias by that of s|a|m. Under torch.compile, and where the sizes of products cannot be left to the "
            "device (the torch backend on a GPU), nothing is left out. None: nothing is",
        ),
    ]


class ObjectiveKeywords(TypedDict, total=False):
    """Keywords of every objective."""

    token_weight: Annotated[
        Tensor | None,
        PerCall(
            None,
            "factors on the log-probs of the labels, of their shape, floating and finite; without gradient. A token of "
            "weight 0 contributes exactly 0. Averages divide by the number of scored tokens. ref_logps must be "
            "weighted likewise. None: 1",
        ),
    ]
    token_metrics: Annotated[
        bool,
        Keyword(
            False,
            "give entropy (nats), accuracy (no logit is above the target's) and sum_sq (log of the sum of squared "
            "probabilities) with the output: (S,) means over the scored tokens of each sequence, of the transformed "
            "logits, beside its items and in metrics()",
        ),
    ]


class PairKeywords(TypedDict, total=False):
    """Keywords of the pairwise objectives."""

    beta: Annotated[float, Keyword(0.1, "factor > 0 on log-prob differences; for ipo the regularisation strength")]
    pair_normalizer: Annotated[
        Number | Tensor | None,
        PerCall(None, "replaces the number of pairs B in means over pairs (> 0; number or 0-d tensor)"),
    ]
    token_normalizer: Annotated[
        Number | Tensor | None,
        PerCall(None, "replaces the number of scored chosen tokens in the NLL (>= 0; number or 0-d tensor)"),
    ]


class CPOKeywords(PairKeywords, total=False):
    """Keywords of the CPO objective."""

    loss_type: Annotated[
        Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"],
        Keyword("sigmoid", "the preference term; alphapo is simpo with cpo_alpha = 0"),
    ]
    label_smoothing: Annotated[
        float, Keyword(0.0, "probability in [0, 1) that a preference is flipped; no effect on hinge and ipo")
    ]
    cpo_alpha: Annotated[float, Keyword(1.0, "weight >= 0 of the NLL of the chosen completions; 0: not computed")]
    simpo_gamma: Annotated[float, Keyword(0.5, "target margin gamma of simpo, finite")]
    alpha: Annotated[float, Keyword(0.0, "AlphaPO's exponent, finite; 0 leaves log-probs as they are")]
    nll_reduction: Annotated[
        Literal["token", "sequence"],
        Keyword("token", "NLL as a mean over scored chosen tokens, or over pairs of summed log-probs"),
    ]


class DPOKeywords(PairKeywords, total=False):
    """Keywords of the DPO objective."""

    loss_type: Annotated[
        DPOLossType | Sequence[DPOLossType],
        Keyword("sigmoid", "the preference term, or a sequence of terms that are added up in one pass"),
    ]
    loss_weights: Annotated[
        Sequence[float] | None,
        Keyword(None, "a finite factor for each name of loss_type; 0: not computed; None: 1 each"),
    ]
    label_smoothing: Annotated[
        float | Sequence[float],
        Keyword(
            0.0,
            "probability in [0, 1) that a preference is flipped, or one for each name of loss_type; acts on sigmoid, "
            "robust (< 0.5), exo_pair (> 0), aot and aot_unpaired, without effect on others",
        ),
    ]
    delta: Annotated[
        "RewardShift | float | Tensor",
        Keyword(0.0, "reward shift of bco_pair, the one name that takes it: a RewardShift, a number or a 0-d tensor"),
    ]
    discopop_tau: Annotated[float, Keyword(0.05, "temperature > 0 of discopop's mixture")]
    f_divergence_type: Annotated[
        Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
        Keyword(
            "reverse_kl",
            "divergence from the reference, of sigmoid, hinge, ipo, robust, exo_pair, discopop and sigmoid_norm: what "
            "its derivative f' makes of the log-ratios enters them",
        ),
    ]
    f_alpha_divergence_coef: Annotated[
        float, Keyword(1.0, "order of alpha_divergence, finite; within 1e-6 of 1 it is reverse_kl")
    ]


class BCOKeywords(TypedDict, total=False):
    """Keywords of the BCO objective."""

    beta: Annotated[float, Keyword(0.1, "factor > 0 on log-prob ratios: rewards are beta (logps - ref_logps)")]
    delta: Annotated[
        "RewardShift | float | Tensor", Keyword(0.0, "reward shift: a RewardShift, a finite number or a 0-d tensor")
    ]
    sample_weight: Annotated[
        Tensor | None, PerCall(None, "(S,) factors >= 0 on the losses, as from DensityRatio; None: 1")
    ]
    reduction: Annotated[
        Literal["mean", "class_mean"],
        Keyword("mean", "pooled mean over sequences (TRL), or the sum of the two class means (the paper)"),
    ]
    sequence_normalizer: Annotated[
        Number | Tensor | None,
        PerCall(None, 'replaces the number of sequences S in reduction="mean" (> 0; number or 0-d tensor)'),
    ]
    class_normalizer: Annotated[
        tuple[Number | Tensor, Number | Tensor] | None,
        PerCall(None, 'replaces (n+, n-), the class counts, in reduction="class_mean" (>= 0; numbers or 0-d tensors)'),
    ]


class KTOKeywords(TypedDict, total=False):
    """Keywords of the KTO objective."""

    kl: Annotated[
        float | Tensor,
        PerCall(
            0.0,
            "estimate of KL(policy || reference) in nats, clamped by the caller: a finite number or a 0-d tensor, "
            "through which no gradient flows; no effect on apo_zero_unpaired",
        ),
    ]
    beta: Annotated[float, Keyword(0.1, "factor > 0 on log-prob ratios: rewards are beta (logps - ref_logps)")]
    loss_type: Annotated[
        Literal["kto", "apo_zero_unpaired"], Keyword("kto", "rewards against beta kl, or against 0 (APO)")
    ]
    desirable_weight: Annotated[float, Keyword(1.0, "factor >= 0 on the losses of desirable sequences, finite")]
    undesirable_weight: Annotated[float, Keyword(1.0, "factor >= 0 on the losses of undesirable sequences, finite")]
    sequence_normalizer: Annotated[
        Number | Tensor | None,
        PerCall(None, "replaces the number of sequences S in the mean (> 0; number or 0-d tensor)"),
    ]


class PreferenceKeywords(TypedDict, total=False):
    """Keywords of an objective of the user's."""

    unit: Annotated[
        Literal[2, 1] | None,
        Keyword(
            2,
            "what has a loss of its own: 2, a pair (chosen sequences first, then rejected); 1, a sequence; None, the "
            "whole batch, whose sequences may be coupled in any way",
        ),
    ]
    ref_logps: Annotated[
        Tensor | None, PerCall(None, "(S,) floating, the reference model's log-probs summed over the completions")
    ]
    normalizer: Annotated[
        Number | Tensor | None,
        PerCall(None, "replaces the number of units in the mean (> 0; number or 0-d tensor); not with unit=None"),
    ]


class SequenceKeywords(TypedDict, total=False):
    """Keywords of the per-sequence log-probs."""

    average: Annotated[bool, Keyword(False, "divide each sum by the number of scored tokens of its sequence")]


class SequenceLogitsKeywords(SequenceKeywords, LogitsKeywords, total=False):
    """Keywords of :func:`fused_pref.sequence_logps`."""


class CPOLogitsKeywords(CPOKeywords, ObjectiveKeywords, LogitsKeywords, total=False):
    """Keywords of :func:`fused_pref.cpo_loss`."""


class DPOLogitsKeywords(DPOKeywords, ObjectiveKeywords, LogitsKeywords, total=False):
    """Keywords of :func:`fused_pref.dpo_loss`."""


class BCOLogitsKeywords(BCOKeywords, ObjectiveKeywords, LogitsKeywords, total=False):
    """Keywords of :func:`fused_pref.bco_loss`."""


class KTOLogitsKeywords(KTOKeywords, ObjectiveKeywords, LogitsKeywords, total=False):
    """Keywords of :func:`fused_pref.kto_loss`."""


class PreferenceLogitsKeywords(PreferenceKeywords, ObjectiveKeywords, LogitsKeywords, total=False):
    """Keywords of :func:`fused_pref.preference_loss`."""


class PreferenceLinearKeywords(PreferenceKeywords, ObjectiveKeywords, LinearKeywords, total=False):
    """Keywords of :func:`fused_pref.linear_preference_loss`."""


class SequenceLinearKeywords(SequenceKeywords, LinearKeywords, total=False):
    """Keywords of :func:`fused_pref.linear_sequence_logps`."""


class CPOLinearKeywords(CPOKeywords, ObjectiveKeywords, LinearKeywords, total=False):
    """Keywords of :func:`fused_pref.linear_cpo_loss`."""


class DPOLinearKeywords(DPOKeywords, ObjectiveKeywords, LinearKeywords, total=False):
    """Keywords of :func:`fused_pref.linear_dpo_loss`."""


class BCOLinearKeywords(BCOKeywords, ObjectiveKeywords, LinearKeywords, total=False):
    """Keywords of :func:`fused_pref.linear_bco_loss`."""


class KTOLinearKeywords(KTOKeywords, ObjectiveKeywords, LinearKeywords, total=False):
    """Keywords of :func:`fused_pref.linear_kto_loss`."""
