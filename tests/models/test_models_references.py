"""Reference models are attached before accelerate wraps their forward."""

from pathlib import Path
from typing import Any

import pytest
from trl_models import TRAINING, llama, tokenizer, unpaired

from fused_pref.trl import BCOConfig, BCOTrainer

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("given", [False, True])
def test_the_reference_of_a_trainer_in_bfloat16(given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[bool] = []

    class Watched(BCOTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            prepare = self.accelerator.prepare_model

            def watch(model: Any, *args: Any, **kwargs: Any) -> Any:
                prepared.append("_plain_forward" in vars(model))
                return prepare(model, *args, **kwargs)

            monkeypatch.setattr(self.accelerator, "prepare_model", watch)

    options = {**TRAINING, "bf16": True, "max_steps": 1, "precompute_ref_log_probs": False}
    trainer = Watched(
        llama(),
        llama() if given else None,
        BCOConfig(str(tmp_path), **options),
        train_dataset=unpaired(4),
        processing_class=tokenizer(),
    )
    trainer.train()
    assert prepared == [True, True]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=5e-3)
