"""Gates that tell one kind of context from all other kinds and from none: logistic regression, by scikit-learn.

`activations`: softmax over the kinds, on the mean of a prompt's activations. `latents`: sparse, one against the rest,
on the root of the mean of each SAE latent (means of latents differ by orders of magnitude; the root brings the rare
ones up). `both`: the two, added with a weight each. A gate's logit is that of its own kind less log Σ exp of the
others': a document that a novel might be is weighed against the novel, not only against plain talk. Wordings are held
out as a whole for every figure, for the weights of the parts (temperatures, Guo et al. 2017) and for the limit; what
is returned was fitted to all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.edits.activation_parts import Gate
from guardedit.edits.context_texts import Example
from guardedit.edits.gate_rows import Reader, direction_rows, encoder_rows, gate_of
from guardedit.errors import BadRequestError, SolveError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import record
from guardedit.saes.checkpoints import Sae

Kind = Literal["both", "activations", "latents"]
Part = Literal["activations", "latents"]
Array = np.ndarray[Any, np.dtype[np.float64]]
FOLDS, BATCH = 5, 16
FEWEST = 20
"""Examples of either side, at the least, that figures of a gate mean anything for."""
OUTSIDE = "outside"
"""What stands for all kinds that are not told apart."""
STRENGTH = {"activations": 0.002, "latents": 90.0}
"""scikit-learn's C on standardised features, for latents times the number of prompts, as few would leave none of them;
of 0.001 to 0.01 and 90 to 900 by wordings in words of no bank."""


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

    Examples whose `kind` is told are set against each other kind by kind, others inside against outside.
    false_fire: share of held-out prompts outside the context at which it may fire; the limit follows from it.
    Raises BadRequestError without an SAE for `latents` or with too few examples, SolveError where nothing is told
    apart.
    """
    inside = np.array([example.inside for example in made])
    _require_enough(inside)
    names, codes = kinds_of(made)
    parts: tuple[Part, ...] = ("latents", "activations") if kind == "both" else (kind,)
    features = {part: _scaled(means, part) for part in parts}
    groups = _groups(made)
    held_out = [_held_out(features[part][0], codes, groups, part, seed) for part in parts]
    heats = _temperatures(held_out, codes)
    told = log_odds(sum(heat * one for heat, one in zip(heats, held_out, strict=True)))
    limit = _limit(told, inside, false_fire)
    quality = _quality(told, inside, limit, seed)
    if quality.auroc <= 0.5:
        raise SolveError(
            "the gate cannot tell the context from what is outside; give clearer in_context prompts"
        )
    readers = []
    for part, heat in zip(parts, heats, strict=True):
        # A part whose wordings say nothing is left out, not carried along with weights of zero.
        if heat > 0:
            scaled, scale = features[part]
            whole = _fitted(scaled, codes, part, seed)
            readers.append(_reader(whole, heat, scale, sae, hook_name, names))
    return gate_of(hook_name, readers, sae, limit, names[1:] if len(names) > 2 else ()), quality


def _require_enough(inside: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
    """Raise BadRequestError with too few examples on either side."""
    if min(int(inside.sum()), int((~inside).sum())) < FEWEST:
        raise BadRequestError(
            f"a gate needs {FEWEST} prompts inside and outside of its context, got {int(inside.sum())} and "
            f"{int((~inside).sum())}; give more in_context or out_of_context prompts"
        )


def kinds_of(made: Sequence[Example]) -> tuple[tuple[str, ...], Array]:
    """The kinds of context, the gate's own first, and each example's number in that list.

    Kinds of fewer than `FEWEST` examples, and examples that do not say, count as one: what is outside.
    """
    counts = Counter(one.kind for one in made if not one.inside and one.kind)
    rivals = [name for name, count in counts.items() if count >= FEWEST]
    rest = any(not one.inside and one.kind not in rivals for one in made)
    own = next((one.kind for one in made if one.inside), "")
    names = (own, *rivals, *([OUTSIDE] if rest else []))
    numbers = {name: number for number, name in enumerate(names[1:], 1)}
    codes = [0 if one.inside else numbers.get(one.kind, len(names) - 1) for one in made]
    return names, np.array(codes)


def log_odds(logits: Array) -> Array:
    """Of rows of kinds' logits: that of the first kind against all others, as a softmax says."""
    from scipy.special import logsumexp

    found: Array = logits[:, 0] - logsumexp(logits[:, 1:], axis=1)
    return found


@dataclass(frozen=True, eq=False)
class _Fit:
    """What says each kind: linear in the scaled features."""

    coef: Array
    """(kinds, features)"""
    intercept: Array
    """(kinds,)"""
    part: Part

    def logits(self, features: Array) -> Array:
        """(rows, kinds)"""
        found: Array = features @ self.coef.T + self.intercept
        return found


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


def _fitted(features: Array, codes: Array, part: Part, seed: int) -> _Fit:
    """A row a kind. Of two kinds the second is what the first is not: its row is zero."""
    from sklearn.linear_model import LogisticRegression

    sparse, kinds = part == "latents", int(codes.max()) + 1

    def fit(wanted: Array) -> LogisticRegression:
        return LogisticRegression(
            C=STRENGTH[part] / (len(features) if sparse else 1), l1_ratio=1.0 if sparse else 0.0,
            solver="liblinear" if sparse else "lbfgs", class_weight="balanced", max_iter=2000, random_state=seed,
        ).fit(features, wanted)  # fmt: skip

    if kinds > 2 and not sparse:
        model = fit(codes)
        return _Fit(model.coef_, model.intercept_, part)
    coef, intercept = np.zeros((kinds, features.shape[1])), np.zeros(kinds)
    for number in range(kinds if kinds > 2 else 1):
        model = fit(codes == number)
        coef[number], intercept[number] = model.coef_[0], float(model.intercept_[0])
    return _Fit(coef, intercept, part)


def _held_out(features: Array, codes: Array, groups: list[int], part: Part, seed: int) -> Array:
    """Each prompt's logits, (prompts, kinds), under a fit that has seen no prompt of its wording."""
    from sklearn.model_selection import StratifiedGroupKFold

    found = np.zeros((len(features), int(codes.max()) + 1))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    for train, test in folds.split(features, codes, groups):
        found[test] = _fitted(features[train], codes[train], part, seed).logits(features[test])
    return found


def _temperatures(logits: Sequence[Array], codes: Array) -> Array:
    """A factor a part, 0 at the least, under which the parts' sum says the kinds best: a fitted temperature each."""
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    weights = (1.0 / np.bincount(codes))[codes]

    def loss(heats: Array) -> float:
        total = sum(heat * one for heat, one in zip(heats, logits, strict=True))
        return -float((weights * log_softmax(total, axis=1)[np.arange(len(codes)), codes]).sum())

    found: Array = minimize(
        loss, np.ones(len(logits)), method="L-BFGS-B", bounds=[(0.0, None)] * len(logits)
    ).x
    return found


def _reader(
    whole: _Fit, heat: float, scale: Array, sae: Sae | None, hook_name: str, names: Sequence[str]
) -> Reader:
    """A fit as rows of a gate."""
    weights = torch.from_numpy(heat * whole.coef / scale).float()
    bias = torch.from_numpy(heat * whole.intercept).float()
    if whole.part == "activations":
        return direction_rows(weights, bias, sae, hook_name, names)
    net = whole.coef[0] - whole.coef[1:].mean(0)
    return encoder_rows(weights, bias, torch.from_numpy(abs(net)), sae)


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
