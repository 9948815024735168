"""What every trainer pays to libraries when it is made or starts, and no test looks at, is left out."""

import functools
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest
from datasets.fingerprint import generate_random_fingerprint


def _fingerprint(*given: Any) -> str:
    return generate_random_fingerprint()


@pytest.fixture(scope="module", autouse=True)
def _cheap_trainers() -> Iterator[None]:
    """No collection of garbage before the first step, no hashes of functions that datasets map, and no metadata of
    packages that are read again; it is as long as a short run takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.utils.memory.clear_device_cache", lambda **options: None)
        for module in ("arrow_dataset", "fingerprint"):
            patch.setattr(f"datasets.{module}.update_fingerprint", _fingerprint)
        patch.setattr("importlib.metadata.metadata", functools.cache(importlib.metadata.metadata))
        yield
