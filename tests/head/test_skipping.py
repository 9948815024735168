"""Certified tile skipping: the error stays under the bound of the certificate, and nothing else changes."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import IGNORE, Hidden, assert_gradient, assert_values, make_hidden, run_linear
from head_cases import arguments, narrowed, parity
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_pref as fp
from fused_pref.head import engine
from fused_pref.head.plans import planner as plan
from fused_pref.head.plans import skipping
from fused_pref.keywords import LinearKeywords, table
from fused_pref.ops.torch.chunk import transform_
from fused_pref.spec import linear_spec
from fused_pref.validate import describe

TRANSFORMS = [{}, {"softcap": 30.0, "logit_scale": -1.3, "temperature": 0.7}]
INF, NAN = torch.inf, torch.nan


@pytest.fixture(autouse=True)
def narrow() -> Iterator[list[plan.Plan]]:
    """Tiles of at most 16 tokens; gives the plans taken."""
    taken: list[plan.Plan] = []

    def choose(problem: plan.Problem) -> plan.Plan:
        taken.append(plan.choose(narrowed(problem)))
        return taken[-1]

    with plan.planning(choose):
        yield taken


def spiky(device: str, *, dtype: torch.dtype = torch.float32, sign: float = 1.0, mask: str = "some") -> Hidden:
    """Half of the tokens have nearly all their probability on the target, the others are spread out."""
    batch = make_hidden(6, 5, 16, 70, device=device, bias=True, mask="none")
    flat = batch.hidden.clone()
    batch.aim(sign * 14.0)
    batch.hidden[:, ::2] = flat[:, ::2]
    batch.hidden, batch.weight = batch.hidden.to(dtype), batch.weight.to(dtype)
    batch.bias = batch.bias.to(dtype)
    batch.labels = make_hidden(6, 5, 16, 70, device=device, mask=mask).labels
    return batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("objective", "keywords"), [("cpo", TRANSFORMS[0]), ("bco-batch", TRANSFORMS[1]), ("sequences", TRANSFORMS[0])]
)
def test_skipping_no_mass_is_exact(
    objective: str, keywords: dict[str, Any], dtype: torch.dtype, device: str, backend: str, narrow: list[plan.Plan]
) -> None:
    batch = spiky(device, dtype=dtype, mask="empty")
    parity(objective, batch, device=device, backend=backend, skip_mass=0.0, **keywords)
    assert narrow[0].name == "skipping"
    assert 8 <= narrow[0].columns <= 16


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["hwb", "hw", "h", "w", "b"])
@pytest.mark.parametrize(("objective", "bound"), [("dpo", None), ("bco-batch", 40)])
def test_wanted_gradients(wanted: str, objective: str, bound: int | None, device: str, backend: str) -> None:
    """With and without padding beyond the valid tokens."""
    batch = spiky(device)
    batch.wanted = wanted
    parity(objective, batch, device=device, backend=backend, skip_mass=0.0, max_valid_tokens=bound)


def exact(batch: Hidden, keywords: dict[str, Any]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(a, softmax, gradients) of CPO in float64: ∂loss/∂logp (S, T), 0 where not scored."""
    wide = Hidden(batch.hidden.double(), batch.weight.double(), batch.bias.double(), batch.labels)
    _, grads = run_linear(fp.reference.linear_cpo_loss, wide, **keywords)
    transform = linear_spec({**DEFAULTS, **keywords}).transform
    z = transform_(wide.hidden @ wide.weight.t() + wide.bias, transform)
    probability = z.softmax(-1)
    logp = z.log_softmax(-1)[:, :-1].gather(2, batch.labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    logp = logp.where(batch.labels[:, 1:] != IGNORE, 0).requires_grad_()
    chosen, rejected = logp.sum(1).chunk(2)
    number = (batch.labels[: len(chosen), 1:] != IGNORE).sum()
    loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean() - chosen.sum() / number
    loss.backward()
    return torch.nn.functional.pad(logp.grad, (0, 1)), probability, grads


DEFAULTS = {name: keyword.default for name, (_, keyword) in table(LinearKeywords).items()}


@pytest.mark.parametrize("keywords", TRANSFORMS, ids=str)
@pytest.mark.parametrize("skip_mass", [2**-12, 2**-9, 2**-4, 0.4])
def test_errors_stay_under_their_bounds(skip_mass: float, keywords: dict[str, Any], device: str, backend: str) -> None:
    """In float64 on the torch backend, so that nothing but the bound is tested; else beyond float32's rounding."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    batch = spiky(device, dtype=dtype, sign=-1.0 if keywords else 1.0)
    a, _, truth = exact(batch, keywords)
    ours, grads = run_linear(fp.linear_cpo_loss, batch, skip_mass=skip_mass, backend=backend, **keywords)
    loss = fp.linear_cpo_loss(batch.hidden, batch.weight, batch.labels, bias=batch.bias, backend=backend, **keywords)
    assert_values(ours.loss, loss.loss.double(), 1e-6)
    mass = ours.dropped_mass.double()
    assert mass.shape == batch.labels.shape
    assert 0 < mass.max() <= skip_mass
    slope = abs(keywords.get("logit_scale", 1.0)) / keywords.get("temperature", 1.0)
    lost = slope * a.abs() * mass
    slack = 1e-12 if dtype == torch.float64 else 1e-5
    dh, dw, db = (mine.double() - other for mine, other in zip(grads, truth, strict=True))
    longest = batch.weight.double().norm(dim=1).max()
    assert (dh.norm(dim=-1) <= lost * longest + slack).all()
    assert dw.norm(dim=1).sum() <= (lost * batch.hidden.double().norm(dim=-1)).sum() + slack * len(dw)
    assert db.abs().sum() <= lost.sum() + slack * len(db)
    # The bounds are not idle: what is lost in the bias is what the certificate says, but for cancellation and softcap.
    if skip_mass == 0.4 and not keywords:
        assert db.abs().sum() >= 0.2 * lost.sum()


def test_certificate_is_the_missing_probability(device: str, backend: str) -> None:
    """With one scored token the bias's gradient is 0 exactly where a tile was left out."""
    for position in range(3):
        batch = spiky(device, mask="none")
        batch.labels[:, :] = IGNORE
        batch.labels[0, position + 1] = 66
        _, probability, _ = exact(batch, {})
        ours, (_, _, db) = run_linear(
            fp.linear_bco_loss, batch, *arguments("linear_bco_loss", device), skip_mass=0.3, backend=backend
        )
        missing = probability[0, position][db == 0].sum()
        assert_values(ours.dropped_mass[0, position], missing, 1e-5)
        assert (ours.dropped_mass != 0).sum() == 1
        assert db[66] != 0


def test_most_tiles_of_a_token_are_left_out() -> None:
    """The lightest first, as many as fit; never the target's, nor any of a row with a NaN."""
    mass = torch.tensor([[0.1, 0.25, NAN], [0.3, 0.25, 0.0], [0.4, 0.25, 0.0], [0.15, 0.2, 0.0]])
    live, lost = skipping.dropped(mass, torch.tensor([3, 31, -100]), 10, 0.46)
    assert live.tolist() == [[True, False, True], [False, True, False], [True, True, False], [False, True, False]]
    assert lost.tolist() == pytest.approx([0.45, 0.25, 0.0])
    live, lost = skipping.dropped(torch.zeros(2, 0), torch.zeros(0, dtype=torch.int64), 5, 0.5)
    assert live.shape == (2, 0)
    assert lost.shape == (0,)


def test_rows_with_nan_need_every_tile() -> None:
    mass = torch.tensor([[0.0, NAN], [0.0, NAN], [1.0, NAN]])
    assert skipping.dropped(mass, torch.tensor([25, 25]), 10, 0.5)[0].tolist() == [[False, True]] * 2 + [[True, True]]


@pytest.mark.slow
def test_words_of_no_probability_are_left_out_at_no_cost(device: str, backend: str) -> None:
    """Masked tokens at skip_mass = 0, and a target that takes all: exact all the same."""
    batch = spiky(device, mask="none")
    batch.bias[32:] = -INF
    batch.labels.clamp_(max=31)
    ours = parity("cpo", batch, device=device, backend=backend, skip_mass=0.0, logits_mean=None)
    assert not ours.dropped_mass.any()
    batch.hidden *= 100
    parity("cpo", batch, device=device, backend=backend, skip_mass=0.0, logits_mean=None)


@pytest.mark.parametrize(
    "shape", [(2, 1, 5, 7), (2, 2, 1, 1), (2, 3, 31, 2), (0, 4, 5, 7), (2, 0, 5, 7), (2, 2, 24, 33)], ids=str
)
@pytest.mark.parametrize("mask", ["none", "one", "all"])
def test_awkward_shapes(shape: tuple[int, ...], mask: str, device: str, backend: str) -> None:
    batch = make_hidden(*shape, mask=mask, device=device, bias=True)
    for bound in (None, 7):
        parity("cpo", batch, device=device, backend=backend, skip_mass=0.0, max_valid_tokens=bound)
    parity("tokens", batch, device=device, backend=backend, skip_mass=0.0, shift=False)


@pytest.mark.parametrize("bound", [None, 30])
def test_packed(bound: int | None, device: str, backend: str) -> None:
    batch = spiky(device)
    packed, ends = batch.packed([4, 0, 5, 1, 3, 2])
    keywords = {"backend": backend, "max_valid_tokens": bound, "cu_seqlens": ends}
    parity("cpo", packed, device=device, skip_mass=0.0, **keywords)
    ours = fp.linear_cpo_loss(packed.hidden.requires_grad_(), packed.weight, packed.labels, skip_mass=0.3, **keywords)
    assert ours.dropped_mass.shape == packed.labels.shape
    assert ours.dropped_mass.any()


@pytest.mark.slow
@pytest.mark.parametrize("bound", [None, 40])
def test_unscored_positions_may_hold_anything(bound: int | None, device: str, backend: str) -> None:
    batch = spiky(device)
    keywords = {"backend": backend, "skip_mass": 0.3, "logits_mean": None, "max_valid_tokens": bound}
    clean = run_linear(fp.linear_cpo_loss, batch, **keywords)[1]
    unscored = torch.ones_like(batch.labels, dtype=torch.bool)
    unscored[:, :-1] = batch.labels[:, 1:] == IGNORE
    batch.hidden[unscored] = NAN
    dirty = run_linear(fp.linear_cpo_loss, batch, **keywords)[1]
    assert all(torch.equal(one, other) for one, other in zip(clean, dirty, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("part", ["hidden", "weight", "bias"])
def test_non_finite_inputs_are_not_skipped(part: str, bad: float, device: str, backend: str) -> None:
    """The loss is NaN, and the gradients are wherever those of other plans are."""
    batch = spiky(device, mask="none")
    getattr(batch, part)[(3,) * getattr(batch, part).dim()] = bad
    ours, grads = run_linear(fp.linear_cpo_loss, batch, skip_mass=0.4, backend=backend)
    _, others = run_linear(fp.linear_token_logps, batch, backend=backend)
    assert ours.loss.isnan()
    for mine, other in zip(grads, others, strict=True):
        assert mine.isnan()[other.isnan()].all()
        assert mine.isnan().any()


@pytest.mark.parametrize("label", [70, -1])
def test_label_outside_the_vocabulary(label: int, device: str, backend: str) -> None:
    batch = spiky(device, mask="none")
    batch.labels[2, 3] = label
    ours, grads = run_linear(fp.linear_cpo_loss, batch, skip_mass=0.4, backend=backend)
    assert ours.loss.isnan()
    assert ours.chosen_logps[:2].isfinite().all()
    assert all(grad.isnan().any() for grad in grads)


@pytest.mark.slow
@pytest.mark.parametrize(("wanted", "dtype"), [("hw", torch.float32), ("hw", torch.bfloat16), ("h", torch.bfloat16)])
def test_repeats_to_the_bit(wanted: str, dtype: torch.dtype, device: str, backend: str) -> None:
    """With the same label many times; again in a second backward, whatever the upstream gradient was before."""
    batch = spiky(device, dtype=dtype, mask="none")
    batch.labels[:, 1:4] = 5
    leaves = [t.requires_grad_(n in wanted) for n, t in (("h", batch.hidden), ("w", batch.weight))]
    taken = [leaf for leaf in leaves if leaf.requires_grad]
    results = []
    for _ in range(2):
        loss = fp.linear_cpo_loss(*leaves, batch.labels, skip_mass=0.2, backend=backend).loss
        results.append(torch.autograd.grad(loss, taken, retain_graph=True))
        scaled = torch.autograd.grad(loss * -4, taken, retain_graph=True)
        results.append(torch.autograd.grad(loss, taken))
    for first, *others, fourfold in zip(*results, scaled, strict=True):
        assert all(torch.equal(first, other) for other in others)
        assert torch.equal(fourfold, first * -4)


@pytest.mark.slow
def test_autocast(device: str, backend: str) -> None:
    batch = spiky(device)
    with torch.autocast(device, torch.bfloat16):
        ours, grads = run_linear(fp.linear_cpo_loss, batch, backend=backend, skip_mass=0.0)
    _, others = run_linear(fp.reference.linear_cpo_loss, spiky(device, dtype=torch.float64))
    assert ours.dropped_mass is not None
    for mine, other in zip(grads, others, strict=True):
        assert mine.dtype == torch.float32
        assert_gradient(mine, other, 3e-2)


@pytest.mark.slow
def test_float16_with_a_gradient_scaler(device: str, backend: str) -> None:
    """Gradients around 1e-9, which float16 would lose."""
    batch, factor = spiky(device, dtype=torch.float16, mask="none"), 1e-4 * 2.0**16
    leaves = [part.requires_grad_() for part in (batch.hidden, batch.weight)]
    loss = fp.linear_cpo_loss(*leaves, batch.labels, backend=backend, skip_mass=0.0).loss * factor
    wide = [part.detach().double().requires_grad_() for part in leaves]
    truth = fp.reference.linear_cpo_loss(*wide, batch.labels).loss * factor
    for mine, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, wide), strict=True):
        assert_gradient(mine, other, 2e-3)


def test_checkpointing_and_a_moving_shift() -> None:
    batch = spiky("cpu")
    results = []
    for wrap in (False, True):
        h, w, shift = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_(), fp.RewardShift()

        def head(h: Tensor, w: Tensor, shift: fp.RewardShift = shift) -> Tensor:
            rest = (batch.labels, *arguments("linear_bco_loss"))
            return fp.linear_bco_loss(h, w, *rest, delta=shift, skip_mass=0.1).loss

        (checkpoint(head, h, w, use_reentrant=False) if wrap else head(h, w)).backward()
        results.append((h.grad, w.grad, shift.mean, shift.count))
    assert all(torch.equal(mine, other) for mine, other in zip(*results, strict=True))


# What users see


@pytest.mark.parametrize("name", ["linear_cpo_loss", "linear_dpo_loss", "linear_bco_loss"])
def test_output(name: str) -> None:
    """Eight items as ever; the certificate beside them, None unless it was asked for and 0 where nothing is skipped."""
    batch = spiky("cpu")
    tensors = (batch.hidden, batch.weight, batch.labels, *arguments(name))
    assert getattr(fp, name)(*tensors).dropped_mass is None
    assert not getattr(fp, name)(*tensors, skip_mass=0.4).dropped_mass.any()
    output = getattr(fp, name)(batch.hidden.requires_grad_(), *tensors[1:], skip_mass=0.4)
    assert len(output) == len(output._fields) == 8
    assert output.dropped_mass.any()
    assert not output.dropped_mass.requires_grad
    assert not output.dropped_mass[:, -1].any()
    assert not output.dropped_mass[:, :-1][batch.labels[:, 1:] == IGNORE].any()
    for mine, other in zip(output, getattr(fp, name)(*tensors), strict=True):
        torch.testing.assert_close(mine, other)


def test_outputs_travel() -> None:
    output = fp.linear_cpo_loss(*(getattr(spiky("cpu"), x) for x in ("hidden", "weight", "labels")), skip_mass=0.1)
    for other in (copy.copy(output), pickle.loads(pickle.dumps(output)), output._replace(loss=1)):
        assert type(other) is fp.PairOutput
        assert torch.equal(other.dropped_mass, output.dropped_mass)
    assert torch.utils._pytree.tree_map(lambda x: x, output).loss is output.loss


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("objective", ["linear_cpo_loss", "linear_bco_loss", "linear_token_logps"])
def test_compiled_graphs_skip_nothing(objective: str) -> None:
    torch._dynamo.reset()
    batch = spiky("cpu")
    rest = (batch.weight, batch.labels, *arguments(objective))

    def step(h: Tensor) -> Any:
        return getattr(fp, objective)(h * 2, *rest, skip_mass=0.4)

    grads = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), lambda h: parity_of(objective, h)):
        h = batch.hidden.clone().requires_grad_()
        output = function(h)
        if objective != "linear_token_logps":
            assert output.dropped_mass is None or not output.dropped_mass.any()
        (output.loss if hasattr(output, "loss") else output.sum()).backward()
        grads.append(h.grad)
    torch.testing.assert_close(*grads)


def parity_of(objective: str, h: Tensor) -> Any:
    batch = spiky("cpu")
    return getattr(fp, objective)(h * 2, batch.weight, batch.labels, *arguments(objective))


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1, ValueError, r"skip_mass must be a number in \[0, 1\); got 1"),
        (-0.1, ValueError, "skip_mass"),
        (NAN, ValueError, "skip_mass"),
        ("2**-9", TypeError, "skip_mass"),
        (True, TypeError, "skip_mass"),
    ],
    ids=describe,
)
def test_bad_thresholds(value: Any, error: type[Exception], text: str) -> None:
    batch = spiky("cpu")
    with pytest.raises(error, match=text):
        fp.linear_cpo_loss(batch.hidden, batch.weight, batch.labels, skip_mass=value)
    with pytest.raises(error, match=text):
        fp.LinearBCOLoss(skip_mass=value)


def test_where_sizes_cannot_be_left_to_the_device_nothing_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = spiky("cpu")
    monkeypatch.setattr(engine, "can_skip", lambda head: False)
    output = fp.linear_cpo_loss(batch.hidden.requires_grad_(), batch.weight, batch.labels, skip_mass=0.4)
    assert not output.dropped_mass.any()


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16])
def test_the_certificate_does_not_depend_on_the_default_dtype(default: torch.dtype) -> None:
    batch = spiky("cpu")
    batch.hidden.requires_grad_()

    def certificate() -> torch.Tensor:
        return fp.linear_cpo_loss(batch.hidden, batch.weight, batch.labels, skip_mass=0.3).dropped_mass

    want = certificate()
    torch.set_default_dtype(default)
    try:
        got = certificate()
    finally:
        torch.set_default_dtype(torch.float32)
    assert want.any()
    assert torch.equal(got, want)
