"""Every Python block of the manual runs, page by page, in order, and prints what the page says that it prints."""

import ast
import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from pages import MANUAL, Block, blocks, broken
from trl_models import llama, pairs, tokenizer, unpaired

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}


def batch(seed: int) -> dict[str, torch.Tensor]:
    input_ids = torch.randint(3, 66, (4, 9), generator=torch.Generator().manual_seed(seed))
    labels = input_ids.clone()
    labels[:, :4] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def supplied(folder: Path) -> dict[str, Any]:
    """What pages may speak of without making it."""
    model, first = llama(), batch(0)
    return {
        "model": model,
        "backbone": model.model,
        "lm_head": model.lm_head,
        "optimizer": torch.optim.SGD(model.parameters(), lr=1e-3),
        "tokenizer": tokenizer(),
        "batch": first,
        "batches": [batch(seed) for seed in range(2)],
        "input_ids": first["input_ids"],
        "labels": first["labels"],
        "desirable": torch.tensor([True, False, True, False]),
        "ref_logps": torch.full((4,), -20.0),
        "pairs": pairs(8),
        "rows": unpaired(8),
        "output_dir": str(folder / "out"),
        "log": lambda metrics: None,
        "logits": torch.randn(4, 9, 66, requires_grad=True),
        "hidden": torch.randn(4, 7, 16, requires_grad=True),
        "weight": torch.randn(33, 16, requires_grad=True),
        "target": torch.randint(0, 33, (4, 7)),
    }


NAMES = set(supplied(Path()))


def python(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def borrowed(page: Path) -> set[str]:
    """Supplied names that a page uses before it makes them."""
    made: set[str] = set()
    found: set[str] = set()
    for block in python(page):
        for statement in ast.parse(block.text).body:
            names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
            stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
            own = {node.arg for node in ast.walk(statement) if isinstance(node, ast.arg)}
            # An assignment makes its names last, anything else (a loop, a function) first.
            own |= set() if isinstance(statement, ast.Assign) else stored
            found |= {node.id for node in names if isinstance(node.ctx, ast.Load)} - made - own
            made |= stored
    return found & NAMES


PYTHON = [page for page in MANUAL if python(page)]


@pytest.mark.parametrize("page", PYTHON, ids=pages.name)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    plain = TrainingArguments.__post_init__

    def quiet(self: Any) -> None:
        for name, value in QUIET.items():
            setattr(self, name, value)
        plain(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", quiet)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = supplied(tmp_path)
    for number, block in enumerate(python(page), 1):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block.text, f"{page.name}, block {number}", "exec"), names)
        if block.output is not None:
            assert out.getvalue() == block.output


@pytest.mark.parametrize("page", [page for page in PYTHON if page.name != "README.md"], ids=pages.name)
def test_a_page_says_what_its_code_takes_for_granted(page: Path) -> None:
    assert not [name for name in sorted(borrowed(page)) if f"`{name}`" not in pages.prose(page)]


def test_messages_are_those_of_the_code() -> None:
    """What stands in the first column of the table of errors, … for what differs."""
    page = pages.prose(pages.ROOT / "docs/faq.md")
    messages = re.findall(r"^\| `(.+?)` \|", page[page.index("\n## Errors") :], re.MULTILINE)
    sources = [ast.parse(file.read_text(encoding="utf-8")) for file in (pages.ROOT / "fused_pref").rglob("*.py")]
    nodes = [node for source in sources for node in ast.walk(source) if isinstance(node, ast.Constant)]
    texts = [node.value for node in nodes if isinstance(node.value, str)]
    assert len(messages) > 4
    for message in messages:
        for part in re.split(r"\(?…\)?", message):
            assert any(part.strip() in text for text in texts), (message, part)


def test_errors_lead_to_pages() -> None:
    """A page that a message names exists, and so does the heading."""
    files = [file.read_text(encoding="utf-8") for file in (pages.ROOT / "fused_pref").rglob("*.py")]
    named = {link for text in files for link in re.findall(r"\bdocs/[\w/-]+\.md(?:#[\w-]+)?", text)}
    assert {"docs/budget.md", "docs/packed.md", "docs/loop.md", "docs/accumulation.md", "docs/faq.md#errors"} <= named
    for link in named:
        assert broken(pages.ROOT / "README.md", link) is None, link


@pytest.mark.parametrize(("page", "words"), [("README.md", 1100), ("CONTRIBUTING.md", 900)])
def test_first_pages_are_short(page: str, words: int) -> None:
    """Counted as ``wc -w`` does, code and tables included."""
    assert len(pages.read(pages.ROOT / page).split()) <= words


def test_the_manual_is_found() -> None:
    assert {"README.md", "docs/index.md", "docs/trl.md", "docs/api/testing.md"} <= {pages.name(page) for page in PYTHON}
