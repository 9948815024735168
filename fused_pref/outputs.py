"""What the objectives return. Only ``loss`` carries a gradient."""

from typing import Any, NamedTuple

from torch import Tensor


class OutputAttributes:
    """A tuple with attributes beside its items, which copies, pickles and ``_replace`` keep.

    Attributes:
        lengths: (S,) int64, scored tokens of each sequence.
        dropped_mass: shape of the labels, the probability that ``skip_mass`` leaves out of each token's gradient, 0
            where nothing is scored; None without ``skip_mass``.
        entropy: (S,) entropy of the softmax over the vocabulary, in nats: mean over each sequence's scored tokens, 0
            for an empty one; None without ``token_metrics``, as what follows.
        accuracy: (S,), share of the tokens whose logit no other is above.
        sum_sq: (S,), mean of the logarithm of the sum of squared probabilities.
    """

    lengths: Tensor
    dropped_mass: Tensor | None = None
    entropy: Tensor | None = None
    accuracy: Tensor | None = None
    sum_sq: Tensor | None = None

    def _token_metrics(self, chosen: int | None = None) -> dict[str, Tensor]:
        """Means over scored tokens: entropy of all, accuracy in the first ``chosen`` sequences (None: not given)."""
        if self.entropy is None or self.accuracy is None:
            return {}
        found = {"entropy": _token_mean(self.entropy, self.lengths)}
        if chosen is not None:
            found["mean_token_accuracy"] = _token_mean(self.accuracy[:chosen], self.lengths[:chosen])
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), tuple(self), vars(self))  # type: ignore[arg-type]

    def _replace(self, **changes: Any) -> Any:
        return _rebuilt(type(self), super()._replace(**changes), vars(self))  # type: ignore[misc]


def _rebuilt(kind: Any, items: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    output = kind(*items)
    for name, value in attributes.items():
        setattr(output, name, value)
    return output


def _token_mean(means: Tensor, lengths: Tensor) -> Tensor:
    return ((means.double() * lengths).sum() / lengths.sum().clamp(min=1)).to(means.dtype)


class _PairFields(NamedTuple):
    loss: Tensor
    nll_loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logits_mean: Tensor | None
    rejected_logits_mean: Tensor | None


class PairOutput(OutputAttributes, _PairFields):
    """Result of a pairwise objective over B pairs; fp32, or fp64 for fp64 inputs.

    Attributes:
        loss: 0-d, differentiable.
        nll_loss: 0-d, the unweighted NLL of the chosen completions (0 where it is not computed).
        chosen_logps, rejected_logps: (B,), summed over the completion; averaged where the loss is ipo or simpo alone.
        chosen_rewards, rejected_rewards: (B,), beta times the log-probs as they enter CPO, or beta (logps - ref_logps).
        chosen_logits_mean, rejected_logits_mean: 0-d, mean of the transformed logits; None with ``logits_mean=None``.
        lengths, dropped_mass, entropy, accuracy, sum_sq: see :class:`OutputAttributes`, chosen sequences first; not
            among the tuple's items.
        delta: 0-d, the reward shift that bco_pair used; None without it; not one of the tuple's items.
    """

    delta: Tensor | None = None

    def metrics(self) -> dict[str, Tensor]:
        """Detached 0-d tensors under the names TRL logs, on the device of the loss; nothing is synchronised."""
        pairs = max(self.chosen_logps.numel(), 1)
        chosen, rejected = self.chosen_rewards, self.rejected_rewards
        means = {
            "rewards/chosen": chosen.sum() / pairs,
            "rewards/rejected": rejected.sum() / pairs,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype).sum() / pairs,
            "rewards/margins": (chosen - rejected).sum() / pairs,
            "logps/chosen": self.chosen_logps.sum() / pairs,
            "logps/rejected": self.rejected_logps.sum() / pairs,
            "nll_loss": self.nll_loss,
        }
        if self.chosen_logits_mean is not None and self.rejected_logits_mean is not None:
            means["logits/chosen"] = self.chosen_logits_mean
            means["logits/rejected"] = self.rejected_logits_mean
        if self.delta is not None:
            means["delta"] = self.delta
        return means | self._token_metrics(self.chosen_logps.numel())


class _BCOFields(NamedTuple):
    loss: Tensor
    delta: Tensor
    logps: Tensor
    rewards: Tensor
    chosen_logits_mean: Tensor | None
    rejected_logits_mean: Tensor | None
    chosen_count: Tensor
    rejected_count: Tensor


class BCOOutput(OutputAttributes, _BCOFields):
    """Result of the BCO objective over S sequences; fp32, or fp64 for fp64 inputs.

    Attributes:
        loss: 0-d, differentiable.
        delta: 0-d, the reward shift that was used.
        logps: (S,), summed over the completion.
        rewards: (S,), beta (logps - ref_logps).
        chosen_logits_mean, rejected_logits_mean: 0-d, mean of the transformed logits of the desirable and undesirable
            sequences, 0 where there is none; None with ``logits_mean=None``.
        chosen_count, rejected_count: 0-d int64, desirable and undesirable sequences.
        desirable: bool (S,), the classes as they were passed; not one of the tuple's items.
        lengths, dropped_mass, entropy, accuracy, sum_sq: see :class:`OutputAttributes`; not among the tuple's items.
    """

    desirable: Tensor

    def metrics(self) -> dict[str, Tensor]:
        """Detached 0-d tensors under the names TRL logs, on the device of the loss; nothing is synchronised.

        Class means do not reduce over ranks, so sums (``rewards/chosen_sum``, …) and counts (``count/chosen``, …) are
        given beside them. A mean over a class that is absent is 0, and so is the margin.
        """
        return {"delta": self.delta, **_class_metrics(self)}


class _KTOFields(NamedTuple):
    loss: Tensor
    kl: Tensor
    logps: Tensor
    rewards: Tensor
    chosen_logits_mean: Tensor | None
    rejected_logits_mean: Tensor | None
    chosen_count: Tensor
    rejected_count: Tensor


class KTOOutput(OutputAttributes, _KTOFields):
    """Result of the KTO objective over S sequences; fp32, or fp64 for fp64 inputs.

    Attributes:
        loss: 0-d, differentiable.
        kl: 0-d, the estimate of the KL divergence as it was passed, in nats.
        logps: (S,), summed over the completion.
        rewards: (S,), beta (logps - ref_logps).
        chosen_logits_mean, rejected_logits_mean: as of :class:`BCOOutput`.
        chosen_count, rejected_count: 0-d int64, desirable and undesirable sequences.
        desirable: bool (S,), the classes as they were passed; not one of the tuple's items.
        lengths, dropped_mass, entropy, accuracy, sum_sq: see :class:`OutputAttributes`; not among the tuple's items.
    """

    desirable: Tensor

    def metrics(self) -> dict[str, Tensor]:
        """As of :class:`BCOOutput`, with ``kl`` in place of ``delta``."""
        return {"kl": self.kl, **_class_metrics(self)}


def _class_metrics(output: BCOOutput | KTOOutput) -> dict[str, Tensor]:
    chosen, rejected = output.desirable, ~output.desirable
    both = (output.chosen_count > 0) & (output.rejected_count > 0)
    means: dict[str, Tensor] = {}
    for side, members, count, logits_mean in (
        ("chosen", chosen, output.chosen_count, output.chosen_logits_mean),
        ("rejected", rejected, output.rejected_count, output.rejected_logits_mean),
    ):
        sums = {"rewards": output.rewards.where(members, 0).sum(), "logps": output.logps.where(members, 0).sum()}
        if logits_mean is not None:
            sums["logits"] = logits_mean * count
        for name, total in sums.items():
            means[f"{name}/{side}_sum"] = total
            means[f"{name}/{side}"] = total / count.clamp(min=1)
        means[f"count/{side}"] = count
    means["rewards/margins"] = (means["rewards/chosen"] - means["rewards/rejected"]).where(both, 0)
    return means | output._token_metrics()


class _PreferenceFields(NamedTuple):
    loss: Tensor
    losses: Tensor
    logps: Tensor
    lengths: Tensor
    logits_mean: Tensor | None


class PreferenceOutput(OutputAttributes, _PreferenceFields):
    """Result of an objective of the user's over S sequences; fp32, or fp64 for fp64 inputs.

    Attributes:
        loss: 0-d, differentiable.
        losses: (units,) the loss of each pair or sequence, 0-d where the batch is one unit; detached.
        logps: (S,), summed over the completion.
        lengths: (S,) int64, scored tokens.
        logits_mean: (S,), mean of the transformed logits of each sequence, 0 without a position; None with
            ``logits_mean=None``.
        dropped_mass, entropy, accuracy, sum_sq: see :class:`OutputAttributes`; not among the tuple's items.
    """

    def metrics(self) -> dict[str, Tensor]:
        """Detached 0-d means over sequences, on the device of the loss; nothing is synchronised."""
        number = max(self.logps.numel(), 1)
        means = {
            "logps": self.logps.sum() / number,
            "lengths": (self.lengths.double().sum() / number).to(self.logps.dtype),
        }
        if self.logits_mean is not None:
            means["logits"] = self.logits_mean.sum() / number
        paired = self.losses.dim() == 1 and 2 * self.losses.numel() == self.logps.numel()
        return means | self._token_metrics(self.losses.numel() if paired else None)
