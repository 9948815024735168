"""A training step without padding: the command, its table, and what it says of them."""

import re

import pytest

from benchmarks.__main__ import main
from benchmarks.padding import crossover, draw

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.slow
def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["padding", "--small", "--rounds", "1", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "float32, D=32, 1 layers, V=2000, sdpa attention, sequences of 16 to 128 tokens, half of them scored" in text
    rows = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if re.match(r"\| \d", line)]
    assert [row[0] for row in rows] == ["2", "4"]
    assert all(float(cell) > 0 for row in rows for cell in row[3:])
    assert "One row is " in text


def test_lengths() -> None:
    lengths = draw(32, 16, 128)
    assert max(lengths) == 128
    assert min(lengths) >= 16
    assert 1 - sum(lengths) / 32 / 128 > 0.5


def test_crossover() -> None:
    assert crossover({2: 1.2, 4: 1.1}) == "One row is faster than padding up to 4 pairs, the most that was tried."
    assert "up to 4 pairs, and slower from 8 pairs on" in crossover({2: 1.2, 4: 1.1, 8: 0.9, 16: 0.5})
    assert "One row is slower from 2 pairs on" in crossover({2: 0.9, 4: 0.8})


@pytest.mark.parametrize("options", [["--pairs", "0"], ["--shortest", "200"], ["--rounds", "0"]], ids=str)
def test_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["padding", "--device", "cpu", *options]) == 2
    assert options[0] in capsys.readouterr().err
