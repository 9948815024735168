"""Run every launcher once on a GPU, on small sizes that span several programs, for NVIDIA's checks of memory:

    compute-sanitizer --tool memcheck python tests/helpers/sanitize.py
    compute-sanitizer --tool racecheck python tests/helpers/sanitize.py

Tensors are then allocated one by one, so that an access beyond the end of one is noticed. Without a GPU it exits with a
message; ``tests/ops/test_races.py`` takes the same steps under the interpreter.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Step = tuple[str, Callable[[], object]]
# Sequences of a batch, and their length.
S, T = 4, 3


def steps(device: str, rows: int, features: int, vocabulary: int) -> Iterator[Step]:
    """Names and calls: N, D and V, of which D and V are multiples of 8, so that rows are aligned, and V + 3."""
    for dtype, columns in ((torch.float32, vocabulary), (torch.bfloat16, vocabulary), (torch.float32, vocabulary + 3)):
        sizes = (device, dtype, rows, features, columns)
        for step, call in itertools.chain(losses(device, dtype, columns), chunks(*sizes), products(*sizes)):
            yield f"{step}, {str(dtype).removeprefix('torch.')}, {columns} columns", call


def losses(device: str, dtype: torch.dtype, columns: int) -> Iterator[Step]:
    """The losses of logits: log-probs, sums of sequences, objectives, the way back and the gradient."""
    import fused_pref as fp

    torch.manual_seed(columns)
    ends = torch.arange(0, S * T + 1, T, device=device)
    flags = torch.arange(S, device=device) % 2 == 0
    ref, shift = torch.randn(S, device=device), fp.RewardShift("ema").to(device)

    def call(loss: Callable[..., Any], packed: bool, *args: Any, **keywords: Any) -> Callable[[], object]:
        shape = (S * T,) if packed else (S, T)
        logits = torch.randn(*shape, columns, device=device).to(dtype).requires_grad_()
        labels = torch.randint(0, columns, shape, device=device)
        labels.view(-1)[:2] = -100
        keywords.update(backend="triton", cu_seqlens=ends if packed else None)
        # In place the gradient takes the place of a tensor that is not a leaf.
        source = logits + 0 if keywords.get("inplace_backward") else logits
        return lambda: loss(source, labels, *args, **keywords).loss.backward()

    yield "CPO, padded", call(fp.cpo_loss, False, logits_mean="all")
    yield "DPO in place, padded", call(fp.dpo_loss, False, ref, inplace_backward=True, softcap=5.0)
    yield "KTO, packed", call(fp.kto_loss, True, flags, ref, kl=0.5, undesirable_weight=1.3, logits_mean="all")
    yield "BCO, packed", call(fp.bco_loss, True, flags, ref, delta=shift, logits_mean="completion")


def chunks(device: str, dtype: torch.dtype, N: int, D: int, columns: int) -> Iterator[Step]:
    """What passes over logits chunks and rows of products."""
    from fused_pref.ops.interface import TargetRows
    from fused_pref.ops.torch.chunk import new_statistics
    from fused_pref.ops.triton import chunk, scale
    from fused_pref.spec import transform_of

    softcap = transform_of({"softcap": 5.0})
    logits, targets = torch.randn(N, columns, device=device), torch.randint(0, columns, (N,), device=device)
    narrow, statistics = logits.view(dtype)[:, :columns], new_statistics(N, logits, torch.float32)
    factor, q = torch.rand(2, N, device=device)
    rows, weight = torch.randn(N, D, device=device), torch.randn(columns, D, device=device).to(dtype)
    out, indices = torch.zeros(2 * N, D, device=device, dtype=dtype), torch.randperm(2 * N, device=device)[:N]
    # Most targets occur several times.
    repeated = targets % 5
    given = (statistics, targets, softcap, -100)
    yield "chunk", lambda: chunk.exponentials(narrow, logits, *given, logit_sum=True, apart=True)
    yield "targets of Q", lambda: chunk.take_targets(narrow, targets, 0)
    yield "log-probs of rows", lambda: chunk.finish(statistics, targets, columns, -100)
    yield "rows to their places", lambda: chunk.scatter_rows(out, rows, factor, indices, TargetRows(targets, q, weight))
    yield "rows where they are", lambda: chunk.scatter_rows(rows, rows, factor)
    yield "rows by columns", lambda: chunk.scatter_rows(out, rows.T.contiguous().T, factor)
    yield "targets of dW", lambda: chunk.add_target_rows(weight, rows.to(dtype), factor, repeated)
    yield "scale", lambda: scale.scale_([weight, rows], factor[0])
    yield "scale by 1", lambda: scale.scale_([weight], torch.ones((), device=device))


def products(device: str, dtype: torch.dtype, N: int, D: int, columns: int) -> Iterator[Step]:
    """What multiplies: the fused linear head and the products of selected rows."""
    from fused_pref.ops.interface import Operands, Transform
    from fused_pref.ops.torch.chunk import new_statistics, padded
    from fused_pref.ops.triton import linear, selected
    from fused_pref.spec import transform_of

    hidden = torch.rand(2 * N, D, device=device).to(dtype)
    weight, bias = torch.randn(columns, D, device=device).to(dtype), torch.randn(columns, device=device).to(dtype)
    # The last column's logits lie so far above those of the first columns that whole rows are computed again.
    weight[-1] = 10.0
    targets = torch.randint(0, columns, (N,), device=device)
    indices, count = torch.randperm(2 * N, device=device)[:N], torch.tensor(N - 3, dtype=torch.int32, device=device)
    transform, plain = transform_of({"softcap": 5.0}), Transform()
    statistics, factor = new_statistics(N, hidden, torch.float32), torch.rand(2 * N, device=device)
    wide = torch.empty(N, padded(columns), dtype=dtype, device=device)
    q, sums = torch.rand(N, columns, device=device).to(dtype), torch.zeros(2 * N, D, device=device)
    dw, db = torch.empty_like(weight), torch.empty(columns, device=device)

    def update_statistics(own: Tensor | None, chosen: Tensor | None, rows: Tensor) -> None:
        linear.update_statistics(statistics, Operands(rows, weight, own, chosen), targets, 0, transform, logit_sum=True)

    def gradient(own: Tensor | None, chosen: Tensor | None, number: Tensor | None, rows: Tensor) -> None:
        linear.gradient(wide, Operands(rows, weight, own, chosen), statistics, targets, 0, transform, number)

    def exponentials() -> None:
        fresh = new_statistics(N, hidden, torch.float32)
        operands = Operands(hidden[:N], weight, None, None)
        linear.exponentials(wide, operands, fresh, targets, plain, -100, logit_sum=True)

    yield "linear statistics", lambda: update_statistics(None, None, hidden[:N])
    yield "linear statistics by index", lambda: update_statistics(bias, indices, hidden)
    yield "linear gradient", lambda: gradient(bias, None, None, hidden[:N])
    yield "linear gradient of selected rows", lambda: gradient(None, indices, count, hidden)
    yield "linear exponentials", exponentials
    yield "selected rows, dW", lambda: selected.weight_product(dw, q, hidden, indices, count, None)
    yield "selected rows, dh", lambda: selected.hidden_product(sums, q, weight, indices, count)
    yield "selected rows, db", lambda: selected.bias_product(db, q, factor, indices, count)


def main() -> int:
    """Take every step; 2 if there is no GPU."""
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    sys.path.insert(0, str(Path(__file__).parents[2]))
    if not torch.cuda.is_available():
        print("sanitize: there is no GPU, and the tools that this is for watch one", file=sys.stderr)
        return 2
    for name, call in steps("cuda", 300, 200, 12_000):
        print(name, flush=True)
        call()
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
