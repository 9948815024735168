"""``dev.py`` installs when something has changed, and remembers only what was installed to its end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dev


class Machine:
    """An environment whose pip is only recorded; ``broken`` is what pip cannot install."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.version, self.found, self.broken = folder, "3.11.0", {"torch", "fused_pref"}, ""
        self.installed: list[str] = []

    def run(self, command: list[str], **keywords: Any) -> subprocess.CompletedProcess[str]:
        assert keywords["check"]
        if "pip" not in command:
            assert command[1:] == ["-c", dev.PROBE]
            found = [name in self.found for name in ("torch", "fused_pref")]
            return subprocess.CompletedProcess(command, 0, json.dumps([str(self.folder), self.version, *found]))
        wanted = command[-1].rpartition("/")[2]
        if self.broken and self.broken in wanted:
            raise subprocess.CalledProcessError(1, command)
        self.installed.append(wanted)
        return subprocess.CompletedProcess(command, 0)

    def install(self, extra: str) -> list[str]:
        """What an installation installs."""
        self.installed = []
        dev.install(Path(sys.executable), extra)
        return self.installed


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """With a project in ``tmp_path / "project"``."""
    for name in ("environment", "project"):
        (tmp_path / name).mkdir()
    (tmp_path / "project" / "pyproject.toml").write_text("first")
    machine = Machine(tmp_path / "environment")
    monkeypatch.setattr(dev, "ROOT", tmp_path / "project")
    monkeypatch.setattr(dev.subprocess, "run", machine.run)
    return machine


def test_what_is_installed_is_not_installed_again(machine: Machine) -> None:
    assert machine.install("test") == ["project[test]"]
    assert machine.install("test") == []
    assert machine.install("docs") == ["project[docs]"]
    assert machine.install("test") == machine.install("docs") == []
    assert list(dev.ROOT.iterdir()) == [dev.ROOT / "pyproject.toml"]


def test_a_change_installs_again(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for extra in ("test", "docs"):
        machine.install(extra)
    (dev.ROOT / "pyproject.toml").write_text("second")
    assert machine.install("test") == ["project[test]"]
    assert machine.install("docs") == ["project[docs]"]
    machine.version = "3.12.0"
    assert machine.install("test") == ["project[test]"]
    monkeypatch.setattr(dev, "TORCH", "torch==99")
    assert machine.install("test") == ["project[test]"]
    # Another clone, which takes the place of this one in the environment.
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "pyproject.toml").write_text("second")
    with monkeypatch.context() as patch:
        patch.setattr(dev, "ROOT", tmp_path / "clone")
        assert machine.install("test") == ["clone[test]"]
    assert machine.install("test") == ["project[test]"]
    assert machine.install("test") == []


def test_what_was_removed_is_installed_again(machine: Machine) -> None:
    machine.install("test")
    machine.found = {"fused_pref"}
    assert machine.install("test") == [dev.TORCH, "project[test]"]
    machine.found = {"torch"}
    assert machine.install("test") == ["project[test]"]


@pytest.mark.parametrize("broken", ["torch", "project"])
def test_a_broken_installation_is_not_remembered(machine: Machine, broken: str) -> None:
    machine.install("test")
    machine.found, machine.broken = set(), broken
    with pytest.raises(subprocess.CalledProcessError):
        machine.install("test")
    machine.found, machine.broken = {"torch", "fused_pref"}, ""
    assert machine.install("test") == ["project[test]"]
    assert machine.install("test") == []


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"extras": ["test"]}'])
def test_a_damaged_stamp_counts_for_nothing(machine: Machine, damage: str) -> None:
    machine.install("test")
    (stamp,) = machine.folder.iterdir()
    stamp.write_text(damage)
    assert machine.install("test") == ["project[test]"]
    assert machine.install("test") == []


def test_the_probe_tells_what_there_is(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", dev.PROBE], cwd=tmp_path, capture_output=True, text=True, check=True)
    prefix, version, torch, _ = json.loads(done.stdout)
    assert (prefix, version, torch) == (sys.prefix, sys.version, True)


def test_a_failed_installation_runs_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    machine.broken = "project"
    monkeypatch.setattr(sys, "argv", ["dev.py", "lint"])
    monkeypatch.setattr(dev, "environment", lambda: Path(sys.executable))
    assert dev.main() == 1
    assert "installation failed" in capsys.readouterr().err
