"""Does the model already believe a claim? Read off the subject's and the object's representation, nothing generated.

Two read-outs, of which the better one on held-out subjects is kept: *direction*, REMEDI's own (how far the direction
that the claim would add already lies in the entity, as a cosine; Hernandez, Li, Andreas 2023, section 5), and
*regression*, logistic on [entity; attribute; entity·attribute]. Either ends in a probability
by a logistic fit (Platt 1999).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guardedit.edits.remedi_map import RemediMap
from guardedit.edits.representations import Claim, Representations, represent
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle

Kind = Literal["direction", "regression"]
Array = np.ndarray[Any, np.dtype[np.float64]]
FOLDS, RESAMPLES = 5, 2000
FEWEST = 20
"""Claims of either side, at the least, that a fit or a figure means anything for."""
STRENGTH = 0.001
"""scikit-learn's C on standardised features: there are more of them than claims."""


@dataclass(frozen=True, eq=False)
class BeliefDetector:
    """P(believed) = σ(weights·(features − mean)/spread + bias)."""

    hook_name: str
    kind: Kind
    mean: Float[Tensor, " n"]
    spread: Float[Tensor, " n"]
    weights: Float[Tensor, " n"]
    bias: float
    trained: RemediMap | None = None
    """The map that "direction" asks."""

    def probability(self, found: Representations) -> Float[Tensor, " claims"]:
        """Of every claim that the model believes it; calibrated on claims of which half were believed."""
        scaled = (features(found, self.kind, self.trained).double() - self.mean) / self.spread
        return torch.sigmoid(scaled @ self.weights + self.bias)


@dataclass(frozen=True)
class DetectorQuality:
    """On claims about subjects that the detector has not seen."""

    auroc: float
    low: float
    high: float
    """95 % bootstrap over subjects: a subject's claims are drawn together."""
    brier: float
    """Mean squared error of the probability; 0.25 for one that always says a half."""
    n_facts: int
    n_claims: int


def features(found: Representations, kind: Kind, trained: RemediMap | None) -> Float[Tensor, "claims n"]:
    """What a kind looks at. Raises BadRequestError for "direction" without a map."""
    if kind == "regression":
        return torch.cat([found.together(), found.entity * found.attribute], 1)
    if trained is None:
        raise BadRequestError('a detector of the kind "direction" needs a trained map; take "regression"')
    return torch.cosine_similarity(trained.directions(found), found.entity, dim=1)[:, None]


def fit_detector(
    found: Representations,
    believed: Sequence[bool],
    hook_name: str,
    kind: Kind = "regression",
    trained: RemediMap | None = None,
    seed: int = 0,
) -> BeliefDetector:
    """Fit a detector to claims of which it is known whether the model believes them.

    Its probability is calibrated on predictions across folds, not on those of the fit itself. Raises BadRequestError
    for too few claims of either side.
    """
    labels = _labels(believed)
    plain = features(found, kind, trained).double().cpu()
    mean, spread = plain.mean(0), plain.std(0) + 1e-6
    scaled = ((plain - mean) / spread).numpy()
    slope, shift = _platt(_across_folds(scaled, labels, seed), labels)
    whole = _regression(seed).fit(scaled, labels)
    weights = torch.from_numpy(slope * whole.coef_[0])
    bias = float(slope * whole.intercept_[0] + shift)
    return BeliefDetector(hook_name, kind, mean, spread, weights, bias, trained)


def grade(
    detector: BeliefDetector,
    found: Representations,
    believed: Sequence[bool],
    facts: Sequence[str],
    seed: int = 0,
) -> DetectorQuality:
    """How well it tells claims of other subjects apart; `facts` names each claim's subject."""
    from sklearn.metrics import roc_auc_score

    labels, told = _labels(believed), detector.probability(found).cpu().numpy()
    names = sorted(set(facts))
    rows = {name: [i for i, fact in enumerate(facts) if fact == name] for name in names}
    rng, draws = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        picked = [row for at in rng.integers(0, len(names), len(names)) for row in rows[names[at]]]
        if len(set(labels[picked])) == 2:
            draws.append(float(roc_auc_score(labels[picked], told[picked])))
    low, high = np.quantile(draws, (0.025, 0.975))
    return DetectorQuality(
        auroc=float(roc_auc_score(labels, told)),
        low=float(low),
        high=float(high),
        brier=float(np.mean((told - labels) ** 2)),
        n_facts=len(names),
        n_claims=len(labels),
    )


def believes(
    handle: ModelHandle, detector: BeliefDetector, claims: Sequence[Claim]
) -> Float[Tensor, " claims"]:
    """P(the model believes it) of every claim, from one pass up to the detector's hook; the model is left as it was."""
    return detector.probability(represent(handle, claims, detector.hook_name))


def _labels(believed: Sequence[bool]) -> Bool[np.ndarray, " claims"]:
    labels = np.asarray(believed, dtype=bool)
    if min(int(labels.sum()), int((~labels).sum())) < FEWEST:
        raise BadRequestError(
            f"a belief detector needs {FEWEST} claims of either side, got {int(labels.sum())} believed and "
            f"{int((~labels).sum())} not; give more facts that the model knows"
        )
    return labels


def _regression(seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=STRENGTH, max_iter=2000, random_state=seed)


def _across_folds(scaled: Array, labels: Any, seed: int) -> Array:
    """Logits of every claim from a fit to the other folds. A fact's claims lie side by side, so folds are runs."""
    told = np.zeros(len(labels))
    for part in np.array_split(np.arange(len(labels)), FOLDS):
        rest = np.setdiff1d(np.arange(len(labels)), part)
        told[part] = _regression(seed).fit(scaled[rest], labels[rest]).decision_function(scaled[part])
    return told


def _platt(told: Array, labels: Any) -> tuple[float, float]:
    """Slope and shift that make logits probabilities."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=1e6, max_iter=2000).fit(told[:, None], labels)
    return float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
