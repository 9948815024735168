"""The command line: help, errors, laziness and the doctor."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from pages import ROOT, broken

import fused_pref as fp
from fused_pref import __main__ as command_line
from fused_pref.__main__ import COMMANDS, main
from fused_pref.cli import doctor
from fused_pref.cli.usage import Parser


def python(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == status, done.stderr
    return done


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for name, (_, summary) in COMMANDS.items():
        assert name in captured.err
        assert summary.split()[0] in captured.err


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m fused_pref")
    assert all(name in out for name in (COMMANDS if len(arguments) == 1 else arguments[:1]))


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_has_an_example_and_a_page(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """The example is a command line that is understood; the page is there."""
    with pytest.raises(SystemExit):
        main(["--help"] if command is None else [command, "--help"])
    out = capsys.readouterr().out
    assert all(len(line) <= 110 for line in out.splitlines())
    examples = re.findall(r"^  python -m fused_pref (.*)$", out.partition("example")[2], re.MULTILINE)
    assert examples
    for example in examples:
        name, *options = shlex.split(example.partition(" > ")[0])
        assert command in (None, name)
        parser = Parser()
        importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
        parser.parse_args(options)
    found = re.findall(r"\b(?:docs|benchmarks)/[\w/-]+\.md(?:#[\w-]+)?", out)
    assert found
    assert not [page for page in found if broken(ROOT / "README.md", page)]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"fused_pref {fp.__version__}\n"


def test_help_is_of_the_script_that_was_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fused-pref", "doctor", "--help"])
    with pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    assert out.startswith("usage: fused-pref doctor")
    assert "\n  fused-pref doctor\n" in out


def test_help_of_the_demo_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    out = capsys.readouterr().out
    for option in ("--objective", "--steps", "--seed", "--cap", "--out", "--data"):
        assert option in out


@pytest.mark.parametrize("arguments", [["demonstrate"], ["doctor", "--fast"], ["doctor", "now"], ["--verbose"]])
def test_bad_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fused_pref: ")
    assert arguments[-1] in captured.err
    assert captured.err.count("\n") == 1


def test_interruption_is_not_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "fused_pref: interrupted\n"


def test_errors_of_the_library_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise ValueError("a defect")

    monkeypatch.setattr(doctor, "run", fail)
    with pytest.raises(ValueError, match="a defect"):
        main(["doctor"])


def test_arguments_default_to_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fused_pref", "nonsense"])
    assert command_line.main() == 2


@pytest.mark.slow
def test_module_runs_and_exits_with_the_status() -> None:
    assert "doctor" in python("-m", "fused_pref", "--help").stdout
    assert "Traceback" not in python("-m", "fused_pref", "no", status=2).stderr


@pytest.mark.slow
def test_imports_are_light() -> None:
    """The library needs torch alone, and a command line imports only what its command needs."""
    high_pressure = "{'transformers', 'mistral_common', 'matplotlib', 'rich', 'sklearn', 'trl'}"
    demo = "fused_pref.cli.demo.command"
    code = (
        "import sys; from fused_pref.__main__ import main; main(['doctor', '--nonsense']); "
        f"print({high_pressure} & set(sys.modules), '{demo}' in sys.modules)"
    )
    assert python("-c", code).stdout == "set() False\n"
    code = f"import sys, {demo}; print({high_pressure} & set(sys.modules))"
    assert python("-c", code).stdout == "set()\n"


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With PyTorch's build, which the package's own version may not tell."""
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu999")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"fused_pref {fp.__version__}, Python ")
    assert "  torch 2.99.0+cu999\n" in out
    assert "cpu: backend '" in out
    for objective in ("cpo_loss", "dpo_loss", "bco_loss", "kto_loss"):
        for dtype in ("float32", "bfloat16"):
            assert f"  ok   {objective} {dtype}: value error " in out
            assert f"  ok   linear_{objective} {dtype}: value error " in out
    assert "BAD" not in out
    assert out.endswith("every self-check holds\n")


@pytest.mark.parametrize("bad", [float("nan"), 1.0])
def test_doctor_sees_a_wrong_gradient(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(2, 4, 9), torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    assert max(doctor.errors("cpo_loss", [logits], [labels])) < 1e-6
    right = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda loss, leaves: [g + bad * (g.dtype != torch.float64) for g in right(loss, leaves)]
    )
    value, gradient = doctor.errors("cpo_loss", [logits], [labels])
    assert value < 1e-6
    assert not gradient < 1e-3


@pytest.mark.parametrize("errors", [(1e-3, 0.0), (0.0, 1e-3), (float("nan"), 0.0)])
def test_doctor_reports_what_is_wrong(
    errors: tuple[float, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def checks(device: torch.device) -> Iterator[tuple[str, torch.dtype, float, float]]:
        yield "cpo_loss", torch.float32, *errors
        yield "linear_cpo_loss", torch.float32, *errors
        yield "dpo_loss", torch.float32, 0.0, 0.0

    monkeypatch.setattr(doctor, "self_checks", checks)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "  BAD  cpo_loss float32" in out
    assert "  BAD  linear_cpo_loss float32" in out
    assert "  ok   dpo_loss float32" in out
    assert "a self-check failed" in out
