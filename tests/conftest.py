"""Where tests run: ``device`` and ``backend`` fixtures, and poisoned scratch memory.

Without a GPU, Triton's interpreter runs the kernels on CPU tensors; with one, ``-m gpu`` runs them compiled.
"""

import gc
import importlib.util
import os
from collections.abc import Iterator

import pytest
import shared
import torch

# Or compiled code runs in an emulator of an MI300X.
EMULATED = os.environ.get("FUSED_PREF_EMULATE") == "gfx942"
if EMULATED:
    os.environ.pop("TRITON_INTERPRET", None)
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Nothing is looked up in a hub, and nothing is drawn on the console.
os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"})

# Workers share the cores: threads of one that wait for those of another would make every small operation slow.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from interpreter import quicken

    quicken()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shared.begin()
    if EMULATED:
        from gfx942 import plugin

        config.pluginmanager.register(plugin)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def poison() -> Iterator[None]:
    """What is allocated without being initialised is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, device: str, poison: None) -> str:
    """Both backends, on poisoned scratch memory."""
    if request.param == "triton":
        request.getfixturevalue("kernel_device")
    return request.param


@pytest.fixture
def kernel_device(device: str) -> str:
    """Where the kernels run: interpreted on the CPU, or compiled where there is a GPU."""
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled where there is a GPU")
    return device


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU is taken to multiply bfloat16, whichever it is: plans are the same everywhere."""
    from fused_pref.ops.torch import matmul

    monkeypatch.setattr(matmul, "multiplies", lambda dtype: dtype == torch.bfloat16)
    matmul.arithmetic.cache_clear()
    yield
    matmul.arithmetic.cache_clear()


# Of a test with more cases than this on a CPU, one in FEW is not slow.
MANY, FEW = 24, 4


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The Triton backend has no float64; most cases of a test with many of them are slow."""
    kept, dropped = [], []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        impossible = parameters.get("backend") == "triton" and parameters.get("dtype") == torch.float64
        (dropped if impossible else kept).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("gpu") is None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for group in cases.values():
        for number, item in enumerate(group):
            if len(group) > MANY and number % FEW:
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What was imported stays until the end, and no garbage collection looks through it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """The interpreter's end may free it."""
    gc.unfreeze()
    if not hasattr(config, "workerinput"):
        shared.end()
