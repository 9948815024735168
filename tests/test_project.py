"""What the project's files say of each other."""

import inspect
import re
from pathlib import Path

import pytest
from dev import COMMANDS

import fused_pref
from fused_pref import keywords

ROOT = Path(__file__).parents[1]


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


def test_defaults_stand_in_the_keyword_tables_alone() -> None:
    """Public functions, their references and modules show the defaults of the tables."""
    tables = {
        "token_logps": keywords.LogitsKeywords, "sequence_logps": keywords.SequenceLogitsKeywords,
        "cpo_loss": keywords.CPOLogitsKeywords, "dpo_loss": keywords.DPOLogitsKeywords,
        "bco_loss": keywords.BCOLogitsKeywords, "linear_token_logps": keywords.LinearKeywords,
        "linear_sequence_logps": keywords.SequenceLinearKeywords, "linear_cpo_loss": keywords.CPOLinearKeywords,
        "linear_dpo_loss": keywords.DPOLinearKeywords, "linear_bco_loss": keywords.BCOLinearKeywords,
    }  # fmt: skip
    for name, table in tables.items():
        for place in (fused_pref, fused_pref.reference):
            parameters = inspect.signature(getattr(place, name)).parameters
            shown = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
            assert shown == keywords.defaults(table), name
