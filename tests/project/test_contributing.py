"""The recipes of CONTRIBUTING.md, in a copy of the tree: with the patch the commands pass, with the flaw one fails."""

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


def commands(text: str) -> list[str]:
    (block,) = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return block.splitlines()


def patches(text: str) -> list[Path]:
    """What a recipe changes, and the flaw that its tests see."""
    return [ROOT / link for link in re.findall(r"\]\((tests/project/recipes/[^)]*)\)", text)]


def run(copy: Path, line: str) -> subprocess.CompletedProcess[str]:
    """A command of the page, in the copy; of its tests the first failure is enough."""
    program, *arguments = shlex.split(line)
    assert program == "python"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    environment |= {"PYTEST_ADDOPTS": "-x", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (copy, copy / "tests", copy / "tests" / "helpers")))
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=500, check=False)


def test_there_are_three() -> None:
    assert [name for name, _ in RECIPES] == ["Add a loss type", "Add an architecture", "Add an epilogue"]


def test_every_patch_belongs_to_a_recipe() -> None:
    linked = [path for _, text in RECIPES for path in patches(text)]
    assert sorted(linked) == sorted((ROOT / "tests" / "project" / "recipes").iterdir())


@pytest.mark.parametrize(("name", "text"), RECIPES, ids=[name for name, _ in RECIPES])
def test_the_steps_name_every_file_of_the_patch(name: str, text: str) -> None:
    steps = re.findall(r"^\d\. (.*(?:\n {3}.*)*)", text, re.MULTILINE)
    assert len(steps) == 6
    change, flaw = (path.read_text(encoding="utf-8") for path in patches(text))
    changed = set(re.findall(r"^\+\+\+ b/(\S+)$", change, re.MULTILINE))
    assert changed == set(re.findall(r"`((?:fused_pref|tests)/\S+\.py)`", "\n".join(steps[:5])))
    assert set(re.findall(r"^\+\+\+ b/(\S+)$", flaw, re.MULTILINE)) <= changed


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), RECIPES, ids=[name for name, _ in RECIPES])
def test_recipe(name: str, text: str, tmp_path: Path) -> None:
    if any("kernels" in line for line in commands(text)):
        pytest.importorskip("triton")
    copy = tmp_path / "copy"
    for folder in ("fused_pref", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    change, flaw = patches(text)

    def apply(patch: Path) -> None:
        done = subprocess.run(
            ["git", "apply", str(patch)], cwd=copy, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    apply(change)
    for line in commands(text):
        done = run(copy, line)
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    apply(flaw)
    assert any(run(copy, line).returncode == 1 for line in reversed(commands(text)))
