"""Where tests run: ``device`` and ``backend`` fixtures, and poisoned scratch memory.

Without a GPU, Triton's interpreter runs the kernels on CPU tensors; with one, ``-m gpu`` runs them compiled.
"""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """Both backends; what they allocate without initialising is NaN."""
    if request.param == "triton" and device == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled where there is a GPU")
    torch.use_deterministic_algorithms(True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The Triton backend has no float64."""
    kept, dropped = [], []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        impossible = parameters.get("backend") == "triton" and parameters.get("dtype") == torch.float64
        (dropped if impossible else kept).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
