"""``python -m benchmarks padding``: a training step with and without padding, by the number of sequences in a batch.

A step is the forward of a Llama with the CPO loss at its head, and the backward, without the optimiser. Each batch
comes padded, in one row, and in rows of as many tokens as the longest sequence has.
"""

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.compare.tables import line
from benchmarks.measure import alternate, check_device, check_rounds, default_device, describe
from fused_pref.cli.usage import UsageError

SMALL = {"vocabulary": 2000, "hidden": 32, "layers": 1, "pairs": [2, 4]}
FORMS = ("padded", "one row", "rows")
HEADER = ("pairs", "tokens", "padding", *(f"{form}, tokens/s" for form in FORMS), "one row / padded", "rows / padded")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--pairs", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64], metavar="B", help="of a batch")
    parser.add_argument("--shortest", type=int, default=16, metavar="T", help="default: %(default)s")
    parser.add_argument("--longest", type=int, default=128, metavar="T", help="default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=32_768, metavar="V", help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=256, metavar="D", help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device(), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="small sizes, to see that it runs")


def run(args: argparse.Namespace) -> int:
    """Print a row for each number of pairs; 1 if the losses of the forms differ by more than 1e-4 (bfloat16: 1e-2)."""
    check_device(args.device)
    check_rounds(args.rounds)
    if args.small:
        vars(args).update(SMALL)
    if min(args.pairs) < 1:
        raise UsageError(f"--pairs must be at least 1; got {min(args.pairs)}")
    if not 2 <= args.shortest <= args.longest:
        raise UsageError(f"--shortest must be from 2 to --longest; got {args.shortest} and {args.longest}")
    model = llama(args)
    print(describe(args.device))
    sizes = f"{args.dtype}, D={args.hidden}, {args.layers} layers, V={args.vocabulary}, {args.attention} attention"
    print(f"{sizes}, sequences of {args.shortest} to {args.longest} tokens, half of them scored\n")
    print(f"{line(HEADER)}\n{line(['---'] * len(HEADER))}")
    ratios: dict[int, float] = {}
    wrong = False
    for count in args.pairs:
        lengths = draw(2 * count, args.shortest, args.longest)
        steps = {form: partial(step, model, batch) for form, batch in batches(lengths, args).items()}
        losses = [once() for once in steps.values()]
        bound = 1e-4 if args.dtype == "float32" else 1e-2
        wrong |= any(abs(loss - losses[0]) > bound * abs(losses[0]) for loss in losses)
        times = alternate(steps, args.rounds, args.device, f"{count} pairs")
        speeds = [sum(lengths) / statistics.median(times[form]) for form in FORMS]
        ratios[count] = speeds[1] / speeds[0]
        padding = 1 - sum(lengths) / len(lengths) / max(lengths)
        cells = [count, sum(lengths), f"{padding:.0%}", *(f"{speed:.0f}" for speed in speeds)]
        print(line([*map(str, cells), *(f"{speed / speeds[0]:.2f}" for speed in speeds[1:])]), flush=True)
    print(f"\n{crossover(ratios)}")
    return int(wrong)


def crossover(ratios: dict[int, float]) -> str:
    """Up to how many pairs one row is faster than padding; ``ratios`` of their speeds by the number of pairs."""
    slower = [count for count, ratio in ratios.items() if ratio < 1]
    if not slower:
        return f"One row is faster than padding up to {max(ratios)} pairs, the most that was tried."
    before = [count for count in ratios if count < min(slower)]
    start = f"is faster than padding up to {max(before)} pairs, and" if before else "is"
    return f"One row {start} slower from {min(slower)} pairs on: its attention takes time by the square of its tokens."


def draw(count: int, shortest: int, longest: int) -> list[int]:
    """Lengths of sequences, most of them short; the first is the longest that there may be."""
    parts = torch.rand(count, generator=torch.Generator().manual_seed(0)) ** 3
    return [longest, *(shortest + parts[1:] * (longest - shortest)).round().int().tolist()]


def batches(lengths: list[int], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The same sequences in each form."""
    from fused_pref.models import PackingCollator

    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, args.vocabulary, (length,), generator=generator) for length in lengths]
    labels = [torch.where(torch.arange(len(row)) < len(row) // 2, -100, row) for row in ids]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    padded = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": mask,
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    pairs = len(ids) // 2
    rows = [
        {
            f"{side}_{name}": column[place].tolist()
            for side, place in (("chosen", number), ("rejected", pairs + number))
            for name, column in (("input_ids", ids), ("labels", labels))
        }
        for number in range(pairs)
    ]
    found = {"padded": padded, "one row": PackingCollator()(rows), "rows": PackingCollator(max(lengths))(rows)}
    return {form: {name: _to(value, args.device) for name, value in batch.items()} for form, batch in found.items()}


def step(model: Any, batch: dict[str, Any]) -> float:
    """The loss of a batch, after its backward."""
    import fused_pref as fp
    from fused_pref.models import preference_forward

    model.zero_grad(set_to_none=True)
    loss = preference_forward(model, batch, fp.LinearCPOLoss()).loss
    loss.backward()
    return loss.item()


def llama(args: argparse.Namespace) -> Any:
    """A model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": args.vocabulary,
        "hidden_size": args.hidden,
        "intermediate_size": 4 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": max(1, args.hidden // 64),
        "num_key_value_heads": max(1, args.hidden // 64),
        "max_position_embeddings": args.longest,
        "attn_implementation": args.attention,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).to(args.device, getattr(torch, args.dtype))


def _to(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
