"""The launches that are compiled as proof: every kernel, with the flags that change its code.

A new kernel is added by one :class:`Case` that calls its launcher with meta tensors; the configurations of each target
are chosen by the launcher itself. ``python -m fused_pref kernels`` fails while a kernel has no case.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_pref.keywords import CPOKeywords, DPOKeywords, defaults
from fused_pref.losses.pair import DPO_LOSS_TYPES
from fused_pref.losses.pair_spec import cpo_spec, dpo_spec
from fused_pref.ops.interface import ShiftMemory, TargetRows, Transform, UnpairedSpec
from fused_pref.ops.torch.chunk import padded
from fused_pref.ops.triton import (
    chunk,
    configs,
    dlogits,
    gemm,
    linear,
    logprob,
    objective,
    pairs,
    scale,
    selected,
    sequences,
)

LOGITS = (torch.float32, torch.bfloat16, torch.float16)
SUMS = (torch.float64,)
HALVES = (torch.bfloat16, torch.float16)
VOCABULARY, SEQUENCES = 128256, 10


@dataclass(frozen=True)
class Case:
    """A call of a launcher, for each of ``dtypes``."""

    name: str
    launch: Callable[[torch.dtype], object]
    dtypes: tuple[torch.dtype, ...] = LOGITS


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def batch(
    dtype: torch.dtype, rows: int = 8192, columns: int = VOCABULARY, packed: bool = False, strided: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits and targets."""
    shape = (rows,) if packed else (2, rows // 2)
    logits = meta(*shape[:-1], columns, shape[-1], dtype=dtype).mT if strided else meta(*shape, columns, dtype=dtype)
    return logits, meta(*shape, dtype=torch.int64)


def ends(packed: bool) -> Tensor | None:
    """Boundaries of packed sequences."""
    return meta(SEQUENCES + 1, dtype=torch.int32) if packed else None


def forward(
    dtype: torch.dtype,
    mean: str | None = None,
    transform: Transform | None = None,
    metrics: bool = False,
    **sizes: Any,
) -> tuple[Tensor, ...]:
    """Launch the token log-probs; ``sizes`` as :func:`batch` takes them."""
    transform = transform or Transform()
    return logprob.token_logps_fwd(*batch(dtype, **sizes), mean, -100, transform, metrics=metrics)


def backward(dtype: torch.dtype, transform: Transform | None = None, **sizes: Any) -> None:
    """Launch the gradient of the logits, in place."""
    logits, targets = batch(dtype, **sizes)
    statistics, grad_logp = meta(3, *targets.shape), meta(*targets.shape)
    dlogits.token_logps_bwd(logits, logits, targets, statistics, grad_logp, -100, transform or Transform())


def chunk_statistics(
    dtype: torch.dtype,
    logit_sum: bool = False,
    transform: Transform | None = None,
    columns: int = 4096,
    metrics: bool = False,
) -> None:
    """Launch the statistics of a chunk."""
    logits, targets = meta(8192, columns, dtype=dtype), meta(8192, dtype=torch.int64)
    chunk.update_statistics(
        meta(8 if metrics else 4, 8192), logits, targets, 0, transform or Transform(), logit_sum=logit_sum
    )


def chunk_gradient(
    dtype: torch.dtype, out_dtype: torch.dtype | None = None, transform: Transform | None = None, columns: int = 4096
) -> None:
    """Launch the gradient of a chunk, over it; ``out_dtype`` is what is written."""
    logits, targets = meta(8192, columns, dtype=dtype), meta(8192, dtype=torch.int64)
    out = logits if out_dtype is None else logits.view(out_dtype)[:, :columns]
    chunk.gradient(out, logits, meta(4, 8192), targets, 0, transform or Transform())


def finished_rows(dtype: torch.dtype) -> None:
    """Launch the log-probs of rows from their statistics, and the targets out of their Q."""
    targets = meta(8192, dtype=torch.int64)
    chunk.finish(meta(4, 8192), targets, VOCABULARY, -100)
    chunk.take_targets(meta(8192, 4096, dtype=dtype), targets, 4096)


def operands(dtype: torch.dtype, columns: int, features: int, by_index: bool, bias: bool) -> gemm.Operands:
    """Rows of hidden states and a slice of the weight."""
    indices = meta(8192, dtype=torch.int64) if by_index else None
    hidden, weight = meta(16384 if by_index else 8192, features, dtype=dtype), meta(columns, features, dtype=dtype)
    return gemm.Operands(hidden, weight, meta(columns, dtype=dtype) if bias else None, indices)


def linear_statistics(
    dtype: torch.dtype,
    logit_sum: bool = False,
    transform: Transform | None = None,
    features: int = 4096,
    vocabulary: int = VOCABULARY,
    by_index: bool = True,
    bias: bool = False,
    metrics: bool = False,
) -> None:
    """Launch the statistics of rows of the linear head."""
    head, targets = operands(dtype, vocabulary, features, by_index, bias), meta(8192, dtype=torch.int64)
    linear.update_statistics(
        meta(8 if metrics else 4, 8192), head, targets, 0, transform or Transform(), logit_sum=logit_sum
    )


def linear_exponentials(
    dtype: torch.dtype,
    transform: Transform | None = None,
    features: int = 4096,
    vocabulary: int = VOCABULARY,
    bias: bool = False,
    metrics: bool = False,
) -> None:
    """Launch the exponentials of a group of rows, and their statistics."""
    head, targets = operands(dtype, vocabulary, features, False, bias), meta(8192, dtype=torch.int64)
    out = meta(8192, padded(vocabulary), dtype=dtype)
    statistics = meta(8 if metrics else 4, 8192)
    linear.exponentials(out, head, statistics, targets, transform or Transform(), -100, logit_sum=False)


def linear_gradient(
    dtype: torch.dtype,
    transform: Transform | None = None,
    features: int = 4096,
    vocabulary: int = VOCABULARY,
    bias: bool = False,
    selected_rows: bool = False,
) -> None:
    """Launch the gradient of a slice of the linear head; ``selected_rows``: of as many rows as the device says."""
    columns = min(vocabulary, 8192)
    head, targets = operands(dtype, columns, features, selected_rows, bias), meta(8192, dtype=torch.int64)
    out, count = meta(8192, columns, dtype=dtype), meta(dtype=torch.int32) if selected_rows else None
    linear.gradient(out, head, meta(4, 8192), targets, 0, transform or Transform(), count)


def selected_products(dtype: torch.dtype, features: int = 4096, columns: int = 4096) -> None:
    """Launch the products of selected rows, into a float32 dW if it is scaled."""
    q, rows, weight = (meta(8192, columns, dtype=dtype), meta(8192, features, dtype=dtype), meta(columns, features))
    indices, count = meta(8192, dtype=torch.int64), meta(dtype=torch.int32)
    scaled = dtype == torch.float16
    out, scale = (weight, meta()) if scaled else (weight.to(dtype), None)
    selected.weight_product(out, q, rows, indices, count, scale)
    selected.hidden_product(meta(8192, features), q, weight.to(dtype), indices, count)
    selected.bias_product(meta(columns), q, meta(8192), indices, count)


def scattered_rows(dtype: torch.dtype, features: int = 4096, label: bool = True) -> None:
    """Launch rows of a product and their targets to their places among the hidden states, or rows alone to new ones."""
    number = meta(8192, dtype=torch.int64)
    if label:
        own = TargetRows(number, meta(8192), meta(VOCABULARY, features, dtype=dtype))
        chunk.scatter_rows(meta(16384, features, dtype=dtype), meta(8192, features), meta(8192), number, own)
    else:
        rows = meta(8192, features, dtype=dtype)
        chunk.scatter_rows(rows, rows, meta(8192))


def added_target_rows(dtype: torch.dtype, features: int = 4096) -> None:
    """Launch the targets' parts of dW."""
    dw, h = meta(VOCABULARY, features, dtype=dtype), meta(8192, features, dtype=dtype)
    chunk.add_target_rows(dw, h, meta(8192), meta(8192, dtype=torch.int64))


def with_tf32(launch: Callable[[torch.dtype], object], dtype: torch.dtype) -> None:
    """Launch with products of float32 that may be rounded."""
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        launch(dtype)
    finally:
        settings.fp32_precision = before


def in_one_loop(launch: Callable[[torch.dtype], object], dtype: torch.dtype) -> None:
    """Launch statistics in their flattened form, as a search might choose."""

    def choose(kernel: str, device: torch.device, dtype: torch.dtype, size: int, default: Any, *_: object) -> Any:
        flattened = kernel.startswith("linear_statistics") and default.descriptors
        return replace(default, flattened=True) if flattened else default

    before, configs.chooser = configs.chooser, choose
    try:
        launch(dtype)
    finally:
        configs.chooser = before


def gradient_scale(dtype: torch.dtype) -> None:
    """Launch the scaling of gradients."""
    scale.scale_([meta(8192, 4096, dtype=dtype), meta(VOCABULARY, 4096, dtype=dtype), meta(VOCABULARY)], meta())


def scores(dtype: torch.dtype, mean: str | None, packed: bool) -> tuple[Tensor | None, ...]:
    """Launch the sums per sequence."""
    _, targets = batch(dtype, packed=packed)
    logp = meta(*targets.shape)
    return sequences.sequence_scores(logp, logp, targets, ends(packed), mean, -100)


def targets(dtype: torch.dtype, packed: bool) -> Tensor:
    """Launch the label that each position scores."""
    _, labels = batch(dtype, packed=packed)
    return sequences.targets_of(labels, ends(packed), -100)


def expand(dtype: torch.dtype) -> None:
    """Launch the way back from sequences to tokens."""
    cu_seqlens = meta(SEQUENCES + 1, dtype=torch.int32)
    sequences.expand(meta(8192), meta(SEQUENCES, dtype=dtype), meta(), cu_seqlens)


def pair(
    dtype: torch.dtype,
    loss_type: Any,
    reference: bool = False,
    mean: str | None = None,
    normalizer: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, ...]:
    """Launch CPO, or with ``reference`` DPO."""
    sums, counts = meta(SEQUENCES, dtype=dtype), meta(SEQUENCES, dtype=torch.int64)
    totals, positions = (sums, counts) if mean else (None, None)
    given = {"loss_type": loss_type, "cpo_alpha": 0.0, "alpha": 0.0, "label_smoothing": 0.1, **keywords}
    spec = dpo_spec({**defaults(DPOKeywords), **given}) if reference else cpo_spec({**defaults(CPOKeywords), **given})
    matched = [term for term in spec.terms if term.matched]
    partners = meta(len(matched), SEQUENCES, dtype=dtype) if matched else None
    ref_logps = meta(SEQUENCES) if reference else None
    return pairs.pair_objective(
        (sums, counts, totals, positions), ref_logps, partners, normalizer, normalizer, normalizer, spec
    )


def unpaired(
    dtype: torch.dtype,
    loss_type: str = "bco",
    kind: str = "fixed",
    update: str | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    mean: str | None = None,
    number: Tensor | None = None,
    factors: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, ...]:
    """Launch BCO or KTO; ``number`` stands for the shift and every normalizer, ``factors`` for the class weights."""
    sums, counts = meta(SEQUENCES, dtype=dtype), meta(SEQUENCES, dtype=torch.int64)
    flags, ref_logps = meta(SEQUENCES, dtype=torch.bool), meta(SEQUENCES)
    means, numbers = meta(2, dtype=torch.float64), meta(2, dtype=torch.int64)
    delta = 0.0 if number is None else number
    shift = delta if kind == "fixed" else ShiftMemory(means, numbers, means, numbers, kind, update, 0.9)
    totals = (sums, counts) if mean else (None, None)
    classes = None if number is None or reduction == "mean" else (number, number)
    spec = UnpairedSpec(loss_type, 0.1, reduction, *factors)
    return objective.unpaired_objective(sums, *totals, flags, ref_logps, weight, shift, number, classes, spec)


SOFTCAP, SCALE, NUMBER = Transform("tanh", 1 / 30, 30.0), Transform("linear", 1 / 0.7), meta()
SUMS_SOFTCAP: dict[str, Any] = {"logit_sum": True, "transform": SOFTCAP}
# Rows too few to fill a GPU, a vocabulary whose rows are not aligned, and one where they are by 8 entries only.
FEW, ODD, EIGHTS = {"rows": 8}, {"columns": 151937}, {"columns": 32008}
# A mixture of more losses may need more registers than there are.
THREES = [DPO_LOSS_TYPES[first : first + 3] for first in range(0, len(DPO_LOSS_TYPES), 3)]
MIXTURE: dict[str, Any] = {"loss_type": ("robust", "exo_pair", "discopop"), "reference": True}
TRANSFORMED = ("forward_kl", "js_divergence")

CASES = [
    Case("plain", forward),
    Case("means", partial(forward, mean="all")),
    Case("means, softcap", partial(forward, mean="all", transform=SOFTCAP)),
    Case("scale", partial(forward, transform=SCALE)),
    Case("packed", partial(forward, packed=True)),
    Case("split", partial(forward, **FEW)),
    Case("metrics", partial(forward, metrics=True)),
    Case("split, metrics, softcap", partial(forward, metrics=True, transform=SOFTCAP, **FEW)),
    Case("split, packed, means, softcap", partial(forward, packed=True, mean="all", transform=SOFTCAP, **FEW)),
    Case("odd vocabulary", partial(forward, mean="all", **ODD)),
    Case("vocabulary of 8k", partial(forward, mean="all", **EIGHTS), (torch.bfloat16,)),
    Case("small vocabulary", partial(forward, mean="all", columns=1000), (torch.bfloat16,)),
    Case("any strides", partial(forward, mean="all", strided=True), (torch.bfloat16,)),
    Case("plain", backward),
    Case("softcap", partial(backward, transform=SOFTCAP)),
    Case("scale", partial(backward, transform=SCALE)),
    Case("packed", partial(backward, packed=True)),
    Case("odd vocabulary", partial(backward, **ODD)),
    Case("vocabulary of 8k", partial(backward, **EIGHTS), (torch.bfloat16,)),
    Case("small vocabulary", partial(backward, columns=1000), (torch.bfloat16,)),
    Case("any strides", partial(backward, strided=True), (torch.bfloat16,)),
    Case("plain", chunk_statistics),
    Case("sums, softcap", partial(chunk_statistics, logit_sum=True, transform=SOFTCAP)),
    Case("metrics", partial(chunk_statistics, metrics=True)),
    Case("odd vocabulary", partial(chunk_statistics, **ODD), (torch.float32,)),
    Case("plain", chunk_gradient),
    Case("16-bit", partial(chunk_gradient, out_dtype=torch.bfloat16), (torch.float32,)),
    Case(
        "16-bit over float32, softcap",
        partial(chunk_gradient, out_dtype=torch.float16, transform=SOFTCAP),
        (torch.float32,),
    ),
    Case("odd vocabulary", partial(chunk_gradient, **ODD), (torch.float32,)),
    Case("finished rows", finished_rows, (torch.float32, torch.bfloat16)),
    Case("targets of dW", added_target_rows),
    Case("odd depth", partial(added_target_rows, features=2305), (torch.bfloat16,)),
    Case("by index, with targets", scattered_rows),
    Case("rows alone", partial(scattered_rows, label=False)),
    Case("odd depth", partial(scattered_rows, features=2305), (torch.bfloat16,)),
    Case("by index", linear_statistics),
    Case("dense, bias", partial(linear_statistics, by_index=False, bias=True)),
    Case("sums, softcap", partial(linear_statistics, **SUMS_SOFTCAP)),
    Case("metrics", partial(linear_statistics, metrics=True)),
    Case("odd depth", partial(linear_statistics, features=2305), (torch.bfloat16,)),
    Case("depth cut, bias", partial(linear_statistics, features=2312, bias=True), (torch.bfloat16,)),
    Case("odd vocabulary, bias", partial(linear_statistics, vocabulary=151937, bias=True), (torch.bfloat16,)),
    Case("by index, TF32", partial(with_tf32, linear_statistics), (torch.float32,)),
    Case("one loop, by index", partial(in_one_loop, linear_statistics), HALVES),
    Case("one loop, dense", partial(in_one_loop, partial(linear_statistics, by_index=False)), HALVES),
    Case("one loop, bias", partial(in_one_loop, partial(linear_statistics, bias=True)), HALVES),
    Case("one loop, sums, softcap", partial(in_one_loop, partial(linear_statistics, **SUMS_SOFTCAP)), HALVES),
    Case("one loop, metrics", partial(in_one_loop, partial(linear_statistics, metrics=True)), HALVES),
    Case("exponentials", linear_exponentials, (torch.float32, torch.bfloat16)),
    Case("exponentials, metrics", partial(linear_exponentials, metrics=True), (torch.float32, torch.bfloat16)),
    Case("exponentials, bias", partial(linear_exponentials, bias=True), (torch.bfloat16,)),
    Case("exponentials, odd vocabulary", partial(linear_exponentials, vocabulary=151937), (torch.bfloat16,)),
    Case("exponentials, depth cut", partial(linear_exponentials, features=2312), (torch.bfloat16,)),
    Case("exponentials, softcap, bias", partial(linear_exponentials, transform=SOFTCAP, bias=True), (torch.bfloat16,)),
    Case("plain", linear_gradient),
    Case("bias", partial(linear_gradient, bias=True)),
    Case("TF32", partial(with_tf32, linear_gradient), (torch.float32,)),
    Case("softcap", partial(linear_gradient, transform=SOFTCAP)),
    Case("odd depth", partial(linear_gradient, features=2305), (torch.bfloat16,)),
    Case("selected rows", partial(linear_gradient, selected_rows=True)),
    Case("selected rows, softcap, bias", partial(linear_gradient, selected_rows=True, transform=SOFTCAP, bias=True)),
    Case("plain", selected_products),
    Case("odd depth", partial(selected_products, features=2305), (torch.bfloat16,)),
    Case("odd columns", partial(selected_products, columns=4001), (torch.bfloat16,)),
    Case("TF32", partial(with_tf32, selected_products), (torch.float32,)),
    Case("plain", gradient_scale),
    Case("padded", partial(targets, packed=False), SUMS),
    Case("packed", partial(targets, packed=True), SUMS),
    Case("padded, means", partial(scores, mean="all", packed=False), SUMS),
    Case("packed", partial(scores, mean=None, packed=True), SUMS),
    Case("packed", expand, SUMS),
    Case("sigmoid, NLL, means", partial(pair, loss_type="sigmoid", cpo_alpha=1.0, mean="all"), SUMS),
    Case("sigmoid, NLL, normalizers", partial(pair, loss_type="sigmoid", cpo_alpha=1.0, normalizer=NUMBER), SUMS),
    Case("hinge, NLL of sequences", partial(pair, loss_type="hinge", cpo_alpha=1.0, nll_reduction="sequence"), SUMS),
    Case("ipo, reference", partial(pair, loss_type="ipo", reference=True), SUMS),
    Case("simpo, alpha", partial(pair, loss_type="simpo", alpha=0.25), SUMS),
    Case("MPO", partial(pair, loss_type=("sigmoid", "bco_pair", "sft"), reference=True, normalizer=NUMBER), SUMS),
    *[Case(f"DPO {', '.join(names)}", partial(pair, loss_type=names, reference=True), SUMS) for names in THREES],
    *[Case(f"DPO {kind}", partial(pair, **MIXTURE, f_divergence_type=kind), SUMS) for kind in TRANSFORMED],
    Case("fixed", unpaired, SUMS),
    Case(
        "fixed, weights, normalizers",
        partial(unpaired, reduction="class_mean", weight=meta(SEQUENCES), number=NUMBER),
        SUMS,
    ),
    Case("running mean, means", partial(unpaired, kind="running_mean", update="forward", mean="all"), SUMS),
    Case("ema, class mean", partial(unpaired, kind="ema", update="forward", reduction="class_mean"), SUMS),
    Case("ema, step", partial(unpaired, kind="ema", update="step"), SUMS),
    Case("kto, means", partial(unpaired, loss_type="kto", mean="all"), SUMS),
    Case("kto, weights, normalizer", partial(unpaired, loss_type="kto", number=NUMBER, factors=(1.0, 1.5)), SUMS),
    Case("apo_zero_unpaired", partial(unpaired, loss_type="apo_zero_unpaired"), SUMS),
]
