"""Batches, fp64 oracles and measures shared by the tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fused_pref as fp
from benchmarks.measure import peak_bytes as peak_bytes

IGNORE = -100


@dataclass
class Batch:
    """Padded logits and labels; ``packed`` gives the same sequences without padding."""

    logits: Tensor
    labels: Tensor

    def packed(self, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        rows = [self.logits[s, :n] for s, n in enumerate(lengths)]
        labels = [self.labels[s, :n] for s, n in enumerate(lengths)]
        ends = torch.tensor([0, *lengths]).cumsum(0).to(self.labels.device, torch.int32)
        return torch.cat(rows), torch.cat(labels), ends


def make_batch(
    sequences: int,
    length: int,
    vocabulary: int,
    *,
    dtype: torch.dtype = torch.float32,
    mask: str = "some",
    device: str = "cpu",
    seed: int = 0,
    scale: float = 3.0,
) -> Batch:
    """Random logits; ``mask``: none, some (prompt and padding), one (token each), empty (a completion), all."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sequences, length, vocabulary, generator=generator) * scale
    labels = torch.randint(0, vocabulary, (sequences, length), generator=generator)
    if labels.numel():
        labels.view(-1)[0], labels.view(-1)[-1] = 0, vocabulary - 1
    if mask == "some":
        for s in range(sequences):
            labels[s, : (s % 3)] = IGNORE
            labels[s, length - s % 2 :] = IGNORE
    elif mask == "one":
        labels[:, : length - 1] = IGNORE
    elif mask == "empty" and sequences:
        labels[sequences // 2] = IGNORE
    elif mask == "all":
        labels[:] = IGNORE
    return Batch(logits.to(device, dtype), labels.to(device))


def reference_logps(sequences: int, device: str = "cpu", seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(sequences, generator=generator) * 4 - 15).to(device)


def run(function: Callable[..., Any], logits: Tensor, *args: Any, **keywords: Any) -> tuple[Any, Tensor]:
    """Output and gradient of the logits."""
    leaf = logits.detach().clone().requires_grad_()
    output = function(leaf, *args, **keywords)
    (output.loss if hasattr(output, "loss") else output.sum()).backward()
    assert leaf.grad is not None
    return output, leaf.grad


def assert_values(ours: Tensor, truth: Tensor, tolerance: float = 2e-5, what: str = "value") -> None:
    """|ours − truth| within tolerance · max(1, |truth|), everywhere."""
    assert ours.shape == truth.shape, what
    error = (ours.double() - truth.double()).abs() / truth.double().abs().clamp(min=1)
    assert error.numel() == 0 or error.max() <= tolerance, f"{what}: error {error.max():.3g}"


def assert_gradient(ours: Tensor, truth: Tensor, tolerance: float = 5e-5, what: str = "gradient") -> None:
    """Relative Frobenius error within tolerance, plus what rounding the truth itself to the dtype costs."""
    assert ours.shape == truth.shape, what
    assert ours.isfinite().all(), what
    rounding = (truth.to(ours.dtype).double() - truth).norm()
    error = (ours.double() - truth).norm()
    assert error <= tolerance * truth.norm() + 1.05 * rounding, f"{what}: {error:.3g} against {truth.norm():.3g}"


def assert_parity(name: str, logits: Tensor, *args: Any, **keywords: Any) -> Any:
    """Every field and the gradient of ``fp.<name>`` against the reference in float64."""
    ours, grad = run(getattr(fp, name), logits, *args, **keywords)
    reference = {key: value for key, value in keywords.items() if key != "inplace_backward"}
    truth, true_grad = run(getattr(fp.reference, name), logits.double(), *args, **reference)
    if isinstance(ours, Tensor):
        assert_values(ours, truth)
    else:
        for field in ours._fields:
            mine, other = getattr(ours, field), getattr(truth, field)
            assert (mine is None) == (other is None), field
            if mine is not None:
                assert_values(mine, other, what=field)
                assert mine.requires_grad == (field == "loss"), field
    # Triton's interpreter truncates where a GPU rounds to bfloat16.
    truncates = keywords.get("backend") == "triton" and logits.device.type == "cpu" and logits.dtype == torch.bfloat16
    assert_gradient(grad, true_grad, 2**-7 if truncates else 5e-5)
    assert grad.dtype == logits.dtype
    return ours


@dataclass
class Hidden:
    """Hidden states, a head and labels; ``wanted`` names the gradients: h(idden), w(eight), b(ias)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    wanted: str = "hwb"

    def packed(self, lengths: list[int]) -> tuple["Hidden", Tensor]:
        rows, labels, ends = Batch(self.hidden, self.labels).packed(lengths)
        return Hidden(rows, self.weight, self.bias, labels, self.wanted), ends

    def aim(self, logit: float) -> None:
        """Turn the hidden states so that about this is added to the logit of each position's target."""
        rows = self.weight[self.labels[:, 1:]]
        aligned = rows / (rows * rows).sum(-1, keepdim=True)
        self.hidden[:, :-1] = self.hidden[:, :-1] * 0.1 + aligned * logit


def make_hidden(
    sequences: int,
    length: int,
    features: int,
    vocabulary: int,
    *,
    dtype: torch.dtype = torch.float32,
    mask: str = "some",
    bias: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Hidden:
    """Random hidden states and head whose logits have a spread of about 2; masks as in :func:`make_batch`."""
    labels = make_batch(sequences, length, vocabulary, mask=mask, device=device, seed=seed).labels
    generator = torch.Generator().manual_seed(seed + 1)
    parts = [(sequences, length, features), (vocabulary, features), (vocabulary,)]
    hidden, weight, offset = (torch.randn(shape, generator=generator) for shape in parts)
    weight = weight * 2 / features**0.5
    hidden, weight, offset = (part.to(device, dtype) for part in (hidden, weight, offset))
    return Hidden(hidden, weight, offset if bias else None, labels)


def run_linear(function: Callable[..., Any], batch: Hidden, *args: Any, **keywords: Any) -> tuple[Any, list[Any]]:
    """Output, and gradients of hidden states, weight and bias (None where not wanted)."""
    parts = zip("hwb", (batch.hidden, batch.weight, batch.bias), strict=True)
    leaves = [None if x is None else x.detach().requires_grad_(name in batch.wanted) for name, x in parts]
    if keywords.get("delta") == "running_mean":
        keywords["delta"] = fp.RewardShift().to(batch.hidden.device)
    output = function(leaves[0], leaves[1], batch.labels, *args, bias=leaves[2], **keywords)
    loss = output.loss if hasattr(output, "loss") else output.sum()
    assert loss.requires_grad == any(leaf is not None and leaf.requires_grad for leaf in leaves)
    if loss.requires_grad:
        loss.backward()
    return output, [None if leaf is None else leaf.grad for leaf in leaves]


def assert_linear_parity(name: str, batch: Hidden, *args: Any, **keywords: Any) -> Any:
    """Every field and gradient of ``fp.<name>`` against the reference in float64."""
    ours, grads = run_linear(getattr(fp, name), batch, *args, **keywords)
    wide = Hidden(
        batch.hidden.double(),
        batch.weight.double(),
        None if batch.bias is None else batch.bias.double(),
        batch.labels,
        batch.wanted,
    )
    truth, true_grads = run_linear(getattr(fp.reference, name), wide, *args, **keywords)
    values = {torch.float32: 2e-5, torch.float64: 1e-12}.get(batch.hidden.dtype, 2e-2)
    gradient = {torch.float32: 1e-4, torch.float64: 1e-12, torch.float16: 2e-3}.get(batch.hidden.dtype, 1e-2)
    for field in getattr(ours, "_fields", ["result"]):
        mine, other = (getattr(output, field, output) for output in (ours, truth))
        if mine is None or other is None:
            assert mine is other, field
        else:
            assert_values(mine, other, values, field)
    for part, mine, other in zip(("hidden", "weight", "bias"), grads, true_grads, strict=True):
        if mine is None or other is None:
            assert mine is other, part
        else:
            assert mine.dtype == batch.hidden.dtype
            assert_gradient(mine, other, gradient, f"gradient of {part}")
    return ours
