"""Which backend is used, what it says when it cannot be, and how launches are configured."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from harness import make_batch, run
from probes import launches

import fused_pref as fp
from fused_pref import backend as backends
from fused_pref.kernels import configs

CPU = torch.device("cpu")
CALL = "fp.cpo_loss(torch.randn(2, 3, 5{dtype}), torch.randint(0, 5, (2, 3)), backend='triton')"


def error_of(preamble: str, dtype: str = "") -> str:
    """The last line of what a process says that asks for the Triton backend on the CPU, without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = f"{preamble}\nimport torch, fused_pref as fp\n{CALL.format(dtype=dtype)}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]


def test_cpu_tensors_need_the_interpreter() -> None:
    message = error_of("")
    assert message.startswith('ValueError: backend="triton" is not available: CPU tensors')
    assert "set TRITON_INTERPRET=1 before Triton is imported" in message
    assert 'use backend="torch" or "auto"' in message


def test_triton_missing() -> None:
    message = error_of("import sys; sys.modules['triton'] = None")
    assert message.startswith('ValueError: backend="triton" is not available: Triton is not installed')
    assert "pip install triton" in message
    assert 'use backend="torch" or "auto"' in message


def test_float64_comes_first() -> None:
    """Whatever else is missing, float64 is what a caller must change."""
    message = error_of("import sys; sys.modules['triton'] = None", ", dtype=torch.float64")
    assert message.startswith('TypeError: backend="triton" computes in float32')
    assert 'use backend="torch" or "auto"' in message


@pytest.mark.parametrize(
    ("backend", "dtype", "device", "chosen"),
    [
        ("auto", torch.float32, "cpu", "torch"),
        ("auto", torch.float32, "cuda", "triton"),
        ("auto", torch.float64, "cuda", "torch"),
        ("auto", torch.bfloat16, "xpu", "triton"),
        ("auto", torch.float32, "mps", "torch"),
        ("torch", torch.float32, "cuda", "torch"),
        ("triton", torch.float16, "cuda", "triton"),
    ],
)
def test_choice(backend: str, dtype: torch.dtype, device: str, chosen: str) -> None:
    assert backends.resolve(backend, dtype, torch.device(device)) == chosen


def test_devices_without_kernels() -> None:
    with pytest.raises(ValueError, match=r"no kernels for mps tensors; or use backend=\"torch\""):
        backends.resolve("triton", torch.float32, torch.device("mps"))


def test_auto_does_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_triton_installed", lambda: False)
    assert backends.resolve("auto", torch.float32, torch.device("cuda")) == "torch"


# Configurations


@pytest.mark.parametrize("table", [configs.FORWARD, configs.BACKWARD], ids=["forward", "backward"])
def test_every_architecture_has_a_configuration(table: dict[tuple[str, int], configs.Config]) -> None:
    assert set(table) == {(a, size) for a in ("sm_80", "sm_90", "sm_100", "gfx942") for size in (2, 4)}
    for config in table.values():
        assert config.block & (config.block - 1) == 0
        # No thread is without an entry.
        assert config.block >= 32 * config.num_warps


def test_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {("sm_90", 2): configs.Config(8192, 8), ("sm_90", 4): configs.Config(4096, 16)}
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    gpu = torch.device("cuda")
    assert configs.choose(table, gpu, torch.bfloat16, 128_256) == configs.Config(8192, 8)
    assert configs.choose(table, gpu, torch.float32, 128_256) == configs.Config(4096, 16)
    assert configs.choose(table, gpu, torch.float16, 4099) == configs.Config(8192, 8)
    assert configs.choose(table, gpu, torch.float16, 4096) == configs.Config(4096, 8)
    assert configs.choose(table, gpu, torch.float32, 17) == configs.Config(1024, 16)
    assert configs.choose(table, CPU, torch.float32, 17) == configs.INTERPRETER


@pytest.mark.parametrize(
    ("hip", "capability", "expected"),
    [(None, (8, 0), "sm_80"), (None, (8, 9), "sm_80"), (None, (9, 0), "sm_90"), (None, (10, 0), "sm_100"),
     (None, (10, 3), "sm_100"), (None, (12, 0), "sm_80"), ("6.4", (9, 4), "gfx942")],
)  # fmt: skip
def test_architecture(
    hip: str | None, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert configs.architecture(torch.device("cuda")) == expected
    assert configs.architecture(torch.device("xpu")) == "sm_90"


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[configs.Config]:
    """Configurations in the order they were timed; the one with 2048 entries and 16 warps is the fastest."""
    timed: list[configs.Config] = []
    monkeypatch.setattr(configs, "_tuned", {})

    def do_bench(function: Any) -> float:
        function()
        return 1.0 if timed[-1] == configs.Config(2048, 16) else 2.0

    monkeypatch.setattr(configs.triton.testing, "do_bench", do_bench)
    return timed


@pytest.mark.parametrize("setting", [None, "", "0"])
def test_tuning_is_opt_in(setting: str | None, timings: list[configs.Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSED_PREF_TUNE", raising=False)
    if setting is not None:
        monkeypatch.setenv("FUSED_PREF_TUNE", setting)
    default = configs.Config(64, 1)
    assert configs.tuned(("op",), default, timings.append) == default
    assert not timings


def test_tuning_keeps_the_fastest_per_key(timings: list[configs.Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_PREF_TUNE", "1")
    default = configs.Config(64, 1)
    for _ in range(2):
        assert configs.tuned(("op", 1), default, timings.append) == configs.Config(2048, 16)
    assert timings == [default, *configs.CANDIDATES]
    configs.tuned(("op", 2), default, timings.append)
    assert len(timings) == 2 * (1 + len(configs.CANDIDATES))


@pytest.mark.parametrize("inplace", [False, True])
def test_tuned_step(
    inplace: bool, timings: list[configs.Config], kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuning changes no result, and never runs the gradient over the logits more than once."""
    batch = make_batch(2, 3, 50, device=kernel_device)
    keywords: dict[str, Any] = {"inplace_backward": inplace, "backend": "triton"}

    def step(leaf: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return fp.token_logps(leaf * 2, labels, **keywords)

    plain, grad = run(step, batch.logits, batch.labels)
    monkeypatch.setenv("FUSED_PREF_TUNE", "1")
    monkeypatch.setattr(configs, "CANDIDATES", [configs.Config(32, 1), configs.Config(2048, 16)])
    tuned = configs.tuned

    def recorded(key: Any, default: configs.Config, launch: Any) -> configs.Config:
        return tuned(key, default, lambda config: (timings.append(config), launch(config))[1])

    monkeypatch.setattr(configs, "tuned", recorded)
    with launches() as recorder:
        result, tuned_grad = run(step, batch.logits, batch.labels)
    torch.testing.assert_close(result, plain)
    torch.testing.assert_close(tuned_grad, grad)
    assert {key[0] for key in configs._tuned} == {"token_logps_fwd", *([] if inplace else ["token_logps_bwd"])}
    assert recorder.names.count("_token_logps_fwd_kernel") == 4
    assert recorder.names.count("_token_logps_bwd_kernel") == (1 if inplace else 4)
