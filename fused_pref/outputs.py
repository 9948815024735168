"""What the objectives return. Only ``loss`` carries a gradient."""

from typing import Any, NamedTuple

from torch import Tensor


class _Beside:
    """A tuple with attributes beside its items, which copies, pickles and ``_replace`` keep."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), tuple(self), vars(self))  # type: ignore[arg-type]

    def _replace(self, **changes: Any) -> Any:
        return _rebuilt(type(self), super()._replace(**changes), vars(self))  # type: ignore[misc]


def _rebuilt(kind: Any, items: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    output = kind(*items)
    for name, value in attributes.items():
        setattr(output, name, value)
    return output


class _PairFields(NamedTuple):
    loss: Tensor
    nll_loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logits_mean: Tensor | None
    rejected_logits_mean: Tensor | None


class PairOutput(_Beside, _PairFields):
    """Result of a pairwise objective over B pairs; fp32, or fp64 for fp64 inputs.

    Attributes:
        loss: 0-d, differentiable.
        nll_loss: 0-d, the unweighted NLL of the chosen completions (0 where it is not computed).
        chosen_logps, rejected_logps: (B,), summed over the completion; averaged where the loss is ipo or simpo alone.
        chosen_rewards, rejected_rewards: (B,), beta times the log-probs as they enter CPO, or beta (logps - ref_logps).
        chosen_logits_mean, rejected_logits_mean: 0-d, mean of the transformed logits; None with ``logits_mean=None``.
        dropped_mass: shape of the labels, the probability that ``skip_mass`` leaves out of each token's gradient, 0
            where nothing is scored; None without ``skip_mass``; not one of the tuple's items.
        lengths: (S,) int64, scored tokens of each sequence, chosen ones first; not one of the tuple's items.
        delta: 0-d, the reward shift that bco_pair used; None without it; not one of the tuple's items.
    """

    lengths: Tensor
    dropped_mass: Tensor | None = None
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
        return means


class _BCOFields(NamedTuple):
    loss: Tensor
    delta: Tensor
    logps: Tensor
    rewards: Tensor
    chosen_logits_mean: Tensor | None
    rejected_logits_mean: Tensor | None
    chosen_count: Tensor
    rejected_count: Tensor


class BCOOutput(_Beside, _BCOFields):
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
        lengths, dropped_mass: as of :class:`PairOutput`; not among the tuple's items.
    """

    desirable: Tensor
    lengths: Tensor
    dropped_mass: Tensor | None = None

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


class KTOOutput(_Beside, _KTOFields):
    """Result of the KTO objective over S sequences; fp32, or fp64 for fp64 inputs.

    Attributes:
        loss: 0-d, differentiable.
        kl: 0-d, the estimate of the KL divergence as it was passed, in nats.
        logps: (S,), summed over the completion.
        rewards: (S,), beta (logps - ref_logps).
        chosen_logits_mean, rejected_logits_mean: as of :class:`BCOOutput`.
        chosen_count, rejected_count: 0-d int64, desirable and undesirable sequences.
        desirable: bool (S,), the classes as they were passed; not one of the tuple's items.
        dropped_mass: as of :class:`PairOutput`; not one of the tuple's items.
    """

    desirable: Tensor
    dropped_mass: Tensor | None = None

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
    return means


class _PreferenceFields(NamedTuple):
    loss: Tensor
    losses: Tensor
    logps: Tensor
    lengths: Tensor
    logits_mean: Tensor | None


class PreferenceOutput(_Beside, _PreferenceFields):
    """Result of an objective of the user's over S sequences; fp32, or fp64 for fp64 inputs.

    Attributes:
        loss: 0-d, differentiable.
        losses: (units,) the loss of each pair or sequence, 0-d where the batch is one unit; detached.
        logps: (S,), summed over the completion.
        lengths: (S,) int64, scored tokens.
        logits_mean: (S,), mean of the transformed logits of each sequence, 0 without a position; None with
            ``logits_mean=None``.
        dropped_mass: as of :class:`PairOutput`; not one of the tuple's items.
    """

    dropped_mass: Tensor | None = None

    def metrics(self) -> dict[str, Tensor]:
        """Detached 0-d means over sequences, on the device of the loss; nothing is synchronised."""
        number = max(self.logps.numel(), 1)
        means = {"logps": self.logps.sum() / number, "lengths": self.lengths.double().sum() / number}
        if self.logits_mean is not None:
            means["logits"] = self.logits_mean.sum() / number
        return means
