"""The search for launch configurations: opt-in, kept on disk, and never trusting what it reads there."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import make_batch, make_hidden, run, run_linear
from head_cases import only
from probes import launches
from triton.errors import TritonError

import fused_pref as fp
from fused_pref.cli import tune
from fused_pref.ops.triton import configs

CPU = torch.device("cpu")
DEFAULT, FAST, SLOW = configs.Config(64, 1), configs.Config(2048, 16), configs.Config(1024, 4)
CANDIDATES = [SLOW, FAST, DEFAULT]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that knows nothing and searches for nothing."""
    monkeypatch.delenv("FUSED_PREF_TUNE", raising=False)
    monkeypatch.setenv("FUSED_PREF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "_known", {})
    return tmp_path / "cache"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configurations in the order they were timed; :data:`FAST` is the fastest."""
    seen: list[Any] = []

    def do_bench(function: Any) -> float:
        function()
        return 1.0 if seen[-1] == FAST else 2.0

    monkeypatch.setattr(tune.triton.testing, "do_bench", do_bench)
    return seen


def tuned(timed: list[Any], kernel: str = "op", size: int = 7, dtype: torch.dtype = torch.float32) -> Any:
    return tune.tuned(kernel, CPU, dtype, size, DEFAULT, CANDIDATES, timed.append)


@pytest.mark.parametrize("setting", [None, "", "0"])
def test_opt_in(setting: str | None, timed: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it nothing is timed, read or written."""
    if setting is not None:
        monkeypatch.setenv("FUSED_PREF_TUNE", setting)
    monkeypatch.setattr(tune, "load", lambda: pytest.fail("the file was read"))
    assert tuned(timed) == DEFAULT
    assert not timed
    assert not folder.exists()


def test_once_per_key_and_then_from_disk(timed: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_PREF_TUNE", "1")
    for _ in range(2):
        assert tuned(timed) == FAST
    assert timed == [DEFAULT, SLOW, FAST]
    for other in ({"kernel": "other"}, {"size": 8}, {"dtype": torch.bfloat16}):
        assert tuned(timed, **other) == FAST
    assert len(timed) == 4 * 3
    assert [path.name for path in folder.iterdir()] == ["tune.json"]
    monkeypatch.setattr(tune, "_known", {})
    assert tuned(timed) == FAST
    assert len(timed) == 4 * 3


def test_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(tune.triton, "__version__", "3.6.0")
    key = tune.key_of("linear_gradient, bias", torch.device("cuda"), torch.bfloat16, 4096)
    assert key == "NVIDIA H200 | triton 3.6.0 | linear_gradient, bias | bfloat16 | 4096"


def test_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tune.cache_path() == tmp_path / "cache" / "tune.json"
    monkeypatch.setenv("FUSED_PREF_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tune.cache_path() == tmp_path / "xdg" / "fused_pref" / "tune.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tune.cache_path() == tmp_path / ".cache" / "fused_pref" / "tune.json"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"version": 1, "entries": {',
        b"\x80\x04K\x01.",
        b"[]",
        b'{"entries": {}}',
        b'{"version": 2, "entries": {}}',
        b'{"version": 1, "entries": []}',
        b"[" * 100_000,
    ],
    ids=range(8),
)
def test_files_that_are_not_ours(
    content: bytes, timed: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ignored with a warning, and left as they are."""
    monkeypatch.setenv("FUSED_PREF_TUNE", "1")
    folder.mkdir()
    (folder / "tune.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"tune\.json is ignored, and not written to until it is removed"):
        assert tuned(timed) == FAST
    assert (folder / "tune.json").read_bytes() == content


@pytest.mark.parametrize(
    "entry", [{"block": 10**9, "num_warps": 8}, {"block": 2048}, "rm -rf", None, {"block": "2048", "num_warps": 16}]
)
def test_entries_that_are_no_candidates(
    entry: Any, timed: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searched for again, and the other entries stay."""
    monkeypatch.setenv("FUSED_PREF_TUNE", "1")
    folder.mkdir()
    key = tune.key_of("op", CPU, torch.float32, 7)
    (folder / "tune.json").write_text(json.dumps({"version": 1, "entries": {key: entry, "other": {"block": 3}}}))
    assert tuned(timed) == FAST
    entries = json.loads((folder / "tune.json").read_text())["entries"]
    assert entries == {key: {"block": 2048, "num_warps": 16}, "other": {"block": 3}}


def test_nowhere_to_write(timed: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_PREF_TUNE", "1")
    folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="tune"):
        assert tuned(timed) == FAST
    assert folder.read_text() == "a file where the folder should be"


def test_nothing_stays_of_a_file_that_cannot_be_written(
    timed: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_PREF_TUNE", "1")

    def replace(source: str, destination: Path) -> None:
        raise PermissionError(f"{destination} may not be replaced")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.warns(UserWarning, match="is not kept: .*tune.json may not be replaced"):
        assert tuned(timed) == FAST
    assert list(folder.iterdir()) == []


def test_candidates_that_cannot_be_launched(timed: list[Any]) -> None:
    """They lose; other errors are not hidden."""

    def launch(config: configs.Config) -> None:
        timed.append(config)
        if config == FAST:
            raise TritonError("out of shared memory")

    def step() -> None:
        assert tune.tuned("op", CPU, torch.float32, 7, DEFAULT, CANDIDATES, launch) == DEFAULT

    assert [timing.milliseconds for timing in tune.search(step)] == [2.0, 2.0, float("inf")]
    with pytest.raises(ZeroDivisionError):
        tune.search(lambda: tune.tuned("op", CPU, torch.float32, 7, DEFAULT, CANDIDATES, lambda config: 1 // 0))
    assert tuned(timed) == DEFAULT


def test_search(timed: list[Any]) -> None:
    """Every key of a step once, known or not, with the timer that is given; afterwards nothing is searched for."""
    order = iter([3.0, 1.0, 2.0, 1.0, 2.0, 3.0])

    def timer(function: Any) -> float:
        function()
        return next(order)

    tune._known[tune.key_of("op", CPU, torch.float32, 7)] = FAST
    found = []

    def step() -> None:
        found.extend([tuned(timed), tuned(timed), tuned(timed, kernel="other")])

    timings = tune.search(step, timer=timer)
    assert found == [SLOW, SLOW, DEFAULT]
    assert [timing.milliseconds for timing in timings] == [3.0, 1.0, 2.0, 1.0, 2.0, 3.0]
    assert [timing.config for timing in timings] == [DEFAULT, SLOW, FAST] * 2
    assert len({timing.key for timing in timings}) == 2
    assert tune.load()[timings[0].key] == {"block": 1024, "num_warps": 4}
    assert tuned(timed) == DEFAULT
    assert len(timed) == 6


def test_not_while_a_graph_is_captured(timed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_PREF_TUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuned(timed) == DEFAULT
    assert not timed


# Kernels


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two candidates for each kernel, of which the last is the fastest."""
    order = iter(range(1000, 0, -1))
    monkeypatch.setattr(tune.triton.testing, "do_bench", lambda function: (function(), next(order))[1])
    monkeypatch.setattr(configs, "CANDIDATES", [configs.Config(32, 1), FAST])
    monkeypatch.setattr(configs, "TILE_CANDIDATES", {4: [(16, 16, 16, 1, 1), (32, 32, 16, 1, 1)]})


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("inplace", [False, True])
def test_logits_step(inplace: bool, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning changes no result, and never runs the gradient over the logits more than once."""
    batch = make_batch(2, 3, 50, device=kernel_device)
    keywords: dict[str, Any] = {"inplace_backward": inplace, "backend": "triton"}

    def step(leaf: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return fp.token_logps(leaf * 2, labels, **keywords)

    plain, grad = run(step, batch.logits, batch.labels)
    monkeypatch.setenv("FUSED_PREF_TUNE", "1")
    with launches() as recorder:
        result, tuned_grad = run(step, batch.logits, batch.labels)
    torch.testing.assert_close(result, plain)
    torch.testing.assert_close(tuned_grad, grad)
    assert recorder.names.count("_token_logps_fwd_kernel") == 4
    assert recorder.names.count("_token_logps_bwd_kernel") == (1 if inplace else 4)


@pytest.mark.slow
@pytest.mark.usefixtures("few", "poison")
@pytest.mark.parametrize(
    ("plan", "kernels"),
    [
        ("grouped", {"linear_exponentials, bias"}),
        ("vocab_major", {"linear_statistics, bias", "linear_gradient, bias"}),
        ("skipping", {"linear_statistics, bias", "linear_gradient, bias, by index"}),
    ],
)
def test_head_step(plan: str, kernels: set[str], kernel_device: str) -> None:
    """A search of a whole step, backward included, whose results are those of the defaults."""
    batch = make_hidden(4, 9, 16, 70, device=kernel_device, bias=True)

    def step() -> list[Any]:
        with only(plan, fused=True):
            output, grads = run_linear(
                fp.linear_cpo_loss, batch, backend="triton", skip_mass=0.0 if plan == "skipping" else None
            )
        return [output.loss.detach(), *grads]

    found: list[Any] = []
    plain = step()
    timings = tune.search(lambda: found.extend(step()))
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)
    assert {timing.key.split(" | ")[2] for timing in timings} == kernels
    forms = {kernel: 2 if kernel.startswith("linear_statistics") else 1 for kernel in kernels}
    assert Counter(timing.key.split(" | ")[2] for timing in timings) == {k: 3 * n for k, n in forms.items()}
    last = 3 * forms[timings[0].key.split(" | ")[2]] - 1
    assert tune._known[timings[0].key] == timings[last].config
    assert timings[last].config.rows == 32


def test_a_cpu_is_not_timed_and_a_user_without_a_home_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FUSED_PREF_TUNE", "1")
    monkeypatch.setenv("FUSED_PREF_CACHE", "~no_such_user/x")
    assert tune.cache_path() == Path("~no_such_user/x/tune.json")
    monkeypatch.chdir(tmp_path)
    logits = torch.randn(2, 4, 33, requires_grad=True)
    fp.cpo_loss(logits, torch.zeros(2, 4, dtype=torch.int64), backend="triton").loss.backward()
    assert logits.grad is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["0", "1"])
def test_launches_ask_where_it_is_set_before_the_import(setting: str, folder: Path) -> None:
    """And importing reads and writes nothing."""
    folder.mkdir()
    (folder / "tune.json").write_text("not ours")
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "import fused_pref, sys; from fused_pref.ops.triton import configs\n"
        "print(configs.chooser is not None, 'fused_pref.cli.tune' in sys.modules)"
    )
    environment = {**os.environ, "FUSED_PREF_TUNE": setting}
    said = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert said.stdout.split() == [str(setting == "1")] * 2
    assert [path.name for path in folder.iterdir()] == ["tune.json"]
