"""A plugin of pytest under which compiled kernels run on CPU tensors; a test with a finding fails.

``tests/conftest.py`` registers it where ``FUSED_PREF_EMULATE=gfx942`` is set.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from fused_pref.ops import backend
from gfx942 import emulator

TOTAL: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    emulator.library()  # where it cannot be built, one error in place of one for each test
    emulator.install()
    backend.EMULATED = "gfx942"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Run a test, then judge its launches."""
    emulator.LAUNCHES.clear()
    yield
    TOTAL.update(launches=len(emulator.LAUNCHES), instructions=sum(int(x.count.sum()) for x in emulator.LAUNCHES))
    found = [x for x in emulator.LAUNCHES if x.found]
    TOTAL.update(findings=sum(x.found.total() for x in found))
    assert not found, "\n".join(f"{x.kernel} {dict(x.found)}: {x.examples[:2]}" for x in found[:4])


@pytest.fixture
def emulated() -> Iterator[Callable[[], Counter[str]]]:
    """A function that gives what launches so far have found, and forgets them; the order of waves is a test's own."""

    def findings() -> Counter[str]:
        found = sum((x.found for x in emulator.LAUNCHES), Counter())
        emulator.LAUNCHES.clear()
        return found

    yield findings
    emulator.OPTIONS.update(order=0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    line = ", ".join(f"{TOTAL[key]} {key}" for key in ("launches", "instructions", "findings"))
    terminalreporter.write_line(f"emulated: {line}")
