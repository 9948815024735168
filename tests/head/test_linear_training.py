"""The linear head in training: compilers, autocast, gradient scaling, checkpointing, memory, and peers' accuracy."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import IGNORE, Hidden, assert_gradient, make_hidden, peak_bytes, reference_logps, run_linear
from torch.utils.checkpoint import checkpoint

import fused_pref as fp

REF = reference_logps(4)
DESIRABLE = torch.tensor([True, False, True, False])


def objectives(device: str) -> dict[str, Any]:
    ref, desirable = REF.to(device), DESIRABLE.to(device)
    stepped, moved = fp.RewardShift(update="step").to(device), fp.RewardShift("ema").to(device)
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0], device=device)
    return {
        "cpo": lambda h, w, b, y: fp.linear_cpo_loss(h, w, y, bias=b, softcap=5.0, loss_type="simpo").loss,
        "dpo": lambda h, w, b, y: (
            fp.linear_dpo_loss(h, w, y, ref, bias=b, pair_normalizer=torch.tensor(3.0, device=device)).loss
        ),
        "bco": lambda h, w, b, y: (
            fp.linear_bco_loss(
                h, w, y, desirable, ref, bias=b, delta=stepped, reduction="class_mean", class_normalizer=(3, 4)
            ).loss
        ),
        "bco-batch": lambda h, w, b, y: (
            fp.linear_bco_loss(h, w, y, desirable, ref, bias=b, delta=moved, sample_weight=weights).loss
        ),
        "kto": lambda h, w, b, y: (
            fp.linear_kto_loss(h, w, y, desirable, ref, bias=b, kl=y.sum() / 40.0, desirable_weight=1.3).loss
        ),
        "sequences": lambda h, w, b, y: fp.linear_sequence_logps(h, w, y, bias=b).sum(),
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        *(("cpo", "hwb"), ("dpo", "hwb"), ("bco", "hwb"), ("bco-batch", "hwb"), ("kto", "hwb"), ("sequences", "hwb")),
        *(("cpo", "h"), ("bco-batch", "h"), ("dpo", ""), ("sequences", "")),
    ],
)
def test_fullgraph(name: str, wanted: str, device: str) -> None:
    """A backbone and the loss in one graph, for batches whose number of scored tokens differs."""
    torch._dynamo.reset()
    eager, traced = objectives(device)[name], objectives(device)[name]
    compiled = torch.compile(lambda h, *rest: traced(torch.tanh(h), *rest), fullgraph=True, backend="aot_eager")
    for seed in range(2):
        batch = make_hidden(4, 6, 12, 29, device=device, bias=True, seed=seed, mask=("some", "none")[seed])
        results = []
        for function, inner in ((compiled, None), (eager, torch.tanh)):
            parts = zip("hwb", (batch.hidden, batch.weight, batch.bias), strict=True)
            h, w, b = leaves = [part.clone().requires_grad_(key in wanted) for key, part in parts]
            loss = function(h if inner is None else inner(h), w, b, batch.labels)
            if wanted:
                (loss * 2.5).backward()
            results.append((loss.detach(), [leaf.grad for leaf in leaves]))
        torch.testing.assert_close(results[0][0], results[1][0])
        for mine, other in zip(results[0][1], results[1][1], strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                torch.testing.assert_close(mine, other)


@pytest.mark.filterwarnings("ignore")
def test_fullgraph_packed_with_a_bound(device: str) -> None:
    torch._dynamo.reset()
    packed, ends = make_hidden(4, 6, 12, 29, device=device).packed([4, 0, 6, 2])

    def step(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return fp.linear_cpo_loss(h, w, y, cu_seqlens=ends, max_valid_tokens=11).metrics()["rewards/margins"] + (
            fp.linear_cpo_loss(h, w, y, cu_seqlens=ends, max_valid_tokens=11).loss
        )

    first, second = packed.hidden.clone().requires_grad_(), packed.hidden.clone().requires_grad_()
    w = packed.weight.requires_grad_()
    ours = torch.compile(step, fullgraph=True, backend="aot_eager")(first, w, packed.labels, ends)
    theirs = step(second, w, packed.labels, ends)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(first.grad, second.grad)


@pytest.mark.parametrize("wanted", ["hw", "h"])
@pytest.mark.parametrize("name", ["linear_cpo_loss", "linear_token_logps"])
def test_autocast(name: str, wanted: str, device: str, backend: str) -> None:
    """Products in bfloat16, gradients in the dtypes of the tensors: an fp32 master weight gets an fp32 dW."""
    batch = make_hidden(4, 9, 32, 101, device=device)
    batch.wanted = wanted
    with torch.autocast(device, torch.bfloat16):
        ours, grads = run_linear(getattr(fp, name), batch, backend=backend)
    half = Hidden(batch.hidden.bfloat16(), batch.weight.bfloat16(), None, batch.labels, wanted)
    truth, true_grads = run_linear(getattr(fp, name), half, backend=backend)
    value, expected = (output.loss if hasattr(output, "loss") else output for output in (ours, truth))
    torch.testing.assert_close(value, expected)
    for mine, other in zip(grads, true_grads, strict=True):
        if other is not None:
            assert mine.dtype == torch.float32
            assert_gradient(mine, other.double(), 2**-8)
    mixed = Hidden(batch.hidden.bfloat16(), batch.weight, None, batch.labels, wanted)
    with torch.autocast(device, torch.bfloat16):
        _, (dh, dw, _) = run_linear(getattr(fp, name), mixed, backend=backend)
    assert dh.dtype == torch.bfloat16
    assert dw is None or dw.dtype == torch.float32
    with pytest.raises(TypeError, match=r"weight must be a bfloat16 tensor \(V, D=32\)"):
        getattr(fp, name)(mixed.hidden, mixed.weight, batch.labels)


@pytest.mark.parametrize("name", ["linear_cpo_loss", "linear_token_logps"])
def test_float16_with_a_gradient_scaler(name: str, device: str, backend: str) -> None:
    """Gradients around 1e-9, which float16 would lose, arrive scaled by 2¹⁶ and exact to its rounding."""
    batch = make_hidden(4, 9, 32, 101, device=device, dtype=torch.float16, mask="none")
    factor = 1e-4 * 2.0**16

    def loss(h: torch.Tensor, w: torch.Tensor, function: Any, **keywords: Any) -> torch.Tensor:
        output = function(h, w, batch.labels, **keywords)
        return (output.loss if hasattr(output, "loss") else -output.mean()) * factor

    leaves = [part.detach().requires_grad_() for part in (batch.hidden, batch.weight)]
    grads = torch.autograd.grad(loss(*leaves, getattr(fp, name), backend=backend), leaves)
    wide = [part.detach().double().requires_grad_() for part in (batch.hidden, batch.weight)]
    truth = torch.autograd.grad(loss(*wide, getattr(fp.reference, name)), wide)
    for mine, other in zip(grads, truth, strict=True):
        assert mine.dtype == torch.float16
        assert_gradient(mine, other, 1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    batch = make_hidden(4, 6, 12, 29)
    grads = []
    for wrap in (False, True):
        h, w = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()

        def head(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return fp.linear_cpo_loss(h * 2, w, batch.labels).loss

        loss = checkpoint(head, h, w, use_reentrant=reentrant) if wrap else head(h, w)
        (loss * 1.5).backward()
        grads.append((h.grad, w.grad))
    for mine, other in zip(*grads, strict=True):
        assert torch.equal(mine, other)


def test_checkpointing_with_a_moving_shift() -> None:
    """A recomputation takes the plan of its forward, and does not move δ again."""
    batch = make_hidden(4, 6, 12, 29)
    results = []
    for wrap in (False, True):
        h, w, shift = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_(), fp.RewardShift()

        def head(h: torch.Tensor, w: torch.Tensor, shift: fp.RewardShift = shift) -> torch.Tensor:
            return fp.linear_bco_loss(h, w, batch.labels, DESIRABLE, REF, delta=shift).loss

        (checkpoint(head, h, w, use_reentrant=False) if wrap else head(h, w)).backward()
        results.append((h.grad, w.grad, shift.mean, shift.count))
    assert all(torch.equal(mine, other) for mine, other in zip(*results, strict=True))


def test_the_gradient_is_handed_over_not_copied() -> None:
    """With an upstream gradient of 1 the accumulated dW is the memory that the forward filled."""
    batch = make_hidden(4, 9, 32, 4001)
    h, w = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    loss = fp.linear_cpo_loss(h, w, batch.labels).loss
    assert peak_bytes(loss.backward) < w.numel() * w.element_size() / 4
    assert w.grad is not None


def eager(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """CPO with NLL as TRL writes it, log-softmax in float32."""
    z, targets = (h @ w.t()).float()[:, :-1], y[:, 1:]
    scored = targets != IGNORE
    logp = z.log_softmax(-1).gather(2, targets.masked_fill(~scored, 0)[..., None])[..., 0] * scored
    sums = logp.sum(1)
    pairs = len(sums) // 2
    nll = -logp[:pairs].sum() / scored[:pairs].sum()
    return -F.logsigmoid(0.1 * (sums[:pairs] - sums[pairs:])).mean() + nll


@pytest.mark.slow
@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_as_exact_as_eager(dtype: torch.dtype, peaked: bool) -> None:
    """Over five seeds the median error of loss, dh and dW is at most 1.05 times that of eager with an fp32 softmax."""
    ours, theirs = [], []
    for seed in range(5):
        batch = make_hidden(8, 65, 64, 2003, dtype=dtype, seed=seed)
        if peaked:
            rows = batch.weight.float()[batch.labels[:, 1:].clamp(min=0)]
            aligned = 10 * rows / rows.square().sum(-1, keepdim=True).sqrt()
            batch.hidden[:, :-1] = (0.1 * batch.hidden[:, :-1].float() + aligned).to(dtype)
        wide = [part.double().requires_grad_() for part in (batch.hidden, batch.weight)]
        loss = fp.reference.linear_cpo_loss(*wide, batch.labels).loss
        truth = [loss.detach(), *torch.autograd.grad(loss, wide)]
        for function, errors in ((lambda *a: fp.linear_cpo_loss(*a).loss, ours), (eager, theirs)):
            leaves = [part.detach().requires_grad_() for part in (batch.hidden, batch.weight)]
            loss = function(*leaves, batch.labels)
            found = [loss.detach(), *torch.autograd.grad(loss * 4096 if dtype == torch.float16 else loss, leaves)]
            scale = [1, 4096, 4096] if dtype == torch.float16 else [1, 1, 1]
            pairs = zip(found, truth, scale, strict=True)
            errors.append([((a.double() / s - t).norm() / t.norm()).item() for a, t, s in pairs])
    medians = [torch.tensor(errors).median(0).values for errors in (ours, theirs)]
    assert (medians[0] <= 1.05 * medians[1] + 1e-6).all(), medians


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_a_fraction_of_eager(dtype: torch.dtype) -> None:
    """Gradients included, at most 0.3 of what eager allocates; frozen heads at most 0.1."""
    batch = make_hidden(8, 256, 64, 8192, dtype=dtype, mask="none")
    batch.labels[:, :64] = IGNORE
    h, w = batch.hidden.requires_grad_(), batch.weight.requires_grad_()

    def step(function: Any) -> Any:
        def run() -> None:
            h.grad = w.grad = None
            function(h, w, batch.labels).backward()

        run()
        h.grad = w.grad = None
        return run

    usual = peak_bytes(step(eager))
    ours = peak_bytes(step(lambda *a: fp.linear_cpo_loss(*a, memory_budget=2**25).loss))
    frozen = peak_bytes(step(lambda h, w, y: fp.linear_cpo_loss(h, w.detach(), y, memory_budget=2**24).loss))
    assert ours <= 0.3 * usual
    assert frozen <= 0.1 * usual


HEAD = make_hidden(4, 5, 12, 29, bias=True)
CALL = (HEAD.hidden, HEAD.weight, HEAD.labels)
BAD: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("linear_cpo_loss", (HEAD.hidden[0], *CALL[1:]), {}, ValueError, r"hidden must be \(S, T, D\)"),
    ("linear_cpo_loss", (HEAD.hidden.long(), *CALL[1:]), {}, TypeError, "hidden must be .*got an int64"),
    ("linear_cpo_loss", (HEAD.hidden, HEAD.weight[:, :5], HEAD.labels), {}, ValueError, r"weight .*\(V, D=12\)"),
    ("linear_cpo_loss", (HEAD.hidden, HEAD.weight.t(), HEAD.labels), {}, ValueError, r"weight .*\(V, D=12\)"),
    ("linear_cpo_loss", (HEAD.hidden, HEAD.weight[:0], HEAD.labels), {}, ValueError, "V >= 1"),
    ("linear_cpo_loss", (HEAD.hidden, HEAD.weight.double(), HEAD.labels), {}, TypeError, "weight .*float32.*float64"),
    ("linear_cpo_loss", (HEAD.hidden, HEAD.weight.to_sparse(), HEAD.labels), {}, TypeError, "weight must be dense"),
    ("linear_cpo_loss", (HEAD.hidden, HEAD.weight.to("meta"), HEAD.labels), {}, ValueError, "weight .*holds values"),
    ("linear_cpo_loss", (HEAD.hidden, HEAD.weight.to(torch.int8), HEAD.labels), {}, TypeError, "weight .*int8"),
    ("linear_cpo_loss", (HEAD.hidden, None, HEAD.labels), {}, TypeError, "weight .*None"),
    ("linear_cpo_loss", CALL, {"bias": HEAD.bias[:3]}, ValueError, r"bias .*\(V,\) = \(29,\)"),
    ("linear_cpo_loss", CALL, {"bias": HEAD.bias.double()}, TypeError, "bias .*float64"),
    ("linear_cpo_loss", (*CALL[:2], HEAD.labels[:, 1:]), {}, ValueError, "labels"),
    ("linear_cpo_loss", (*CALL[:2], HEAD.labels.float()), {}, TypeError, "labels"),
    ("linear_cpo_loss", (HEAD.hidden[:3], HEAD.weight, HEAD.labels[:3]), {}, ValueError, "S = 3"),
    ("linear_cpo_loss", CALL, {"memory_budget": 0}, ValueError, "memory_budget must be an integer >= 1"),
    ("linear_cpo_loss", CALL, {"memory_budget": 1.5}, TypeError, "memory_budget must be an integer"),
    ("linear_cpo_loss", CALL, {"memory_budget": 10}, ValueError, r"memory_budget must be at least \d+ bytes .*got 10"),
    ("linear_cpo_loss", CALL, {"max_valid_tokens": -1}, ValueError, "max_valid_tokens must be an integer >= 0"),
    ("linear_cpo_loss", CALL, {"max_valid_tokens": True}, TypeError, "max_valid_tokens"),
    ("linear_cpo_loss", CALL, {"tp_group": object()}, TypeError, "tp_group must be a torch.distributed.ProcessGroup"),
    ("linear_cpo_loss", CALL, {"tp_partial": 1}, TypeError, "tp_partial must be True or False"),
    ("linear_cpo_loss", CALL, {"tp_partial": True}, ValueError, "tp_partial needs tp_group"),
    ("linear_cpo_loss", CALL, {"inplace_backward": True}, TypeError, "inplace_backward"),
    ("linear_cpo_loss", CALL, {"beta": -1.0}, ValueError, "beta"),
    ("linear_cpo_loss", CALL, {"softcap": 0.0}, ValueError, "softcap"),
    ("linear_dpo_loss", (*CALL, REF[:2]), {}, ValueError, "ref_logps"),
    ("linear_bco_loss", (*CALL, DESIRABLE.long(), REF), {}, TypeError, "desirable"),
    ("linear_sequence_logps", CALL, {"average": 1}, TypeError, "average"),
    ("linear_token_logps", CALL, {"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"hidden must be \(N_total, D\)"),
    ("LinearCPOLoss", (), {"beta": 0.0}, ValueError, "beta"),
    ("LinearDPOLoss", (), {"loss_type": "simpo"}, ValueError, "loss_type"),
    ("LinearBCOLoss", (), {"memory_budget": -5}, ValueError, "memory_budget"),
]


@pytest.mark.parametrize(("name", "args", "keywords", "error", "text"), BAD, ids=range(len(BAD)))
def test_bad_input(name: str, args: Any, keywords: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        getattr(fp, name)(*args, **keywords)


def test_sharded_hidden_states_of_a_plain_weight_are_refused() -> None:
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(TypeError, match=r"hidden must be a plain tensor; got a DTensor: call .full_tensor\(\)"):
        fp.linear_cpo_loss(HEAD.hidden.as_subclass(DTensor), HEAD.weight, HEAD.labels)


def test_modules_equal_functions() -> None:
    h, w, y = CALL
    ends = torch.tensor([0, 5, 10, 15, 20], dtype=torch.int32)
    flat = (h.flatten(0, 1), w, y.flatten())
    cpo = fp.LinearCPOLoss(beta=0.3, loss_type="simpo", memory_budget=2**27)
    expected = fp.linear_cpo_loss(
        *flat, beta=0.3, loss_type="simpo", bias=HEAD.bias, cu_seqlens=ends, token_normalizer=9
    )
    assert torch.equal(cpo(*flat, bias=HEAD.bias, cu_seqlens=ends, token_normalizer=9).loss, expected.loss)
    dpo = fp.LinearDPOLoss(label_smoothing=0.1)(h, w, y, REF, pair_normalizer=7)
    assert torch.equal(dpo.loss, fp.linear_dpo_loss(h, w, y, REF, label_smoothing=0.1, pair_normalizer=7).loss)
    weights = torch.rand(4)
    bco = fp.LinearBCOLoss(delta=fp.RewardShift("ema"), reduction="class_mean")
    ours = bco(h, w, y, DESIRABLE, REF, sample_weight=weights, class_normalizer=(2, 3))
    theirs = fp.linear_bco_loss(
        h, w, y, DESIRABLE, REF, delta=fp.RewardShift("ema"), reduction="class_mean", sample_weight=weights,
        class_normalizer=(2, 3),
    )  # fmt: skip
    assert torch.equal(ours.loss, theirs.loss)
    assert bco.delta.count.sum() == 4
