"""What the project's files say of each other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("tool", ["ruff", "pyright"])
def test_pre_commit_has_the_versions_of_the_dev_extra(tool: str) -> None:
    pins = re.findall(rf'"{tool}==([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    revisions = re.findall(rf"repo: \S*/{tool}-\S+\n\s+rev: v(\S+)\n", hooks)
    assert len(pins) == 1
    assert revisions == pins
