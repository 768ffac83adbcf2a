"""Gates that tell one kind of context from all else: logistic regression on activations, by scikit-learn.

`activations`: on the mean of a prompt's activations. `latents`: sparse, on the root of the mean of each SAE latent
(means of latents differ by orders of magnitude; the root brings the rare ones up). `both`: the two, weighed by a third
regression on what they say of wordings that they have not seen. Wordings are held out as a whole for every figure and
for the limit; what is returned was fitted to all of them. Platt (1999) for the calibration.
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

Kind = Literal["both", "activations", "latents"]
Part = Literal["activations", "latents"]
Array = np.ndarray[Any, np.dtype[np.float64]]
FOLDS, BATCH = 5, 16
FEWEST = 20
"""Examples of either side, at the least, that figures of a gate mean anything for."""
STRENGTH = {"activations": 0.001, "latents": 0.3}
"""scikit-learn's C on standardised features; for activations of 0.0005 to 0.03, by wordings in words of no bank."""
NO_LATENT = -1
"""Stands for a direction in a gate's list of latents."""
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
    kind: Kind = "both",
    sae: Sae | None = None,
    false_fire: float = 0.02,
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
    parts: tuple[Part, ...] = ("latents", "activations") if kind == "both" else (kind,)
    features = {part: _scaled(means, part) for part in parts}
    groups = _groups(made)
    held_out = np.stack([_held_out(features[part][0], inside, groups, part, seed) for part in parts], 1)
    slopes, shift = _calibrated(held_out, inside)
    told = held_out @ slopes + shift
    limit = _limit(told, inside, false_fire)
    quality = _quality(told, inside, limit, seed)
    if quality.auroc <= 0.5:
        raise SolveError(
            "the gate cannot tell the context from what is outside; give clearer in_context prompts"
        )
    readers, bias = [], float(shift)
    for part, slope in zip(parts, slopes, strict=True):
        scaled, scale = features[part]
        whole = _fitted(scaled, inside, part, seed)
        bias += float(slope * whole.intercept_[0])
        weights = torch.from_numpy(slope * whole.coef_[0] / scale).float()
        matters = torch.from_numpy(abs(whole.coef_[0]))
        readers.append(
            _direction(weights, sae, hook_name)
            if part == "activations"
            else _encoder_rows(weights, matters, sae)
        )
    return _gate(hook_name, readers, sae, bias, limit), quality


def explained(
    gate: Gate, made: Sequence[Example], means: Pooled, sae: Sae, top: int = 8
) -> list[tuple[int, float]]:
    """What an activation gate looks at, in words: the latents whose decoder directions carry most of the difference
    between its mean logit inside and outside, each with its share of that difference."""
    if means.latents is None:
        return []
    inside = torch.tensor([example.inside for example in made])
    change = means.latents[inside].mean(0) - means.latents[~inside].mean(0)
    rows = slice(gate.rooted, None)
    direction = gate.w_enc[rows].T.to(sae.W_dec.dtype) @ gate.weights[rows].to(sae.W_dec.dtype)
    carried = change * (sae.W_dec @ direction).to(change)
    whole = (means.acts[inside].mean(0) - means.acts[~inside].mean(0)) @ direction.to(means.acts)
    order = carried.argsort(descending=True)[:top].tolist()
    return [(index, float(carried[index] / whole)) for index in order]


def _scaled(means: Pooled, part: Part) -> tuple[Array, Array]:
    """Features divided by their standard deviations, and these."""
    if part == "activations":
        found = means.acts.double().cpu().numpy()
    elif means.latents is None:
        raise BadRequestError("a gate on latents needs an SAE where it reads; use gate = 'activations'")
    else:
        found = means.latents.clamp(min=0).sqrt().double().cpu().numpy()
    scale = np.maximum(found.std(0), 1e-4)
    return found / scale, scale


def _groups(made: Sequence[Example]) -> list[int]:
    numbers = {group: number for number, group in enumerate(dict.fromkeys(one.group for one in made))}
    return [numbers[one.group] for one in made]


def _fitted(features: Array, inside: Bool[Any, " n"], part: Part, seed: int) -> LogisticRegression:
    from sklearn.linear_model import LogisticRegression

    sparse = part == "latents"
    model = LogisticRegression(
        C=STRENGTH[part], l1_ratio=1.0 if sparse else 0.0, solver="liblinear" if sparse else "lbfgs",
        class_weight="balanced", max_iter=2000, random_state=seed,
    )  # fmt: skip
    return model.fit(features, inside)


def _held_out(features: Array, inside: Any, groups: list[int], part: Part, seed: int) -> Array:
    """Each prompt's logit under a fit that has seen no prompt of its wording."""
    from sklearn.model_selection import StratifiedGroupKFold

    found = np.zeros(len(features))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    for train, test in folds.split(features, inside, groups):
        found[test] = _fitted(features[train], inside[train], part, seed).decision_function(features[test])
    return found


def _calibrated(logits: Array, inside: Any) -> tuple[Array, float]:
    """Slopes, one a part, and shift that turn logits into log-odds."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e3, class_weight="balanced").fit(logits, inside)
    return model.coef_[0], float(model.intercept_[0])


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


@dataclass(frozen=True, eq=False)
class _Reader:
    """Rows of a gate."""

    w_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    weights: Tensor
    labels: tuple[str, ...]
    latents: tuple[int, ...]
    rooted: bool


def _direction(weights: Tensor, sae: Sae | None, hook_name: str) -> _Reader:
    """One read-out direction in place of latents: the mean of w·x is w·(the mean of x)."""
    back = torch.zeros(1) if sae is None else (weights @ sae.b_dec.float().cpu())[None]
    return _Reader(
        weights[None], back, torch.full((1,), ALWAYS), torch.ones(1), (f"a direction at {hook_name}",),
        (NO_LATENT,), rooted=False,
    )  # fmt: skip


def _encoder_rows(weights: Tensor, matters: Tensor, sae: Sae | None) -> _Reader:
    """The encoder rows of the latents that were picked, those that matter most first: by weight on a feature's own
    spread, as a rare latent has a large weight by itself."""
    if sae is None:
        raise BadRequestError("a gate on latents needs an SAE where it reads; use gate = 'activations'")
    picked = weights.nonzero()[:, 0]
    picked = picked[matters[picked].argsort(descending=True)]
    if not len(picked):
        raise SolveError("no latent tells the context apart; use gate = 'activations'")
    numbers = tuple(picked.tolist())
    return _Reader(
        sae.W_enc.T[picked].float(), sae.b_enc[picked].float(), sae.threshold[picked].float(), weights[picked],
        tuple(sae.labels[number].label for number in numbers), numbers, rooted=True,
    )  # fmt: skip


def _gate(hook_name: str, readers: Sequence[_Reader], sae: Sae | None, bias: float, limit: float) -> Gate:
    """All rows as one gate, the rooted ones first."""
    tensors = {
        name: torch.cat([getattr(one, name) for one in readers]).contiguous()
        for name in ("w_enc", "b_enc", "threshold", "weights")
    }
    b_dec = torch.zeros(tensors["w_enc"].shape[1]) if sae is None else sae.b_dec.float().cpu()
    return Gate(
        hook_name=hook_name, b_dec=b_dec, bias=bias, limit=limit, pool="mean",
        rooted=sum(len(one.weights) for one in readers if one.rooted),
        labels=sum((one.labels for one in readers), ()), latents=sum((one.latents for one in readers), ()),
        **tensors,
    )  # fmt: skip
