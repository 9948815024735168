"""The kernels themselves: memory they touch, rows split over programs, offsets, non-finite entries, large vocabularies.

Parity of every option is in ``test_logits.py`` and ``test_degenerate.py``, which run on the Triton backend too.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import IGNORE, assert_gradient, assert_parity, assert_values, make_batch, reference_logps, run
from probes import Memory, small_blocks, small_reductions, watching

import fused_pref as fp
from fused_pref.ops.triton import dlogits, logprob, sequences
from fused_pref.spec import transform_of

SOFTCAP = transform_of({"softcap": 4.0, "logit_scale": 1.3, "temperature": 0.7})
INF, NAN = torch.inf, torch.nan


@pytest.fixture(autouse=True)
def watch(kernel_device: str, poison: None) -> Iterator[Memory | None]:
    """Interpreted kernels may touch nothing but the tensors of their launch."""
    with watching(kernel_device) as watched:
        yield watched


@pytest.fixture(params=[0, 1, 20], ids=["whole", "few", "many"])
def split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of 16 entries; rows in one program, in a few, or in as many as have two blocks each."""
    small_blocks(monkeypatch, 16, 6 * request.param)
    return request.param


# Memory


@pytest.mark.parametrize(("logits_mean", "inplace"), [("all", False), ("completion", True), (None, False)])
def test_traffic(logits_mean: str | None, inplace: bool, split: int, kernel_device: str, watch: Memory | None) -> None:
    """One read forward, one read and one write backward; unscored rows are read for the mean alone.

    The mean concerns the forward, ``inplace`` the backward.
    """
    if watch is None:
        pytest.skip("memory is watched by the interpreter")
    batch = make_batch(3, 4, 67, device=kernel_device)
    logits, labels, rows, columns = batch.logits, batch.labels, 12, 67
    scored = int((labels[:, 1:] != IGNORE).sum())
    targets = sequences.targets_of(labels, None, IGNORE)
    logp, statistics, *_ = logprob.token_logps_fwd(logits, targets, logits_mean, IGNORE, SOFTCAP)
    # The target's entry is read once more, by itself.
    read = watch.within(logits, watch.read)
    assert len(read) == (rows if logits_mean == "all" else scored) * columns + scored
    assert not len(watch.within(logits, watch.written))
    watch.read.clear()
    out = logits if inplace else torch.empty_like(logits)
    dlogits.token_logps_bwd(out, logits, targets, statistics, logp, IGNORE, SOFTCAP)
    assert len(watch.within(logits, watch.read)) == scored * columns
    written = watch.within(out, watch.written)
    assert len(written) == len(set(written.tolist())) == rows * columns
    assert out.isfinite().all()


def test_memory_watch_notices(kernel_device: str, watch: Memory | None) -> None:
    """A boundary beyond the tokens makes a kernel leave its tensors, and the watch says so."""
    if watch is None:
        pytest.skip("memory is watched by the interpreter")
    ends = torch.tensor([0, 9], device=kernel_device)
    tokens, values = torch.empty(8, device=kernel_device), torch.ones(1, dtype=torch.float64, device=kernel_device)
    with pytest.raises(Exception, match="out of bounds"):
        sequences.expand(tokens, values, None, ends)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "strided", "inplace"),
    [(0, False, False), (1, True, False), (1, False, True), (20, True, True)],
    indirect=["split"],
)
def test_unscored_rows_are_ignored(strided: bool, inplace: bool, split: int, kernel_device: str) -> None:
    """NaN in them shows in the mean over all positions, and nowhere else; their gradient is 0.

    A row is split over programs in the forward alone, and only the backward works in place.
    """
    batch = make_batch(4, 4, 67, device=kernel_device)
    scored = torch.zeros(4, 4, dtype=torch.bool, device=kernel_device)
    scored[:, :-1] = batch.labels[:, 1:] != IGNORE
    assert not scored.all()
    clean, truth = run(fp.cpo_loss, batch.logits, batch.labels, backend="triton", logits_mean="completion")
    batch.logits[~scored] = NAN
    leaf = batch.logits.clone().requires_grad_()
    source = torch.stack((leaf, leaf), 2)[:, :, 0] if strided else leaf + 0
    keywords: dict[str, Any] = {"backend": "triton", "inplace_backward": inplace}
    output = fp.cpo_loss(source, batch.labels, logits_mean="all", **keywords)
    output.loss.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, truth)
    assert not leaf.grad[~scored].any()
    for field in output._fields:
        if field.endswith("_logits_mean"):
            assert getattr(output, field).isnan(), field
        else:
            assert torch.equal(getattr(output, field), getattr(clean, field)), field


AXES = {"sequence": (0, (3, 1, 5)), "position": (1, (1, 3, 5)), "entry": (2, (1, 2, 3))}


@pytest.mark.parametrize("axis", AXES)
def test_offsets_beyond_32_bits(axis: str, kernel_device: str) -> None:
    """The last of three places lies 2³¹ entries from the first, in address space that is otherwise not touched."""
    # Poisoning would write to all of it.
    torch.use_deterministic_algorithms(False)
    dimension, shape = AXES[axis]
    far = 2**30 + 8
    strides = [8 * shape[2], shape[2], 1]
    strides[dimension] = far
    room = torch.empty(2 * far + 64, dtype=torch.bfloat16, device=kernel_device)
    labels_room = torch.empty(2 * far + 64, dtype=torch.int32, device=kernel_device)
    logits = room.as_strided(shape, strides)
    batch = make_batch(*shape, mask="none", dtype=torch.bfloat16, device=kernel_device)
    logits.copy_(batch.logits)
    labels = batch.labels
    if axis != "entry":
        labels = labels_room.as_strided(shape[:2], (far, 1) if axis == "sequence" else (1, far))
        labels.copy_(batch.labels)
    keywords: dict[str, Any] = {"shift": axis == "position", "average": True, "backend": "triton"}
    near, grad = run(fp.sequence_logps, batch.logits, batch.labels, **keywords)
    result = fp.sequence_logps(logits.requires_grad_(), labels, inplace_backward=True, **keywords)
    result.sum().backward()
    assert torch.equal(result, near)
    # The gradient has taken the place of the logits.
    assert torch.equal(logits, grad)


# Rows split over programs


@pytest.mark.parametrize(
    ("packed", "logits_mean"), [(False, "all"), (False, "completion"), (False, None), (True, "completion")], ids=str
)
def test_split_rows(packed: bool, logits_mean: str | None, split: int, kernel_device: str) -> None:
    """Few rows share the processors, in pieces that do not divide the vocabulary evenly."""
    batch = make_batch(2, 4, 139, device=kernel_device, mask="none")
    logits, labels, keywords = batch.logits, batch.labels, {"logits_mean": logits_mean, "backend": "triton"}
    if packed:
        logits, labels, keywords["cu_seqlens"] = batch.packed([4, 3])
    assert_parity("cpo_loss", logits, labels, **keywords, softcap=6.0)


@pytest.mark.slow
def test_target_in_any_split(split: int, kernel_device: str) -> None:
    batch = make_batch(1, 14, 203, device=kernel_device, mask="none")
    batch.labels[0] = torch.arange(0, 203, 15)[:14]
    batch.labels[0, -1] = 202
    assert_parity("token_logps", batch.logits, batch.labels, shift=False, backend="triton")


@pytest.mark.parametrize("scale", [1.0, -1.0], ids=["scale+", "scale-"])
def test_infinite_entries(scale: float, split: int, kernel_device: str) -> None:
    """Whole blocks and splits of probability 0, at the start, in the middle, at the end; in the end all but one."""
    batch = make_batch(1, 6, 203, device=kernel_device, mask="none")
    z, y = batch.logits, batch.labels
    y[0] = torch.tensor([100, 150, 10, 202, 120, 0])
    z[0, 0, :90] = z[0, 1, 60:130] = z[0, 2, 30:] = -scale * INF
    z[0, 3, :202] = z[0, 4, :120] = z[0, 4, 121:] = z[0, 5, 1:] = -scale * INF
    keywords: dict[str, Any] = {"shift": False, "logit_scale": scale, "backend": "triton"}
    result = assert_parity("token_logps", z, y, **keywords)
    assert (result[0, 3:] == 0).all()


def test_row_of_infinities_shows(split: int, kernel_device: str) -> None:
    """As in PyTorch, a row without any probability has no log-prob."""
    batch = make_batch(1, 3, 203, device=kernel_device, mask="none")
    batch.logits[0, 1] = -INF
    logp = fp.token_logps(batch.logits, batch.labels, shift=False, backend="triton")
    assert logp.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("place", [0, 100, 202])
def test_non_finite_entry_in_any_split_shows(place: int, bad: float, split: int, kernel_device: str) -> None:
    batch = make_batch(1, 3, 203, device=kernel_device, mask="none")
    batch.logits[0, 1, place] = bad
    logp = fp.token_logps(batch.logits, batch.labels, shift=False, backend="triton")
    assert logp.isnan().tolist() == [[False, True, False]]


# Reductions in several blocks


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_reductions_in_blocks(packed: bool, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More sequences, and more tokens in each, than a reduction takes at a time."""
    small_reductions(monkeypatch, 4)
    batch = make_batch(10, 7, 5, device=kernel_device)
    lengths = [7, 0, 5, 4, 1, 3, 7, 6, 4, 2]
    logits, labels, keywords = batch.logits, batch.labels, {"backend": "triton"}
    if packed:
        logits, labels, keywords["cu_seqlens"] = batch.packed(lengths)
    ref, desirable = reference_logps(10, kernel_device), torch.arange(10, device=kernel_device) % 3 == 0
    weight = torch.linspace(0.5, 2.0, 10, device=kernel_device)
    for logits_mean in ("all", "completion"):
        assert_parity("cpo_loss", logits, labels, logits_mean=logits_mean, loss_type="simpo", **keywords)
    assert_parity("dpo_loss", logits, labels, ref, loss_type="ipo", **keywords)
    bco: dict[str, Any] = {"sample_weight": weight, "reduction": "class_mean", **keywords}
    assert_parity("bco_loss", logits, labels, desirable, ref, **bco)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_sums_are_in_float64(packed: bool, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """2²⁴ and many ones, which a float32 sum would drop."""
    small_reductions(monkeypatch, 16)
    tokens = torch.ones(2, 100, device=kernel_device)
    tokens[:, 3] = 2**24
    labels = torch.zeros(2, 100, dtype=torch.int64, device=kernel_device)
    ends = torch.tensor([0, 100, 200], device=kernel_device) if packed else None
    values = [tensor.flatten() if packed else tensor for tensor in (-tokens, tokens, labels)]
    sums, counts, totals, positions = sequences.sequence_scores(*values, ends, "all", IGNORE)
    assert totals.tolist() == [2**24 + 99] * 2
    assert torch.equal(sums, -totals)
    assert counts.tolist() == positions.tolist() == [100, 100]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["running_mean", "ema"])
@pytest.mark.parametrize("update", ["forward", "step"])
def test_shift_in_kernel(kind: Any, update: Any, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """State and δ follow the module's own arithmetic: both classes, one alone, evaluation, steps, a bad reward."""
    small_reductions(monkeypatch, 4)
    ours, truth = (fp.RewardShift(kind, decay=0.6, update=update).to(kernel_device) for _ in range(2))
    for call in range(6):
        batch = make_batch(6, 3, 5, device=kernel_device, seed=call)
        desirable = torch.arange(6, device=kernel_device) % 2 == 0
        if call == 1:
            desirable[:] = True
        if call == 3:
            batch.logits[2, 1] = NAN
        for shift in (ours, truth):
            shift.train(call != 2)
        arguments = (batch.labels, desirable, reference_logps(6, kernel_device))
        mine, grad = run(fp.bco_loss, batch.logits, *arguments, delta=ours, backend="triton")
        other, true_grad = run(fp.reference.bco_loss, batch.logits.double(), *arguments, delta=truth)
        for shift in (ours, truth):
            if call % 2:
                shift.step()
        assert_values(mine.delta, other.delta)
        if call == 3:
            assert mine.loss.isnan()
        else:
            assert_values(mine.loss, other.loss)
            assert_gradient(grad, true_grad)
        for name, value in truth.state_dict().items():
            assert_values(ours.state_dict()[name], value, what=name)
        assert torch.equal(ours.count, truth.count)


# Large vocabularies

LARGE: list[tuple[str, int, int, torch.dtype, dict[str, Any]]] = [
    ("cpo_loss", 8, 4099, torch.float32, {}),
    ("cpo_loss", 4, 4099, torch.bfloat16, {"loss_type": "simpo", "logit_scale": -0.7}),
    ("dpo_loss", 8, 32_768, torch.float16, {"loss_type": "ipo"}),
    ("bco_loss", 4, 32_768, torch.float32, {"softcap": 20.0, "delta": 0.3}),
    ("cpo_loss", 2, 128_256, torch.float16, {"logits_mean": "completion"}),
    ("bco_loss", 4, 128_256, torch.bfloat16, {"temperature": 0.6, "logits_mean": None}),
    ("dpo_loss", 2, 128_256, torch.float32, {}),
    ("token_logps", 2, 151_937, torch.float16, {"softcap": 30.0}),
    ("sequence_logps", 4, 151_937, torch.float32, {"average": True}),
    ("cpo_loss", 2, 151_937, torch.bfloat16, {"inplace_backward": True, "alpha": 0.2}),
]


@pytest.mark.parametrize(("name", "rows", "columns", "dtype", "keywords"), LARGE, ids=str)
def test_large(
    name: str, rows: int, columns: int, dtype: torch.dtype, keywords: dict[str, Any], kernel_device: str
) -> None:
    """Two sequences without padding, in the shipped configuration."""
    batch = make_batch(2, rows // 2, columns, dtype=dtype, mask="none", device=kernel_device)
    desirable = torch.tensor([True, False], device=kernel_device)
    ref = reference_logps(2, kernel_device)
    arguments = {"dpo_loss": (ref,), "bco_loss": (desirable, ref)}.get(name, ())
    if keywords.get("inplace_backward"):
        leaf = batch.logits.clone().requires_grad_()
        getattr(fp, name)(leaf + 0, batch.labels, *arguments, backend="triton", **keywords).loss.backward()
        _, plain = run(getattr(fp, name), batch.logits, batch.labels, *arguments, backend="triton", **keywords)
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, plain)
    assert_parity(name, batch.logits, batch.labels, *arguments, shift=False, backend="triton", **keywords)
