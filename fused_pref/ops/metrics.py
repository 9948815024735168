"""Entropy, accuracy and Σ p² of a row's softmax, from statistics that are summed up as the chunks come.

A row's other entries fall into parts. With w_k the share of part k in the probability of all of them, and q_k the
softmax within it, the entropy of the whole is Σ w_k (H(q_k) − log w_k), and the sum of squares Σ w_k² Σ q_k²: no term
is negative, so nothing cancels. The target joins them at the end as a part of its own.
"""

import torch
from torch import Tensor

from fused_pref.ops.interface import ENTROPY, HIGHEST, SUM_SQ, TARGET_SEEN


def softmax_metrics(exponentials: Tensor, sum_exp: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and Σ q² of q = ``exponentials`` (n, v) over their ``sum_exp`` (n,), which is at least 1, or 0."""
    total = sum_exp.clamp(min=0.5)
    entropy = torch.special.entr(exponentials).sum(1).div_(total).add_(total.log())
    return entropy, (torch.linalg.vector_norm(exponentials, dim=1) / total).square_()


def merged_metrics(parts: Tensor, share: Tensor) -> Tensor:
    """(4, n) of the rows from ``ENTROPY`` on, of K disjoint parts (K, 4, n) with their shares (K, n)."""
    entropy, sum_sq, highest, seen = parts.unbind(1)
    entropy = (share * entropy + torch.special.entr(share)).sum(0)
    return torch.stack((entropy, (share.square() * sum_sq).sum(0), highest.amax(0), seen.amax(0)))


def token_metrics(statistics: Tensor, logp: Tensor, one_minus_p: Tensor) -> Tensor:
    """Entropy in nats, whether no logit is above the target's, and log Σ p², (3, n); NaN where logp is.

    Args:
        statistics: (8, n) of whole rows.
        logp: (n,) log-prob of the target; 0 where none is scored.
        one_minus_p: (n,) probability of the other entries; 0 where none is scored.
    """
    p, correct = logp.exp(), statistics[TARGET_SEEN] >= statistics[HIGHEST]
    own = torch.where(p > 0, p * -logp, p)
    entropy = one_minus_p * statistics[ENTROPY] + torch.special.entr(one_minus_p) + own
    sum_sq = (one_minus_p.square() * statistics[SUM_SQ] + p.square()).log()
    return torch.stack((entropy, correct.to(p.dtype).where(~logp.isnan(), torch.nan), sum_sq))
