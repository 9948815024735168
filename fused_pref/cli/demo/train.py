"""Training with the trainers of :mod:`fused_pref.trl`, and what watches it."""

import copy
import functools
import math
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from rich.progress import Progress
from torch import Tensor
from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback

import fused_pref as fp
from fused_pref.cli.demo.history import Check, History, Point
from fused_pref.cli.demo.objectives import Objective
from fused_pref.cli.demo.report import check_line, point_line
from fused_pref.cli.demo.texts import Row
from fused_pref.models import preference_forward
from fused_pref.trl.dpo_losses import NamedLoss

BETA, LEARNING_RATE, WARMUP_STEPS = 0.1, 2e-3, 5
EVALUATIONS = 5


def train(model: LlamaForCausalLM, tokenizer: Any, rows: list[Row], seed: int, watcher: "Watcher") -> History:
    """Train with the watcher's objective, for as many steps as it has planned or until it stops the training.

    Args:
        model: changed in place.
        tokenizer: has a pad token.
        rows: to train on.
        seed: of the order.
        watcher: is told of every step.
    """
    objective = watcher.history.objective
    with tempfile.TemporaryDirectory() as folder:
        config = objective.config(
            output_dir=folder,
            beta=BETA,
            max_steps=watcher.history.planned,
            learning_rate=LEARNING_RATE,
            warmup_steps=WARMUP_STEPS,
            adam_beta2=0.98,
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **objective.options,
        )
        config._n_gpu = min(config.n_gpu, 1)  # of several, one: the trainers refuse nn.DataParallel
        trainer = objective.trainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[watcher],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return watcher.history


class Watcher(TrainerCallback):
    """Checks the first step, evaluates at the ends and in between, and stops the training when its time is up.

    Args:
        objective: that is trained.
        steps: at least 1; one is always taken.
        heldout: held-out pairs.
        deadline: of ``time.monotonic()``; no step begins that would probably end, with the last evaluation, later.
        progress: with one task, advanced by each step; its console gets a line for the check and each evaluation.
    """

    def __init__(
        self, objective: Objective, steps: int, heldout: dict[str, Tensor], deadline: float, progress: Progress
    ) -> None:
        self.history = History(objective, steps)
        self.heldout, self.deadline, self.progress = heldout, deadline, progress
        # Log-probs (2, B) from which rewards count.
        self.start: Tensor | float | None = None if objective.relative else 0.0
        self.began = self.evaluation = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Evaluate, and have the first forward after that checked."""
        self.heldout = {name: tensor.to(model.device) for name, tensor in self.heldout.items()}
        self.evaluate(model)
        self.bf16 = args.bf16
        self.hook = model.register_forward_pre_hook(self.check, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        """Follow a step; what is logged at the end has no loss."""
        if "loss" not in logs:
            return
        self.history.losses.append(logs["loss"])
        self.progress.advance(self.progress.task_ids[0])
        now, step, steps = time.monotonic(), state.global_step, state.max_steps
        late = now + (now - self.began) + self.evaluation > self.deadline
        if late or step == steps or step % math.ceil(steps / EVALUATIONS) == 0:
            self.evaluate(model)
        if late:
            control.should_training_stop = True

    def check(self, model: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Check the forward that is about to begin."""
        self.hook.remove()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
            self.history.check = check_step(model, inputs)
        self.progress.console.print(check_line(self.history.check))

    @torch.no_grad()
    def evaluate(self, model: Any) -> None:
        """Measures over all held-out pairs."""
        began = time.monotonic()
        logps = preference_forward(model, self.heldout, fp.linear_sequence_logps).view(2, -1)
        if self.start is None:
            self.start = logps
        lengths = (self.heldout["labels"] != -100).sum(1).view(2, -1)
        chosen, rejected = logps / lengths
        margins = BETA * torch.sub(*(logps - self.start))
        step = len(self.history.losses)
        point = Point(step, _accuracy(chosen - rejected), _accuracy(margins), margins.mean().item())
        self.history.points.append(point)
        self.progress.console.print(point_line(self.history, point))
        self.evaluation = time.monotonic() - began


def check_step(model: LlamaForCausalLM, inputs: dict[str, Any]) -> Check:
    """Loss and gradient of the last hidden states against the specification in float64, on two sequences of a batch.

    Under autocast, as a trainer with mixed precision computes them.

    Args:
        model: about to be called by a trainer.
        inputs: what it will be called with. The float64 logits of all sequences would be the largest tensor of the
            demo, so the first of either half are taken; of a batch of pairs that is a pair.
    """
    preference = inputs["preference"]
    rows = [0, len(inputs["input_ids"]) // 2]
    with torch.no_grad():
        states = model.model(inputs["input_ids"][rows], inputs["attention_mask"][rows]).last_hidden_state
    labels, *others = (tensor[rows] for tensor in preference.tensors)
    scored = (labels != -100).any(0).nonzero()
    span = slice(int(scored[0]) - 1, int(scored[-1]) + 1)  # a state scores the token after it

    def differentiate(loss: Callable[..., Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        hidden = states[:, span].to(dtype).requires_grad_()
        # A copy, because BCO's shift gathers what it sees.
        keywords = copy.deepcopy(preference.keywords)
        value = loss(hidden, model.lm_head.weight.to(dtype), labels[:, span], *others, **keywords).loss
        return value.detach(), torch.autograd.grad(value, hidden)[0]

    device = model.device.type
    value, gradient = differentiate(preference.loss, torch.float32)
    with torch.autocast(device, enabled=False):
        truth, true_gradient = differentiate(reference_of(preference.loss), torch.float64)
    loss_error = (value - truth).abs() / truth.abs().clamp_min(1)
    gradient_error = (gradient - true_gradient).norm() / true_gradient.norm()
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return Check(loss_error.item(), gradient_error.item(), dtype)


def reference_of(loss: Any) -> Callable[..., Any]:
    """The specification of a trainer's loss; that of DPO has its hyperparameters within."""
    if isinstance(loss, NamedLoss):
        return functools.partial(fp.reference.linear_dpo_loss, **loss.keywords)
    return getattr(fp.reference, loss.__name__)


def _accuracy(difference: Tensor) -> float:
    """Share of differences above 0, a tie counting as half."""
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()
