"""Hashes of losses and gradients of every public function; as a program, those of a fresh process."""

import hashlib
import json
import re
from typing import Any

import torch
from harness import make_batch, make_hidden, reference_logps, run_linear

import fused_pref as fp

# Sequences, positions, features, vocabulary: large enough for threads to share the work, or small for the interpreter.
SIZES = {"torch": (8, 33, 64, 1031), "triton": (2, 4, 8, 40)}
# Bytes beyond the least workspace, in which one logit would be made at a time.
ROOM = {"torch": 2**18, "triton": 2**12}
# Backends and threads; kernels have none where they are interpreted.
RUNS = (("torch", 1), ("torch", 2), ("triton", 1))
FUNCTIONS = ("token_logps", "sequence_logps", "cpo_loss", "dpo_loss", "bco_loss", "kto_loss")


def digests(backend: str) -> dict[str, str]:
    """A hash for each function of logits, of the head, and of the head in little workspace."""
    found = {}
    for name in FUNCTIONS:
        found[name] = digest(*logits_call(name, backend))
        for budget in (None, 1):
            found[f"linear_{name}, {budget}"] = digest(*linear_call(f"linear_{name}", backend, budget))
    return found


def digest(output: Any, gradients: list[Any]) -> str:
    """Of the bits of an output and its gradients."""
    parts = [output] if isinstance(output, torch.Tensor) else [*output]
    state = hashlib.sha256()
    for part in (*parts, *gradients):
        if part is not None:
            state.update(part.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return state.hexdigest()


def arguments(name: str, sequences: int, place: str) -> tuple[torch.Tensor, ...]:
    ref, desirable = reference_logps(sequences, place), torch.arange(sequences, device=place) % 3 == 0
    both = (desirable, ref)
    return {"dpo_loss": (ref,), "bco_loss": both, "kto_loss": both}.get(name.removeprefix("linear_"), ())


def keywords_of(name: str, place: str) -> dict[str, Any]:
    return {"delta": fp.RewardShift().to(place)} if name.endswith("bco_loss") else {}


def place_of(backend: str) -> str:
    """Kernels are compiled where there is a GPU."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def logits_call(name: str, backend: str) -> tuple[Any, list[Any]]:
    sequences, length, _, vocabulary = SIZES[backend]
    place = place_of(backend)
    batch = make_batch(sequences, length, vocabulary, device=place)
    batch.labels[:, 1:3] = 5
    leaf = batch.logits.requires_grad_()
    call, keywords = getattr(fp, name), keywords_of(name, place)
    output = call(leaf, batch.labels, *arguments(name, sequences, place), backend=backend, **keywords)
    (output.sum() if isinstance(output, torch.Tensor) else output.loss).backward()
    return output, [leaf.grad]


def linear_call(name: str, backend: str, budget: int | None) -> tuple[Any, list[Any]]:
    sequences, place = SIZES[backend][0], place_of(backend)
    batch = make_hidden(*SIZES[backend], bias=True, device=place)
    batch.labels[:, 1:3] = 5
    rest = arguments(name, sequences, place)

    def run(memory_budget: int | None) -> tuple[Any, list[Any]]:
        options = {"memory_budget": memory_budget, "backend": backend, **keywords_of(name, place)}
        return run_linear(getattr(fp, name), batch, *rest, **options)

    try:
        return run(budget)
    except ValueError as error:
        return run(int(re.findall(r"at least (\d+) bytes", str(error))[0]) + ROOM[backend])


def everything() -> dict[str, dict[str, str]]:
    """By backend and number of threads."""
    before, found = torch.get_num_threads(), {}
    for backend, threads in RUNS:
        torch.set_num_threads(threads)
        found[f"{backend} {threads}"] = digests(backend)
    torch.set_num_threads(before)
    return found


if __name__ == "__main__":
    print(json.dumps(everything()))
