"""``compare`` computes the same by every implementation, shows what is wrong, and writes what it has."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_pref as fp
from benchmarks.__main__ import main
from benchmarks.compare import run, tables
from benchmarks.compare.plots import draw
from benchmarks.compare.presets import PRESETS
from fused_pref.cli.peers import PEERS, Peer, bare_products, by_position, eager
from fused_pref.testing.problems import BETA, GAMMA, WORKS, Problem, Sizes, error, truth

SIZES = Sizes(4, 6, 8, 33, 0.25)
# Those that compile first are left to the command itself.
HERE = [
    (peer, work)
    for peer in PEERS.values()
    for work in WORKS
    if peer.name not in ("torch.compile", "liger_pairs") and peer.does(work, "cpu") and not peer.obstacle("cpu")
]


def problem(dtype: torch.dtype = torch.float32, **sizes: Any) -> Problem:
    return Problem.make(replace(SIZES, **sizes), dtype, "cpu")


def reference(name: str, p: Problem) -> Tensor:
    r, tensors = fp.reference, (p.hidden, p.weight, p.labels)
    calls: dict[str, Callable[[], Tensor]] = {
        "cpo": lambda: r.linear_cpo_loss(*tensors, shift=False, beta=BETA).loss,
        "simpo": lambda: (
            r.linear_cpo_loss(
                *tensors, shift=False, beta=BETA, loss_type="simpo", simpo_gamma=GAMMA, cpo_alpha=0.0
            ).loss
        ),
        "dpo": lambda: r.linear_dpo_loss(*tensors, p.ref_logps, shift=False, beta=BETA).loss,
        "bco": lambda: (
            r.linear_bco_loss(*tensors, p.desirable, p.ref_logps, shift=False, delta=fp.RewardShift(), beta=BETA).loss
        ),
        "cross_entropy": lambda: -r.linear_token_logps(*tensors, shift=False).sum() / p.sizes.tokens,
        "logps": lambda: r.linear_sequence_logps(*tensors, shift=False),
    }
    return calls[name]()


@pytest.mark.parametrize("logits", ["random", "peaked"])
@pytest.mark.parametrize("name", ["cpo", "simpo", "dpo", "bco", "cross_entropy", "logps"])
def test_truth_is_the_reference_in_float64(name: str, logits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_pref.testing.problems.BLOCK", 4 * 33)
    single = problem(logits=logits)
    double = replace(single, hidden=single.hidden.double(), weight=single.weight.double()).of(WORKS["cpo"].gradients)
    value, true = reference(name, double), truth(name, single)
    torch.testing.assert_close(true["value"], value.detach(), rtol=1e-10, atol=1e-10, check_dtype=False)
    if name != "logps":
        gradients = torch.autograd.grad(value, (double.hidden, double.weight))
        for key, gradient in zip(("hidden", "weight"), gradients, strict=True):
            assert error(true[key], gradient) < 1e-9


@pytest.mark.parametrize(("peer", "work"), HERE, ids=lambda value: getattr(value, "name", value))
def test_implementations_pass_the_gate(peer: Peer, work: str) -> None:
    contenders = run.admitted(WORKS[work], work, problem(), [peer])
    row = contenders[peer.name].row
    assert row["status"] == run.OK, row
    assert {key for key in row if key.endswith("_error")} == {
        f"{key}_error" for key in ("value", *WORKS[work].gradients)
    }


def test_peaked_logits_are_peaked() -> None:
    """Half of the targets have at least 0.98 of the probability."""
    p = Problem.make(Sizes(8, 64, 64, 500, 0.0, "peaked"), torch.float32, "cpu")
    logp = fp.linear_token_logps(p.hidden, p.weight, p.labels, shift=False)
    assert 0.9 < logp.exp().median() < 0.999
    assert logp.min() < -1


def test_masked_positions() -> None:
    p = problem(masked=0.5)
    assert p.sizes.tokens == int(p.scored.sum()) == len(p.rows[0]) == 12
    assert not p.scored[:, :3].any()


@pytest.mark.parametrize(("work", "products"), [("cpo", 3), ("frozen", 2), ("logps", 1)])
def test_floor_is_the_products(work: str, products: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    p = problem().of(WORKS[work].gradients)
    step = bare_products(p)
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == products * 2 * SIZES.tokens * SIZES.features * SIZES.vocabulary
    assert WORKS[work].products == products


def wrong(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return eager(hidden, weight, targets) * 1.1


def raising(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    raise RuntimeError("not today\nnor tomorrow")


@pytest.mark.slow
def test_what_is_wrong_absent_or_raises_is_shown() -> None:
    calls = 0

    def late(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise RuntimeError("out of memory")
        return eager(hidden, weight, targets)

    peers = [
        PEERS["fused_pref"],
        Peer("wrong", by_position(wrong)),
        Peer("raising", by_position(raising)),
        Peer("late", by_position(late)),
        Peer("missing", by_position(eager), package="a_package_that_is_not_there"),
        Peer("newer", by_position(eager), needs="a_function_to_come"),
        Peer("elsewhere", by_position(eager), device="cuda"),
    ]
    measured = run.measure(SIZES, torch.float32, "cpo", peers, device="cpu", rounds=4)
    rows = {row["implementation"]: row for row in measured}
    assert rows[run.FLOOR]["of_floor"] == 1.0
    assert rows["fused_pref"]["status"] == run.OK
    assert rows["wrong"]["status"] == run.FAILS
    assert rows["wrong"]["value_error"] > 0.01
    assert rows["wrong"]["median_ms"] > 0
    assert rows["raising"]["status"] == rows["late"]["status"] == run.RAISED
    assert rows["raising"]["note"] == "RuntimeError: not today"
    assert "median_ms" not in rows["late"]
    assert rows["missing"]["note"] == "a_package_that_is_not_there is not installed"
    assert "has no F.a_function_to_come" in rows["newer"]["note"]
    assert "elsewhere" not in rows
    lines = list(tables.section([{"preset": "own", **row} for row in rows.values()]))
    assert any(line.startswith("| wrong |") and "**fails the gate**" in line for line in lines)
    assert any(line.startswith("| missing |") and "**absent**: a_package" in line for line in lines)


def test_workspace_is_beyond_inputs_and_gradients() -> None:
    """Eager code keeps logits in float32 and their log-softmax, and its backward makes their gradient."""
    p = Problem.make(Sizes(2, 32, 16, 4096), torch.float32, "cpu")
    row = run.admitted(WORKS["cpo"], "cpo", p, [PEERS["eager"]])["eager"].row
    logits = 64 * 4096 * 4
    assert 2 * logits <= row["workspace_bytes"] < 4 * logits


@pytest.mark.slow
def test_command_writes_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "4x6x8x33", "--masked", "0.25", "--works", "cpo", "logps", "--peers", "fused_pref", "eager"]
    assert main(["compare", *options, "cce", "--dtypes", "float32", "--rounds", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "compare.json").read_text())
    assert [(row["work"], row["implementation"], row["status"]) for row in results["rows"]] == [
        (work, name, status)
        for work in ("cpo", "logps")
        for name, status in (("bare products", "ok"), ("fused_pref", "ok"), ("eager", "ok"), ("cce", "absent"))
    ]
    with (tmp_path / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert rows[1]["torch"] == torch.__version__
    assert float(rows[1]["median_ms"]) == results["rows"][1]["median_ms"]
    printed = capsys.readouterr().out
    assert printed.strip().splitlines()[1:] == (tmp_path / "compare.md").read_text().strip().splitlines()[1:]
    assert "N=20 of 4x6, 25% masked, D=8, V=33, random logits" in printed
    assert (tmp_path / "plots" / "error-float32.svg").stat().st_size > 0


def test_time_that_is_over_leaves_tables_out(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "2x6x8x33", "--works", "cpo", "logps", "--peers", "fused_pref", "--dtypes", "float32"]
    assert main(["compare", *options, "--seconds", "1e-9"]) == 0
    assert "2 tables left out: 1e-09 s are over" in capsys.readouterr().out


@pytest.mark.slow
def test_own_failure_is_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "fused_pref", Peer("fused_pref", by_position(wrong), own=True))
    assert main(["compare", "--shape", "2x6x8x33", "--works", "cpo", "--peers", "fused_pref", "--rounds", "1"]) == 1


def test_sweep_is_drawn(tmp_path: Path) -> None:
    row = {"preset": "cpu-n", "work": "cpo", "dtype": "float32", "implementation": "eager", "median_ms": 1.0}
    rows = [row | {"tokens": n, "workspace_bytes": n << 20, "hidden_error": 1e-6} for n in (512, 1024)]
    names = {path.name for path in draw(rows, tmp_path)}
    assert names == {f"{stem}.{kind}" for stem in ("cpu-n-cpo-float32", "error-float32") for kind in ("png", "svg")}
    assert "workspace" in (tmp_path / "cpu-n-cpo-float32.svg").read_text()


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    preset = PRESETS[name]
    assert all(sizes.sequences % 2 == 0 and sizes.tokens > 0 for sizes in preset.sizes)
    assert set(preset.works) <= set(WORKS)
    assert set(preset.peers) <= set(PEERS)
    varying = {
        axis
        for axis, key in (("N", "tokens"), ("V", "vocabulary"), ("D", "features"))
        if len({getattr(sizes, key) for sizes in preset.sizes}) > 1
    }
    assert varying == ({preset.axis} if preset.axis else varying & {"N"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "3x6x8x33"], "--shape must be SxTxDxV with an even S"),
        (["--shape", "4x6x8"], "got '4x6x8'"),
        (["--shape", "4x6x8x-1"], "got '4x6x8x-1'"),
        (["--shape", "4x6x8x33", "--preset", "cpu"], "give one of them"),
        (["--shape", "4x6x8x33", "--masked", "1"], "--masked must be at least 0 and below 1; got 1"),
        (["--masked", "0.5"], "need --shape"),
        (["--preset", "gpu"], "got 'gpu'"),
        (["--preset", "long", "--device", "cpu"], "--preset long is for a GPU, not for --device cpu"),
        (["--rounds", "0"], "--rounds must be at least 1; got 0"),
        (["--works", "orpo"], "invalid choice: 'orpo'"),
        (["--seconds", "soon"], "invalid float value: 'soon'"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("benchmarks: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in (*PRESETS, *WORKS, *PEERS))


def test_absent_peers_have_a_reason() -> None:
    for peer in PEERS.values():
        if peer.gpu:
            assert re.fullmatch(r"it needs a GPU|\w+ is not installed", peer.obstacle("cpu") or "")
    assert PEERS["eager"].obstacle("cpu") is None
