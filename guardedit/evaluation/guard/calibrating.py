"""From a table of tried edits to the risk model that plans are judged with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from guardedit.errors import BadRequestError
from guardedit.evaluation.guard.association import spearman
from guardedit.evaluation.guard.features import MEANT, SUPPORT
from guardedit.evaluation.guard.findings import alone, fitted
from guardedit.evaluation.guard.fitting import OUTCOMES, fit_scope, groups_of, natural_edits
from guardedit.evaluation.guard.frames import rows_digest
from guardedit.records import Scope
from guardedit.risk.calibration import RiskModel, Worth

FEWEST = 40
"""Edits below which no model is fitted."""


def calibrated(
    frame: pd.DataFrame,
    model: str,
    editor: str,
    layers: Sequence[int],
    seed: int = 0,
    harm_as: RiskModel | None = None,
) -> tuple[RiskModel, dict[str, Any]]:
    """The model fitted on an editor's natural edits, and its figures on relations that it has not seen.

    Harm is what the worst tenth of these edits do; with `harm_as`, what counts as harm there, so that an editor whose
    every edit does much has no low bar of its own.
    Adversarial edits stay out: they are to be found outside the calibration's support, not to widen it. Raises
    BadRequestError for too few edits or relations.
    """
    natural = natural_edits(frame, editor)
    if len(natural) < FEWEST or len(set(groups_of(natural))) < 5:
        raise BadRequestError(
            f"{len(natural)} edits of {editor} in {len(set(groups_of(natural)))} relations; a risk model needs "
            f"{FEWEST} in five: guardedit evaluate guard --editor {editor} --limit {FEWEST}"
        )
    harm = harms_of(harm_as)
    scopes = tuple(fit_scope(natural, s, MEANT[s], seed, SUPPORT, harm.get(s)) for s in OUTCOMES)
    found = RiskModel(
        model=model, editor=editor, layers=tuple(sorted(layers)), seed=seed, scopes=scopes,
        rows_digest=rows_digest(natural), worth=tuple(_worth(natural, seed)),
        protocol=f"{len(natural)} natural edits; folds by relation; damage on prompts and text that no score saw"
        + (f"; harm as the worst tenth by {harm_as.editor}" if harm_as else ""),
    )  # fmt: skip
    figures: dict[str, Any] = {
        one.scope: fitted(natural, one.scope, MEANT[one.scope], seed, harm.get(one.scope))
        | {
            "weights": {
                t.score: round(t.weight, 4)
                for t in sorted(one.terms, key=lambda t: -abs(t.weight))
                if t.weight
            }
        }
        for one in scopes
    }
    return found, figures


def harms_of(model: RiskModel | None) -> dict[Scope, float]:
    """Nats above which damage is harm by this model, by scope; none without one."""
    return {one.scope: one.harm_nats for one in model.scopes} if model is not None else {}


def _worth(natural: pd.DataFrame, seed: int) -> Iterator[Worth]:
    for scope, outcome in OUTCOMES.items():
        for score, rho in alone(natural, outcome, spearman, seed).items():
            yield Worth(score=score, scope=scope, spearman=rho.value, low=rho.low, high=rho.high, n=rho.n)
