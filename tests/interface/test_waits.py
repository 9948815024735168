"""A step waits for the device where the documentation says so, and nowhere else."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import make_hidden, reference_logps

import fused_pref as fp
from fused_pref.head.vocab_parallel import checksum, integers

PACKAGE = Path(__file__).parents[2] / "fused_pref"
# Make a tensor from values of the host: on a GPU a copy, which waits. A fill (`torch.full`, `new_zeros`) does not.
COPIES = {"tensor", "as_tensor", "asarray", "from_numpy", "new_tensor", "pin_memory", "cuda"}
# Make a tensor on the host where no device is named: to move it is a copy, too.
FILLS = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "zeros"}
# What a step runs: all of a loss, but not its specification and what is done once, before a training.
STEP = ["functional.py", "modules.py", "outputs.py", "layout.py", "spec.py", "ranks.py", "head", "losses", "ops"]
ONCE = {"losses/density_ratio.py"}


def on_the_host(value: ast.expr) -> bool:
    """Whether an expression is a tensor that was just made without a device, or the result of its methods."""
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        if value.func.attr in FILLS and ast.unparse(value.func.value).endswith("torch"):
            return all(keyword.arg != "device" for keyword in value.keywords)
        value = value.func.value
    return False


def is_dtype(value: ast.expr) -> bool:
    name = ast.unparse(value)
    return name.endswith("dtype") or isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)


def waits(call: ast.Call, function: ast.Attribute) -> bool:
    """Whether a call of a method or of a module's function copies from the host, or asks the device for a size."""
    given = {keyword.arg for keyword in call.keywords}
    if function.attr == "to":
        return on_the_host(function.value) and ("device" in given or not all(map(is_dtype, call.args)))
    if function.attr == "repeat_interleave":
        repeats = call.args[ast.unparse(function.value).endswith("torch") :]
        return "output_size" not in given and not (repeats and isinstance(repeats[0], ast.Constant))
    # The validation of an argument that is a tensor has one of these names, too.
    return function.attr in COPIES and ast.unparse(function.value) != "validate"


def copies(text: str) -> list[str]:
    """Calls of a module's text that wait, with their lines."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    functions = [(call, call.func) for call in calls if isinstance(call.func, ast.Attribute)]
    return [f"{call.lineno}: {ast.unparse(function)}" for call, function in functions if waits(call, function)]


def test_no_step_copies_from_the_host() -> None:
    paths = [
        path for part in STEP for path in ([PACKAGE / part] if part.endswith(".py") else (PACKAGE / part).rglob("*.py"))
    ]
    names = {path.relative_to(PACKAGE).as_posix(): path for path in paths}
    assert {name: copies(path.read_text(encoding="utf-8")) for name, path in names.items() if name not in ONCE} == {
        name: [] for name in names if name not in ONCE
    }


def test_the_lint_sees_copies() -> None:
    text = "validate.tensor(x)\ntorch.tensor(3)\nx.new_tensor([1])\nfp.torch.as_tensor(2, device=d)"
    assert copies(text) == ["2: torch.tensor", "3: x.new_tensor", "4: fp.torch.as_tensor"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("torch.arange(3).to(device)", True),
        ("torch.zeros(3).flip(0).to(x.device, torch.int32)", True),
        ("torch.ones(3).to(device=x.device)", True),
        ("torch.ones(3).to(x)", True),
        ("torch.arange(3).to(torch.int32)", False),
        ("torch.zeros(3, device=x.device).to(dtype)", False),
        ("torch.zeros(3).to(x.dtype, copy=True)", False),
        ("torch.where(x, 1.0, -1.0).to(wide)", False),
        ("x.to(device)", False),
        ("x.repeat_interleave(counts)", True),
        ("torch.repeat_interleave(x, counts, 0)", True),
        ("torch.repeat_interleave(x, counts, output_size=n)", False),
        ("x.repeat_interleave(2)", False),
    ],
)
def test_the_lint_sees_what_is_moved_and_repeated(text: str, found: bool) -> None:
    assert bool(copies(text)) == found


@pytest.mark.parametrize("delta", [0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)])
def test_a_number_for_delta_is_added_by_a_launch(delta: Any) -> None:
    """Its value, in float64, wherever it is from."""
    batch = make_hidden(4, 6, 8, 17)
    desirable, ref = torch.tensor([True, False, True, False]), reference_logps(4)
    output = fp.linear_bco_loss(batch.hidden, batch.weight, batch.labels, desirable, ref, delta=delta)
    assert output.delta == 0.25


def test_integers_are_exact() -> None:
    values = (2**63 - 1, -(2**63), 0, -5)
    assert integers(values, None).tolist() == list(values)
    assert checksum(integers(values, None)) == checksum(torch.tensor(values))


@pytest.mark.parametrize("name", ["linear_token_logps_fwd", "linear_token_logps_bwd", "linear_known_gradients"])
def test_ops_that_read_counts_are_no_part_of_a_graph(name: str) -> None:
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.fused_pref, name).default.tags
    assert torch.Tag.cudagraph_unsafe not in torch.ops.fused_pref.token_logps_fwd.default.tags


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("name", ["cpo", "dpo", "bco", "logps"])
def test_a_step_is_captured(name: str) -> None:
    """A whole step in a CUDA graph, replayed on other values."""
    batch = make_hidden(4, 33, 64, 512, device="cuda")
    desirable, ref = torch.tensor([True, False] * 2, device="cuda"), reference_logps(4, "cuda")
    leaves = [batch.hidden.requires_grad_(), batch.weight.requires_grad_()]

    def step() -> torch.Tensor:
        for leaf in leaves:
            leaf.grad = None
        bound: Any = {"max_valid_tokens": batch.labels.numel()}
        if name == "bco":
            loss = fp.linear_bco_loss(*leaves, batch.labels, desirable, ref, delta=0.1, **bound).loss
        elif name == "dpo":
            loss = fp.linear_dpo_loss(*leaves, batch.labels, ref, **bound).loss
        elif name == "cpo":
            loss = fp.linear_cpo_loss(*leaves, batch.labels, **bound).loss
        else:
            loss = fp.linear_token_logps(*leaves, batch.labels, **bound).sum()
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    gradients = [leaf.grad for leaf in leaves]
    with torch.no_grad():
        leaves[0].mul_(0.5)
    graph.replay()
    result = [captured.clone(), *(gradient.clone() for gradient in gradients if gradient is not None)]
    assert len(result) == 3
    expected = [step(), *(leaf.grad for leaf in leaves)]
    for mine, other in zip(result, expected, strict=True):
        torch.testing.assert_close(mine, other)
