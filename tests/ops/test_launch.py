"""Every kernel is launched on the device of its tensors, whichever device is the current one."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from fused_pref.cli import tune
from fused_pref.ops.triton import configs
from fused_pref.ops.triton.launch import cdiv, launch, next_power_of_2, on

PACKAGE = Path(__file__).parents[2] / "fused_pref"
# Compiles kernels, and launches none.
COMPILES = {"cli/kernels/compile.py"}
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


class Driver:
    """A stub of a driver with several devices, of which one is the current."""

    def __init__(self) -> None:
        self.current, self.entered = FIRST, 0
        self.launched: list[tuple[torch.device, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        self.entered += 1
        yield
        self.current = before

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        """A kernel's launcher for this grid."""

        def run(*arguments: Any, **keywords: Any) -> None:
            self.launched.append((self.current, grid, arguments, keywords))

        return run


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    stub = Driver()
    monkeypatch.setattr(torch.cuda, "device", stub.device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: stub.current.index)
    return stub


def test_a_launch_is_on_the_device_of_its_tensors(driver: Driver) -> None:
    launch(driver, (3,), SECOND, 1, BLOCK=2)
    assert driver.launched == [(SECOND, (3,), (1,), {"BLOCK": 2})]
    assert driver.current == FIRST


def test_the_current_device_is_not_entered(driver: Driver) -> None:
    launch(driver, (3,), FIRST)
    assert driver.entered == 0
    with on(SECOND):
        launch(driver, (3,), SECOND)
        launch(driver, (3,), FIRST)
        launch(driver, (3,), torch.device("cuda"))  # whichever that is
    assert driver.entered == 3
    assert [device for device, *_ in driver.launched] == [FIRST, SECOND, FIRST, torch.device("cuda")]


def test_a_cpu_has_no_current_device(driver: Driver) -> None:
    launch(driver, (3,), torch.device("cpu"))
    with on(torch.device("cpu")):
        launch(driver, (3,), torch.device("cpu"))
    assert [device for device, *_ in driver.launched] == [FIRST, FIRST]


def test_a_search_times_the_device_of_the_tensors(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("FUSED_PREF_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "stub")
    timed = []

    def timer(run: Any) -> float:
        timed.append(driver.current)
        return 1.0

    def step() -> None:
        tune.tuned("kernel", SECOND, torch.float32, 8, configs.Config(8, 1), [], lambda config: None)

    tune.search(step, timer=timer)
    assert timed == [SECOND]


@pytest.mark.parametrize("size", [1, 2, 3, 127, 128, 129, 2**31 - 1, 2**31 + 1])
def test_sizes_are_those_of_triton(size: int) -> None:
    assert next_power_of_2(size) == triton.next_power_of_2(size)
    for number in (0, size - 1, size, size + 1, 7 * size):
        assert cdiv(number, size) == triton.cdiv(number, size)


def direct(text: str, *, kernels: bool) -> list[int]:
    """Lines of a module's text that launch a kernel by themselves: ``kernel[grid](...)`` or ``kernel.run(...)``.

    In a module that has kernels, whatever is subscripted and called counts as one.
    """

    def is_launch(called: ast.expr) -> bool:
        if isinstance(called, ast.Subscript):
            return kernels or ast.unparse(called.value).endswith("kernel")
        methods = ("run", "warmup")
        return isinstance(called, ast.Attribute) and called.attr in methods and "kernel" in ast.unparse(called.value)

    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return sorted(call.lineno for call in calls if is_launch(call.func))


def test_no_kernel_is_launched_in_another_way() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name, text = path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")
        lines = direct(text, kernels="@triton.jit" in text)
        if name not in COMPILES | {"ops/triton/launch.py"} and lines:
            found[name] = lines
    assert found == {}


def test_the_lint_sees_direct_launches() -> None:
    text = "_scale_kernel[4,](x)\nrows[1](x)\n_scale_kernel.run(x, grid=(4,))\nplan.run(x)"
    assert direct(text, kernels=False) == [1, 3]
    assert direct(text, kernels=True) == [1, 2, 3]
