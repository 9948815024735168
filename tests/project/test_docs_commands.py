"""Every command of the manual is run: quick ones here, with the output that is shown; of others the test is named."""

import importlib
import re
import shlex
from pathlib import Path

import pages
import pytest
from pages import MANUAL, ROOT, blocks

from fused_pref.__main__ import COMMANDS, main

# What takes long, by the command and its first word, and the tests that run it; its options are read here.
ELSEWHERE = {
    "fused_pref demo": "test_demo_runs_end_to_end",
    "fused_pref doctor": "test_doctor",
    "fused_pref kernels": "test_every_kernel_is_compiled_for_every_target",
    "fused_pref parity": "test_command",
    "fused_pref ref-logps": "test_log_probs_are_those_of_trl",
    "fused_pref tune": "test_the_command_measures_and_keeps",
}
COMMAND = re.compile(r"^python3? -m (fused_pref .*)$")
SHOWN = [
    (pages.name(page), match[1], block.output)
    for page in MANUAL
    for block in blocks(page)
    if block.language == "bash"
    for line in block.text.splitlines()
    if (match := COMMAND.match(line.partition("  #")[0].strip()))
]


@pytest.mark.parametrize(("page", "command", "output"), SHOWN, ids=[f"{page}: {command}" for page, command, _ in SHOWN])
def test_a_shown_command(
    page: str,
    command: str,
    output: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)[1:]
    if f"fused_pref {arguments[0]}" in ELSEWHERE:
        monkeypatch.setattr(importlib.import_module(COMMANDS[arguments[0]][0]), "run", lambda args: 0)
    assert main(arguments) == 0
    if output is not None:
        assert capsys.readouterr().out == output


@pytest.mark.parametrize("test", ELSEWHERE.values())
def test_the_test_of_a_slow_command_exists(test: str) -> None:
    files = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")]
    assert any(f"\ndef {test}(" in text for text in files)


def test_every_command_is_in_the_manual() -> None:
    assert {command.split()[1] for _, command, _ in SHOWN} == set(COMMANDS)


def test_inline_commands_exist() -> None:
    """What the text names is a command, with options that it has."""
    named = re.compile(r"`(?:[A-Z_]+=\S+ )*python3? -m fused_pref ([^`]+)`")
    for page in MANUAL:
        for command in named.findall(pages.prose(page)):
            assert command.split()[0] in {*COMMANDS, "COMMAND", "…"}, (page, command)


def test_setup_commands_exist() -> None:
    import dev

    for page in MANUAL:
        for command in re.findall(r"python3? dev\.py (\w+)", pages.read(page)):
            assert command in dev.COMMANDS, (page, command)


def test_outputs_are_found() -> None:
    assert {page for page, _, output in SHOWN if output is not None} == {"docs/budget.md"}
