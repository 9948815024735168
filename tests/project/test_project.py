"""What the project's files say of each other."""

import dataclasses
import importlib.util
import inspect
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from malformed import FUNCTIONS, MODULES

import fused_pref
from dev import COMMANDS
from fused_pref import keywords

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("tool", ["ruff", "pyright"])
def test_pre_commit_has_the_versions_of_the_dev_extra(tool: str) -> None:
    pins = re.findall(rf'"{tool}==([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    revisions = re.findall(rf"repo: \S*/{tool}-\S+\n\s+rev: v(\S+)\n", hooks)
    assert len(pins) == 1
    assert revisions == pins


def test_makefile_has_the_commands_of_dev_and_ci() -> None:
    targets = re.findall(r"^COMMANDS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    ci = re.findall(r"^python3 dev\.py (\w+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(targets) == 1
    assert set(targets[0].split()) == set(COMMANDS)
    assert ci
    assert set(ci) <= set(COMMANDS)


def test_citation_has_the_version() -> None:
    versions = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions == [fused_pref.__version__]


NEWEST = ROOT / ".ci" / "newest.py"


@pytest.mark.parametrize(
    ("torch", "triton", "tests", "status"),
    [
        ("2.9.1+cpu", "3.8.0", 0, 0),
        ("2.10.0+cu130", "3.8.0", 1, 1),
        ("2.9.1", "3.8.0", 5, 1),
        ("2.10.1", "3.8.0", 0, 0),
        ("2.10.1", "3.8.0", 1, 0),
        ("2.10.0", "3.10.0", 1, 0),
    ],
)
def test_only_newer_releases_than_the_recorded_ones_may_fail(
    torch: str, triton: str, tests: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("newest", NEWEST)
    assert spec is not None
    assert spec.loader is not None
    newest: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(newest)
    assert newest.recorded(newest.RECORD.read_text()).keys() == {"torch", "triton"}
    for test in newest.TESTS:
        path, _, function = test.partition("::")
        assert f"def {function}" in (ROOT / path).read_text(encoding="utf-8"), test
    record = tmp_path / "newest.txt"
    record.write_text("torch==2.10.0\ntriton==3.8.0\n")
    monkeypatch.setattr(newest, "RECORD", record)
    monkeypatch.setattr(newest, "version", {"torch": torch, "triton": triton}.get)

    def run(command: list[str], **keywords: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, tests if "pytest" in command else 0)

    monkeypatch.setattr(newest.subprocess, "run", run)
    assert newest.main() == status


def shown(function: Any) -> dict[str, Any]:
    """The defaults of a signature."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def test_defaults_stand_in_the_keyword_tables_alone() -> None:
    """Functions, their references and modules show the defaults of the tables, and no other."""
    for name, table in FUNCTIONS.items():
        assert shown(getattr(fused_pref, name)) == keywords.defaults(table), name
        assert shown(getattr(fused_pref.reference, name)) == keywords.defaults(table), name
    for name, function in MODULES.items():
        own = shown(getattr(fused_pref, name))
        table = keywords.defaults(FUNCTIONS[function])
        assert own == {key: table[key] for key in own}, name
    explained = shown(fused_pref.explain)
    for name in ("memory_budget", "skip_mass"):
        assert explained[name] == keywords.defaults(keywords.LinearKeywords)[name]


@pytest.mark.filterwarnings("default")
def test_trainers_have_the_defaults_of_what_they_configure() -> None:
    """A dataclass must say them again; δ moves with the optimiser's steps there, and the pipeline is no loss."""
    pytest.importorskip("trl")
    from fused_pref import trl

    configured = {
        trl.CPOConfig: keywords.defaults(keywords.CPOLinearKeywords),
        trl.BCOConfig: {
            **keywords.defaults(keywords.BCOLinearKeywords),
            **{f"delta_{name}": value for name, value in shown(fused_pref.RewardShift).items() if name != "update"},
            "min_density_ratio": shown(fused_pref.DensityRatio)["min_ratio"],
            "max_density_ratio": shown(fused_pref.DensityRatio)["max_ratio"],
        },
        # Its δ is TRL's, 0, unless told; its losses are lists, and its f-divergences have an order of TRL's.
        trl.DPOConfig: {
            "memory_budget": keywords.defaults(keywords.DPOLinearKeywords)["memory_budget"],
            "beta": keywords.defaults(keywords.DPOKeywords)["beta"],
            "discopop_tau": keywords.defaults(keywords.DPOKeywords)["discopop_tau"],
            "delta_decay": shown(fused_pref.RewardShift)["decay"],
            "delta_value": keywords.defaults(keywords.DPOKeywords)["delta"],
        },
    }
    for config, defaults in configured.items():
        fields = {field.name: field.default for field in dataclasses.fields(config)}
        for name in defaults.keys() & fields.keys():
            assert fields[name] == defaults[name], (config.__name__, name)
