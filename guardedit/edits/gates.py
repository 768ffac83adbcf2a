"""Gates that tell one kind of context from all else: logistic regression on a key space, by scikit-learn.

`activations`: on the mean of a prompt's activations. `latents`: sparse, on the root of the mean of each SAE latent
(means of latents differ by orders of magnitude; the root brings the rare ones up). Wordings are held out as a whole for
every figure and for the limit; what is returned was fitted to all of them. Platt (1999) for the calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guardedit.edits.activation_parts import Gate
from guardedit.edits.context_texts import Example
from guardedit.errors import BadRequestError, SolveError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import record
from guardedit.saes.checkpoints import Sae

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

Kind = Literal["activations", "latents"]
Array = np.ndarray[Any, np.dtype[np.float64]]
FOLDS, BATCH = 5, 16
FEWEST = 20
"""Examples of either side, at the least, that figures of a gate mean anything for."""
STRENGTH = {"activations": 0.01, "latents": 0.3}
"""scikit-learn's C on standardised features: of 0.001 to 1 the best on wordings of train prompts held out."""
ALWAYS = -1e30
"""A threshold that every pre-activation exceeds."""


@dataclass(frozen=True)
class GateQuality:
    """How a gate does on wordings that it was not fitted to."""

    auroc: float
    low: float
    high: float
    """95 % bootstrap over prompts."""
    fires_inside: float
    fires_outside: float
    """Shares of prompts, at the limit."""
    n_inside: int
    n_outside: int


@dataclass(frozen=True, eq=False)
class Pooled:
    """One row a prompt."""

    acts: Float[Tensor, "prompts d"]
    """Mean activation over the prompt, its first token left out."""
    latents: Float[Tensor, "prompts d_sae"] | None
    """Mean latent activations; None without an SAE."""


@torch.no_grad()
def pooled(
    handle: ModelHandle,
    texts: Sequence[str],
    hook_name: str,
    sae: Sae | None = None,
    told: Callable[[float], None] | None = None,
) -> Pooled:
    """Means over each text's tokens but the first (its activations are unlike any other's, and say nothing).

    In the order of the texts, whatever the batches: those of similar length run together. The model runs up to the
    hook only.
    """
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    acts: list[Tensor] = [torch.empty(0)] * len(texts)
    latents: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        batch = handle.encode([texts[index] for index in chunk])
        with record(handle, [hook_name], stop=True) as seen:
            handle.hidden(batch["input_ids"], batch["attention_mask"])
        for row, index in enumerate(chunk):
            tokens = seen[hook_name][row, : int(batch["attention_mask"][row].sum())].float()
            tokens = tokens[1:] if len(tokens) > 1 else tokens
            acts[index] = tokens.mean(0)
            latents[index] = sae.encode(tokens).float().mean(0) if sae is not None else acts[index]
        if told is not None:
            told((start + len(chunk)) / len(order))
    return Pooled(torch.stack(acts), torch.stack(latents) if sae is not None else None)


def fit_gate(
    made: Sequence[Example],
    means: Pooled,
    hook_name: str,
    kind: Kind = "activations",
    sae: Sae | None = None,
    false_fire: float = 0.005,
    seed: int = 0,
) -> tuple[Gate, GateQuality]:
    """Fit a gate to examples and say how well it does on held-out wordings.

    false_fire: share of held-out prompts outside the context at which it may fire; the limit follows from it.
    Raises BadRequestError without an SAE for `latents` or with too few examples, SolveError where nothing is told
    apart.
    """
    inside = np.array([example.inside for example in made])
    if min(int(inside.sum()), int((~inside).sum())) < FEWEST:
        raise BadRequestError(
            f"a gate needs {FEWEST} prompts inside and outside of its context, got {int(inside.sum())} and "
            f"{int((~inside).sum())}; give more in_context or out_of_context prompts"
        )
    features = _features(means, kind)
    scale = np.maximum(features.std(0), 1e-4)
    groups = _groups(made)
    held_out = _held_out(features / scale, inside, groups, kind, seed)
    slope, shift = _platt(held_out, inside)
    if slope <= 0:
        raise SolveError(
            "the gate cannot tell the context from what is outside; give clearer in_context prompts"
        )
    limit = _limit(slope * held_out + shift, inside, false_fire)
    whole = _fitted(features / scale, inside, kind, seed)
    weights = torch.from_numpy(slope * whole.coef_[0] / scale).float()
    bias = float(slope * whole.intercept_[0] + shift)
    quality = _quality(slope * held_out + shift, inside, limit, seed)
    if kind == "latents" and sae is not None:
        return _latent_gate(sae, hook_name, weights, bias, limit), quality
    return _activation_gate(hook_name, weights, bias, limit), quality


def explained(
    gate: Gate, made: Sequence[Example], means: Pooled, sae: Sae, top: int = 8
) -> list[tuple[int, float]]:
    """What an activation gate looks at, in words: the latents whose decoder directions carry most of the difference
    between its mean logit inside and outside, each with its share of that difference."""
    if means.latents is None:
        return []
    inside = torch.tensor([example.inside for example in made])
    change = means.latents[inside].mean(0) - means.latents[~inside].mean(0)
    direction = gate.w_enc.T.to(sae.W_dec.dtype) @ gate.weights.to(sae.W_dec.dtype)
    carried = change * (sae.W_dec @ direction).to(change)
    whole = (means.acts[inside].mean(0) - means.acts[~inside].mean(0)) @ direction.to(means.acts)
    order = carried.argsort(descending=True)[:top].tolist()
    return [(index, float(carried[index] / whole)) for index in order]


def _features(means: Pooled, kind: Kind) -> Array:
    if kind == "activations":
        return means.acts.double().cpu().numpy()
    if means.latents is None:
        raise BadRequestError("a gate on latents needs the SAE of its key space; use gate = 'activations'")
    return means.latents.clamp(min=0).sqrt().double().cpu().numpy()


def _groups(made: Sequence[Example]) -> list[int]:
    numbers = {group: number for number, group in enumerate(dict.fromkeys(one.group for one in made))}
    return [numbers[one.group] for one in made]


def _fitted(features: Array, inside: Bool[Any, " n"], kind: Kind, seed: int) -> LogisticRegression:
    from sklearn.linear_model import LogisticRegression

    sparse = kind == "latents"
    model = LogisticRegression(
        C=STRENGTH[kind], l1_ratio=1.0 if sparse else 0.0, solver="liblinear" if sparse else "lbfgs",
        class_weight="balanced", max_iter=2000, random_state=seed,
    )  # fmt: skip
    return model.fit(features, inside)


def _held_out(features: Array, inside: Any, groups: list[int], kind: Kind, seed: int) -> Array:
    """Each prompt's logit under a fit that has seen no prompt of its wording."""
    from sklearn.model_selection import StratifiedGroupKFold

    found = np.zeros(len(features))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    for train, test in folds.split(features, inside, groups):
        found[test] = _fitted(features[train], inside[train], kind, seed).decision_function(features[test])
    return found


def _platt(logits: Array, inside: Any) -> tuple[float, float]:
    """Slope and shift that turn logits into log-odds."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e3, class_weight="balanced").fit(logits[:, None], inside)
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def _limit(logits: Array, inside: Any, false_fire: float) -> float:
    """The smallest limit at which no larger share of the prompts outside fires."""
    outside = np.sort(logits[~inside])
    allowed = int(false_fire * len(outside))
    return float(np.nextafter(np.float32(outside[-1 - allowed]), np.float32(np.inf)))


def _quality(logits: Array, inside: Any, limit: float, seed: int) -> GateQuality:
    from sklearn.metrics import roc_auc_score

    rng, yes, no = np.random.default_rng(seed), np.flatnonzero(inside), np.flatnonzero(~inside)
    drawn = []
    for _ in range(500):
        some = np.concatenate([rng.choice(yes, len(yes)), rng.choice(no, len(no))])
        drawn.append(roc_auc_score(inside[some], logits[some]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    fires = logits >= limit
    return GateQuality(
        auroc=float(roc_auc_score(inside, logits)), low=float(low), high=float(high),
        fires_inside=float(fires[yes].mean()), fires_outside=float(fires[no].mean()),
        n_inside=len(yes), n_outside=len(no),
    )  # fmt: skip


def _activation_gate(hook_name: str, weights: Tensor, bias: float, limit: float) -> Gate:
    """One read-out direction in place of latents: the mean of w·x is w·(the mean of x)."""
    return Gate(
        hook_name=hook_name, w_enc=weights[None], b_enc=torch.zeros(1), threshold=torch.full((1,), ALWAYS),
        b_dec=torch.zeros(len(weights)), weights=torch.ones(1), bias=bias, limit=limit, pool="mean",
        labels=("a direction in the key space",),
    )  # fmt: skip


def _latent_gate(sae: Sae, hook_name: str, weights: Tensor, bias: float, limit: float) -> Gate:
    """The encoder rows of the latents that were picked."""
    picked = weights.nonzero()[:, 0]
    picked = picked[weights[picked].abs().argsort(descending=True)]
    if not len(picked):
        raise SolveError("no latent tells the context apart; use gate = 'activations'")
    labels = tuple(sae.labels[latent].label for latent in picked.tolist())
    return Gate(
        hook_name=hook_name, w_enc=sae.W_enc.T[picked].float().contiguous(), b_enc=sae.b_enc[picked].float(),
        threshold=sae.threshold[picked].float(), b_dec=sae.b_dec.float(), weights=weights[picked], bias=bias,
        limit=limit, pool="mean", root=True, latents=tuple(picked.tolist()), labels=labels,
    )  # fmt: skip
