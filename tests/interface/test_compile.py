"""torch.compile(fullgraph=True) over the losses, and what importing costs."""

import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from harness import make_batch, make_hidden, reference_logps

import fused_pref as fp

REF = reference_logps(4)
DESIRABLE = torch.tensor([True, False, True, False])

BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a compiler")),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def losses(shift: fp.RewardShift) -> dict[str, Any]:
    return {
        "cpo": lambda z, y: fp.cpo_loss(z, y, loss_type="simpo", alpha=0.1, softcap=9.0),
        "dpo": lambda z, y: fp.dpo_loss(z, y, REF.to(z.device), label_smoothing=0.1),
        "bco": lambda z, y: fp.bco_loss(z, y, DESIRABLE.to(z.device), REF.to(z.device), delta=shift),
        "kto": lambda z, y: fp.kto_loss(z, y, DESIRABLE.to(z.device), REF.to(z.device), kl=y.sum() / 10.0),
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["cpo", "dpo", "bco", "kto"])
def test_fullgraph(name: str, backend: str, device: str) -> None:
    if backend == "inductor" and name != "bco":
        pytest.skip("one objective through inductor is enough: the token terms are the same opaque ops")
    eager_shift, compiled_shift = fp.RewardShift().to(device), fp.RewardShift().to(device)
    eager = losses(eager_shift)[name]
    function = losses(compiled_shift)[name]
    compiled = torch.compile(lambda z, y: function(z * 2, y), fullgraph=True, backend=backend)
    for seed in range(2):
        batch = make_batch(4, 6, 17, device=device, seed=seed)
        first, second = batch.logits.clone().requires_grad_(), batch.logits.clone().requires_grad_()
        ours, theirs = compiled(first, batch.labels), eager(second * 2, batch.labels)
        assert type(ours) is type(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)
        for key, value in theirs.metrics().items():
            torch.testing.assert_close(ours.metrics()[key], value)
        ours.loss.backward()
        theirs.loss.backward()
        torch.testing.assert_close(first.grad, second.grad)
    torch.testing.assert_close(compiled_shift.mean, eager_shift.mean)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fullgraph_packed_and_inplace(device: str) -> None:
    batch = make_batch(4, 6, 17, device=device)
    logits, labels, ends = batch.packed([4, 0, 6, 2])

    def step(z: torch.Tensor, y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return fp.cpo_loss(z * 1.5, y, cu_seqlens=ends, inplace_backward=True).metrics()["rewards/margins"] + (
            fp.sequence_logps(z * 1.5, y, cu_seqlens=ends, average=True).sum()
        )

    first, second = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours = torch.compile(step, fullgraph=True, backend="aot_eager")(first, labels, ends)
    theirs = step(second, labels, ends)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(first.grad, second.grad)


def test_custom_ops_are_well_formed() -> None:
    from fused_pref.head.autograd import token_logps_fwd
    from fused_pref.opaque import encode
    from fused_pref.ops.interface import Transform
    from fused_pref.spec import Spec

    def check(name: str, changed: tuple[Any, ...], others: tuple[Any, ...]) -> None:
        lists: tuple[list[Any], list[Any]] = ([], [])
        texts = map(encode, (changed, others), lists)
        op, checks = getattr(torch.ops.fused_pref, name), ("test_schema", "test_faketensor")
        torch.library.opcheck(op, (*lists, *texts), test_utils=checks)

    batch = make_batch(2, 3, 7)
    spec = Spec("torch", True, -100, Transform("tanh", 1 / 3, 3.0), "all", token_metrics=True)
    logp, statistics, *_ = token_logps_fwd(batch.logits, batch.labels, spec)
    check("token_logps_fwd", (), (batch.logits, batch.labels, spec))
    arguments = (batch.logits, batch.labels, statistics, logp, spec)
    check("token_logps_bwd", (torch.empty_like(batch.logits),), arguments)


@pytest.mark.slow
def test_import_is_light() -> None:
    """Nothing heavy is imported, and the torch backend works where Triton is absent."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fused_pref as fp\n"
        "heavy = {'sklearn', 'transformers', 'trl', 'matplotlib', 'rich', 'scipy'} & set(sys.modules)\n"
        "loss = fp.cpo_loss(torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))).loss\n"
        "print(sorted(heavy), bool(loss.isfinite()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[]", "True"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dynamic", "linear"), [(None, True), (True, False)])
def test_a_number_that_varies_becomes_a_constant_of_the_graph(dynamic: bool | None, linear: bool) -> None:
    """A hyperparameter that is an argument of what is compiled: a compiler would keep it symbolic, its second value if
    not told, and where it is a constant of the head's operations as where PyTorch's take it.
    """
    batch = make_hidden(4, 6, 16, 50)
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()

    def step(hidden: torch.Tensor, weight: torch.Tensor, beta: float) -> torch.Tensor:
        if linear:
            return fp.linear_cpo_loss(hidden, weight, batch.labels, beta=beta, softcap=20 * beta, backend="torch").loss
        return fp.dpo_loss(hidden @ weight.T, batch.labels, hidden[:, 0, 0], beta=beta, backend="torch").loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for beta in (0.1, 0.2):
        torch.testing.assert_close(compiled(hidden, weight, beta), step(hidden, weight, beta))
