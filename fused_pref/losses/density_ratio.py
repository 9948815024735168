"""Underlying distribution matching: density-ratio weights for BCO's undesirable sequences."""

from typing import Any

import torch
from torch import Tensor

from fused_pref import validate
from fused_pref.losses.state import ExactModule


class DensityRatio(ExactModule):
    """Density ratio ρ(x) = p(f=1|x) / p(f=0|x) of prompts (BCO paper, arXiv 2404.04656, section 4.2).

    A logistic regression with balanced class weights on prompt embeddings, where f=1 marks prompts of desirable
    completions; ρ = p/(1−p+1e-8), clamped. The weights go to ``bco_loss(..., sample_weight=...)``: ρ for undesirable
    sequences, 1 for desirable ones. Fitting needs scikit-learn (``pip install "fused-pref[udm]"``); weights and saved
    state (coefficients and intercept, plain tensors, float64 also under ``.bfloat16()``) do not.

    Args:
        min_ratio: lower clamp, > 0.
        max_ratio: upper clamp, >= ``min_ratio``.
        sample_size: at most this many prompts are fitted, drawn without replacement; None: all.
        seed: of the generator that draws them, an integer that ``torch.Generator.manual_seed`` takes.
    """

    coefficients: Tensor
    intercept: Tensor

    def __init__(
        self, *, min_ratio: float = 0.5, max_ratio: float = 10.0, sample_size: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.min_ratio = validate.positive("min_ratio", min_ratio)
        self.max_ratio = validate.positive("max_ratio", max_ratio)
        if self.max_ratio < self.min_ratio:
            raise validate.fail("max_ratio", f">= min_ratio = {self.min_ratio}", max_ratio)
        self.sample_size = validate.at_least("sample_size", sample_size, 2, optional=True)
        self.generator = torch.Generator().manual_seed(validate.integer("seed", seed, most=2**64 - 1))
        self.register_buffer("coefficients", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("intercept", torch.zeros((), dtype=torch.float64))

    def fit(self, embeddings: Any, desirable: Any) -> "DensityRatio":
        """Fit on prompts of both classes; tensors, NumPy arrays or lists.

        Args:
            embeddings: (M, E) floating, finite; one row a prompt.
            desirable: bool (M,), whether the prompt's completion is desirable.

        Returns:
            This object.

        Raises:
            ModuleNotFoundError: scikit-learn is not installed.
            ValueError, TypeError: malformed input, or a class is missing.
        """
        try:
            from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'DensityRatio.fit needs scikit-learn: pip install "fused-pref[udm]"', name="sklearn"
            ) from error
        embeddings = validate.tensor("embeddings", as_tensor(embeddings), "(M, E)", None, validate.FLOATS)
        if embeddings.dim() != 2 or embeddings.shape[1] == 0:
            raise validate.fail("embeddings", "(M, E) with E >= 1", embeddings)
        shape = tuple(embeddings.shape[:1])
        desirable = validate.tensor("desirable", as_tensor(desirable), "(M,)", shape, (torch.bool,))
        features, classes = embeddings.detach().cpu().double(), desirable.cpu()
        if not features.isfinite().all():
            raise ValueError("embeddings must be finite; got NaN or infinity")
        if self.sample_size is not None and self.sample_size < len(features):
            drawn = torch.randperm(len(features), generator=self.generator)[: self.sample_size]
            features, classes = features[drawn], classes[drawn]
        if classes.all() or not classes.any():
            raise ValueError(
                f"desirable must hold both classes among the fitted prompts; got {int(classes.sum())} of {len(classes)}"
            )
        model = LogisticRegression(class_weight="balanced", max_iter=1000).fit(features.numpy(), classes.numpy())
        device = self.intercept.device
        self.coefficients = torch.as_tensor(model.coef_[0], dtype=torch.float64, device=device)
        self.intercept = torch.as_tensor(model.intercept_[0], dtype=torch.float64, device=device)
        return self

    def forward(self, embeddings: Any, desirable: Any = None) -> Tensor:
        """Weights of a batch; from tensors, NumPy arrays or lists.

        Args:
            embeddings: (S, E) prompt embeddings.
            desirable: bool (S,); desirable sequences weigh 1. None: ρ for every row.

        Returns:
            (S,) float32, detached, on the device of ``embeddings``.

        Raises:
            RuntimeError: nothing was fitted or loaded.
            ValueError, TypeError: malformed input.
        """
        if self.coefficients.numel() == 0:
            raise RuntimeError("DensityRatio has no coefficients: call fit() or load_state_dict() first")
        features = self.coefficients.numel()
        embeddings = validate.tensor("embeddings", as_tensor(embeddings), "(S, E)", None, validate.FLOATS)
        if embeddings.dim() != 2 or embeddings.shape[1] != features:
            raise validate.fail("embeddings", f"(S, E={features})", embeddings)
        place, shape = embeddings.device, tuple(embeddings.shape[:1])
        scores = embeddings.detach().double() @ self.coefficients.to(place) + self.intercept.to(place)
        probability = torch.sigmoid(scores)
        weights = (probability / (1 - probability + 1e-8)).clamp(self.min_ratio, self.max_ratio)
        if desirable is not None:
            desirable = validate.tensor("desirable", as_tensor(desirable), "(S,)", shape, (torch.bool,), place)
            weights = torch.where(desirable, 1.0, weights)
        return weights.float()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take coefficients of any length: their number is the embedding size, known from the first fit."""
        saved = state_dict.get(prefix + "coefficients")
        size = saved.numel() if isinstance(saved, Tensor) else 0
        validate.saved(state_dict, prefix + "coefficients", "(E,)", (size,), validate.FLOATS)
        validate.saved(state_dict, prefix + "intercept", "()", (), validate.FLOATS)
        if saved is not None:
            self.coefficients = self.coefficients.new_zeros(size)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The clamps and the size of the embeddings."""
        return f"E={self.coefficients.numel()}, min_ratio={self.min_ratio}, max_ratio={self.max_ratio}"


def as_tensor(value: Any) -> Any:
    """What embedding models return, as a tensor: an array, or a list of rows of any of these kinds; else the value."""
    try:
        if isinstance(value, list | tuple):
            return torch.stack([row if isinstance(row, Tensor) else torch.tensor(row) for row in value])
        return torch.tensor(value) if hasattr(value, "__array__") and not isinstance(value, Tensor) else value
    except (TypeError, ValueError, RuntimeError):  # of no numbers, or of rows of several lengths
        return value
