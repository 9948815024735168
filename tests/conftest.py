"""Devices: every test that takes ``device`` also runs with ``-m gpu`` where there is one."""

import pytest
import torch

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])])
def device(request: pytest.FixtureRequest) -> str:
    return request.param
