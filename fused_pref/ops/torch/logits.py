"""Token log-probs of logits in memory and their gradient, a block of rows at a time.

The row statistics are chosen so that nothing cancels: the row maximum m, and Σ exp(z − m) with and without the
target's entry. Then logp = −log1p(others/e_y) and the target's 1 − p = others/sum are exact where the target has
nearly all the probability, and logp ≤ 0 always.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_pref.ops.blocks import Rows, block_entries
from fused_pref.ops.interface import Transform


def blocks(wanted: Tensor, columns: int) -> Iterator[Tensor]:
    """Row numbers to visit, block by block: the wanted ones on a CPU; all elsewhere, where asking would synchronise."""
    place = wanted.device
    rows = wanted.nonzero()[:, 0] if place.type == "cpu" else torch.arange(wanted.numel(), device=place)
    yield from rows.split(max(1, block_entries(place) // columns))


def token_logps_fwd(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    transform: Transform,
    logits_mean: str | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fused_pref.head.custom_ops.token_logps_fwd`; ``dtype`` is that of the token math."""
    source, labels = Rows(logits), targets.flatten()
    scored = labels != ignore_index
    logp = torch.zeros(labels.shape, dtype=dtype, device=logits.device)
    statistics = torch.zeros((3, *labels.shape), dtype=dtype, device=logits.device)
    means = torch.zeros_like(logp)
    for rows in blocks(scored, source.columns):
        z = transform.apply_(source.read(rows).to(dtype))
        if logits_mean is not None:
            means[rows] = z.mean(1).where(scored[rows] | (logits_mean == "all"), 0)
        y = labels[rows].long()
        valid = (y >= 0) & (y < source.columns)
        y = y.where(valid, 0)[:, None]
        row_max = z.amax(1)
        zy = z.gather(1, y)[:, 0] - row_max
        sum_exp = z.sub_(row_max[:, None]).exp_().scatter_(1, y, 0).sum(1).where(valid, torch.nan)
        ey = zy.exp()
        value = torch.where(sum_exp < ey, -torch.log1p(sum_exp / ey), zy - torch.log(sum_exp + ey))
        logp[rows] = value.where(scored[rows], 0)
        statistics[:, rows] = torch.stack((row_max, sum_exp + ey, sum_exp))
    if logits_mean == "all" and logits.device.type == "cpu":
        for rows in blocks(~scored, source.columns):
            means[rows] = transform.apply_(source.read(rows).to(dtype)).mean(1)
    shape = targets.shape
    return logp.view(shape), statistics.view(3, *shape), means.view(shape)


def token_logps_bwd(
    dlogits: Tensor,
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    grad_logp: Tensor,
    ignore_index: int,
    transform: Transform,
) -> None:
    """Write a_n (onehot − softmax) into ``dlogits``, which may be ``logits``."""
    source, out, labels = Rows(logits), Rows(dlogits), targets.flatten()
    dtype = statistics.dtype
    scored, upstream = labels != ignore_index, grad_logp.flatten().to(dtype)
    row_max, total, sum_exp = statistics.view(3, -1)
    for rows in blocks(scored, source.columns):
        raw = source.read(rows)
        y = labels[rows].long()
        y = y.where((y >= 0) & (y < source.columns), 0)[:, None]
        factor = upstream[rows] / total[rows]
        dz = transform.apply_(raw.to(dtype, copy=True)).sub_(row_max[rows, None]).exp_().mul_(-factor[:, None])
        dz.scatter_(1, y, (factor * sum_exp[rows])[:, None])
        transform.backward_(dz, raw)
        if logits.device.type != "cpu":
            dz = dz.where(scored[rows, None], 0)
        out.write(rows, dz.to(dlogits.dtype))
    if logits.device.type == "cpu":
        for rows in blocks(~scored, source.columns):
            out.write(rows, dlogits.new_zeros(()))
