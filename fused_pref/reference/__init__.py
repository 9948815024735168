"""The specification: every function in plain PyTorch, differentiated by autograd.

The signatures are those of the functions specified; ``backend``, ``inplace_backward``, ``memory_budget``,
``max_valid_tokens``, ``skip_mass``, ``tp_group``, ``tp_partial`` and ``cp_group`` say how to compute, and where; they
have no effect here, and arguments are not validated.
Tensors as large as the logits are made several times over.

Symbols: S sequences, B pairs (S = 2B), T padded length, V vocabulary; w chosen, l rejected; ε label smoothing, σ the
logistic function. Token math is float32 (float64 for float64 logits); sums of log-probs and what follows are float64.
"""

from fused_pref.reference.linear import (
    linear_bco_loss,
    linear_cpo_loss,
    linear_dpo_loss,
    linear_kto_loss,
    linear_preference_loss,
    linear_sequence_logps,
    linear_token_logps,
)
from fused_pref.reference.objectives import (
    bco_loss,
    cpo_loss,
    dpo_loss,
    kto_loss,
    preference_loss,
    sequence_logps,
    token_logps,
)

__all__ = [
    "bco_loss",
    "cpo_loss",
    "dpo_loss",
    "kto_loss",
    "linear_bco_loss",
    "linear_cpo_loss",
    "linear_dpo_loss",
    "linear_kto_loss",
    "linear_preference_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "preference_loss",
    "sequence_logps",
    "token_logps",
]
