"""The recipes of CONTRIBUTING.md, followed literally in a copy: commands pass, and see the flaw."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = re.findall(
    r"^### (.*?)\n(.*?)(?=^##)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(copy: Path, line: str) -> subprocess.CompletedProcess[str]:
    """A command of the page, in the copy; of its tests the first failure is enough."""
    program, *arguments = shlex.split(line)
    assert program == "python"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    environment["PYTEST_ADDOPTS"] = "-x"
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (copy, copy / "tests", copy / "tests" / "helpers")))
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=500, check=False)


def test_there_are_three() -> None:
    assert [name for name, _ in RECIPES] == ["Add a loss type", "Add an architecture", "Add an epilogue"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), RECIPES, ids=[name for name, _ in RECIPES])
def test_recipe(name: str, text: str, tmp_path: Path) -> None:
    if "kernels" in "".join(blocks(text, "bash")):
        pytest.importorskip("triton")
    copy = tmp_path / "copy"
    for folder in ("fused_pref", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    change, flaw = blocks(text, "diff")
    (commands,) = blocks(text, "bash")

    def apply(patch: str) -> None:
        done = subprocess.run(
            ["git", "apply"], cwd=copy, input=patch, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    apply(change)
    for line in commands.splitlines():
        done = run(copy, line)
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    apply(flaw)
    assert any(run(copy, line).returncode == 1 for line in commands.splitlines())
