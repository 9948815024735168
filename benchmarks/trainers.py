"""``python -m benchmarks trainers``: a training step of the trainers here against TRL's own with its fused head.

A step is the loss of one batch, references included, and its backward, without the optimiser. Both trainers of a pair
have the same weights, rows and configuration.
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.compare.tables import line
from benchmarks.measure import alternate, check_device, check_rounds, default_device, describe, peak_bytes
from fused_pref.cli.usage import UsageError

KINDS = ("dpo", "kto")
# Words that rows are made of, of a vocabulary that may be any.
WORDS = 1000
SMALL = {"vocabulary": 2000, "hidden": 32, "sequences": 4, "tokens": 16}
HEADER = ("trainer", "TRL, ms", "here, ms", "of TRL's", "TRL, MiB", "here, MiB", "of TRL's", "losses differ by")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--trainers", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    parser.add_argument("--vocabulary", type=int, default=131_072, metavar="V", help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=256, metavar="D", help="of 2 layers; default: %(default)s")
    parser.add_argument("--sequences", type=int, default=8, metavar="S", help="two a pair; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=64, metavar="T", help="half are scored; default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device(), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="small sizes, to see that it runs")


def run(args: argparse.Namespace) -> int:
    """Print a row for each trainer; 1 if the losses differ by more than 1% of TRL's."""
    check_device(args.device)
    check_rounds(args.rounds)
    if args.small:
        vars(args).update(SMALL)
    if args.sequences < 4 or args.sequences % 2:
        raise UsageError(f"--sequences must be even, and at least 4; got {args.sequences}")
    if args.tokens < 8 or args.vocabulary <= WORDS:
        raise UsageError(
            f"--tokens must be at least 8 and --vocabulary above {WORDS}; got {args.tokens} and {args.vocabulary}"
        )
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise UsageError("the trainers need TRL: pip install 'fused-pref[trl]'") from error
    with tempfile.TemporaryDirectory() as folder:
        steps: dict[str, Callable[[], Any]] = {}
        for kind in args.trainers:
            for name, (trainer, batch) in trainers(kind, args, folder).items():
                steps[f"{kind} {name}"] = partial(step, trainer, batch)
        losses = {name: once().item() for name, once in steps.items()}
        peaks = {name: peak_bytes(once, args.device) / 2**20 for name, once in steps.items()}
        times = alternate(steps, args.rounds, args.device, "rounds")
    sizes = f"{args.dtype}, D={args.hidden}, V={args.vocabulary}, {args.sequences} sequences of {args.tokens} tokens"
    medians = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    print(
        "\n".join([describe(args.device), f"{sizes}, half of them scored\n", line(HEADER), line(["---"] * len(HEADER))])
    )
    wrong = False
    for kind in args.trainers:
        names = [f"{kind} {name}" for name in ("stock", "ours")]
        cells = [kind.upper()]
        for found in (medians, peaks):
            stock, ours = (found[name] for name in names)
            cells += [f"{stock:.0f}", f"{ours:.0f}", f"{ours / stock:.2f}"]
        stock, ours = (losses[name] for name in names)
        wrong |= abs(ours - stock) > 1e-2 * abs(stock)
        print(line([*cells, f"{abs(ours - stock):.1e}"]))
    return int(wrong)


def step(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The loss of a batch, after its backward."""
    trainer.model.zero_grad(set_to_none=True)
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, batch)
    trainer.accelerator.backward(loss)
    return loss.detach()


def trainers(kind: str, args: argparse.Namespace, folder: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """TRL's trainer and ours, and the first batch of each."""
    import trl
    from datasets import Dataset, disable_progress_bars

    from fused_pref import trl as ours

    disable_progress_bars()
    name = f"{kind.upper()}Trainer"
    model, words = llama(args), tokenizer()
    rows = Dataset.from_list([row(number, kind, args.tokens) for number in range(_rows(kind, args.sequences))])
    found = {}
    for place, trainer_class in {"stock": getattr(trl, name), "ours": getattr(ours, name)}.items():
        config = getattr(trl, f"{kind.upper()}Config")(
            f"{folder}/{kind}-{place}",
            per_device_train_batch_size=len(rows),
            max_length=args.tokens,
            bf16=args.dtype == "bfloat16",
            gradient_checkpointing=False,
            use_cpu=args.device == "cpu",
            report_to="none",
            disable_tqdm=True,
        )
        reference = copy.deepcopy(model)
        with torch.no_grad():
            reference.lm_head.weight.mul_(1.1)
        trainer = trainer_class(
            copy.deepcopy(model), reference, args=config, train_dataset=rows, processing_class=words
        )
        trainer.model.train()
        trainer.accelerator.prepare_model(trainer.model)
        batch = next(iter(trainer.get_train_dataloader()))
        found[place] = trainer, batch
    return found


def _rows(kind: str, sequences: int) -> int:
    return sequences if kind == "kto" else sequences // 2


def row(number: int, kind: str, tokens: int) -> dict[str, Any]:
    """Half of the tokens are the prompt's; a completion ends with the tokenizer's own."""
    generator = torch.Generator().manual_seed(number)
    words = [f"w{word}" for word in torch.randint(0, WORDS, (2 * tokens,), generator=generator)]
    prompt, good, poor = (" ".join(words[start:stop]) for start, stop in _cuts(tokens))
    if kind == "kto":
        return {"prompt": prompt + " ", "completion": good, "label": number % 2 == 0}
    return {"prompt": prompt + " ", "chosen": good, "rejected": poor}


def _cuts(tokens: int) -> list[tuple[int, int]]:
    half = tokens // 2
    return [(0, half), (half, tokens - 1), (tokens, tokens + half - 1)]


def llama(args: argparse.Namespace) -> Any:
    """A model of 2 layers, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=args.tokens,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def tokenizer() -> Any:
    """Splits at spaces; nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{word}" for word in range(WORDS))]
    core = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), names, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)
