"""Which backend is used, what it says when it cannot be, and how launches are configured."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fused_pref.ops import backend as backends
from fused_pref.ops.devices import GPUS
from fused_pref.ops.triton import configs

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
        ("auto", torch.bfloat16, "xpu", "torch"),
        ("triton", torch.bfloat16, "xpu", "triton"),
        ("auto", torch.float32, "mps", "torch"),
        ("torch", torch.float32, "cuda", "torch"),
        ("triton", torch.float16, "cuda", "triton"),
    ],
)
def test_choice(backend: str, dtype: torch.dtype, device: str, chosen: str) -> None:
    assert backends.resolve(backend, dtype, torch.device(device)) == chosen


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("gfx942:sramecc+:xnack-", "triton"), ("gfx950", "triton"), ("gfx90a", "torch"), ("gfx1100", "torch")],
)
def test_hip_devices_that_nobody_has_looked_at(name: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    assert backends.resolve("auto", torch.float32, torch.device("cuda")) == chosen
    assert backends.resolve("triton", torch.float32, torch.device("cuda")) == "triton"


def test_devices_without_kernels() -> None:
    with pytest.raises(ValueError, match=r"no kernels for mps tensors; or use backend=\"torch\""):
        backends.resolve("triton", torch.float32, torch.device("mps"))


def test_auto_does_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_triton_installed", lambda: False)
    assert backends.resolve("auto", torch.float32, torch.device("cuda")) == "torch"


# Configurations


def test_every_architecture_has_a_configuration() -> None:
    assert list(configs.DEFAULTS) == list(GPUS)
    for table in (table for own in configs.DEFAULTS.values() for table in (own.forward, own.backward)):
        assert set(table) == {2, 4}
        for config in table.values():
            assert config.block & (config.block - 1) == 0
            # No thread is without an entry.
            assert config.block >= 32 * config.num_warps


def test_choose() -> None:
    table = {2: configs.Config(8192, 8), 4: configs.Config(4096, 16)}
    gpu = torch.device("cuda")
    assert configs.choose(table, gpu, torch.bfloat16, 128_256) == configs.Config(8192, 8)
    assert configs.choose(table, gpu, torch.float32, 128_256) == configs.Config(4096, 16)
    assert configs.choose(table, gpu, torch.float16, 4099) == configs.Config(8192, 8)
    assert configs.choose(table, gpu, torch.float16, 4096) == configs.Config(4096, 8)
    assert configs.choose(table, gpu, torch.float32, 17) == configs.Config(1024, 16)
    assert configs.choose(table, CPU, torch.float32, 17) == configs.INTERPRETER


def test_properties_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each device; without a number that is whichever is the current one, which may change."""
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or len(asked))
    first, second, current = torch.device("cuda:90"), torch.device("cuda:91"), torch.device("cuda")
    assert [backends.properties(device) for device in (first, second, first, current, current)] == [1, 2, 1, 3, 4]
    assert asked == [90, 91, current, current]


def test_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(multi_processor_count=132, gpu_subslice_count=56)
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "get_device_properties", lambda device: found)
    devices = ("cuda", "xpu", "cpu")
    assert [configs.processors(torch.device(name)) for name in devices] == [132, 56, configs.INTERPRETER_PROCESSORS]


@pytest.mark.parametrize(
    ("hip", "capability", "expected"),
    [(None, (8, 0), "sm_80"), (None, (8, 9), "sm_80"), (None, (9, 0), "sm_90"), (None, (10, 0), "sm_100"),
     (None, (10, 3), "sm_100"), (None, (12, 0), "sm_80"), ("6.4", (9, 4), "gfx942")],
)  # fmt: skip
def test_architecture(
    hip: str | None, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=capability[0]))
    assert configs.architecture(torch.device("cuda")) == expected
    assert configs.architecture(torch.device("xpu")) == "sm_90"
