"""Every Python block of the pages under ``docs`` runs, page by page, in order."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from trl_models import llama, pairs, tokenizer, unpaired

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}


def batch(seed: int) -> dict[str, torch.Tensor]:
    input_ids = torch.randint(3, 66, (4, 9), generator=torch.Generator().manual_seed(seed))
    labels = input_ids.clone()
    labels[:, :4] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert blocks
    from transformers import TrainingArguments

    plain = TrainingArguments.__post_init__

    def quiet(self: Any) -> None:
        for name, value in QUIET.items():
            setattr(self, name, value)
        plain(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", quiet)
    torch.manual_seed(0)
    names: dict[str, Any] = {
        "torch": torch,
        "model": llama(),
        "tokenizer": tokenizer(),
        "batches": [batch(seed) for seed in range(2)],
        "pairs": pairs(8),
        "rows": unpaired(8),
        "output_dir": str(tmp_path / "out"),
        "hidden": torch.randn(4, 7, 16, requires_grad=True),
        "weight": torch.randn(33, 16, requires_grad=True),
        "target": torch.randint(0, 33, (4, 7)),
    }
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
