"""Causal tracing over many facts: total effect, and average indirect effect by layer and by the token's role."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from guardedit.errors import BadRequestError
from guardedit.evaluation.bootstrap import Estimate, estimate
from guardedit.evaluation.facts import FactList, known_facts
from guardedit.evaluation.rowfile import RowFile
from guardedit.models.handle import ModelHandle
from guardedit.models.tracing import KINDS, Trace, TraceSettings, embedding_std, trace, window_of
from guardedit.records import Record

CAVEAT = (
    "Tracing does not choose the layer to edit. What a trace shows at a layer says next to nothing about how well an "
    "edit of that layer works (Hase et al. 2023, arXiv 2301.04213): a fact can be written where it is not read from. "
    "Choose the layer by trying it, with `guardedit tune`."
)
"""Goes with every trace."""

ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
"""Meng et al. 2022, figure 2. Tokens before the subject have no effect at all and no role."""
RESAMPLES = 2_000
Progress = Callable[[str, int, int], None]
"""Called with (what, facts done, facts in all)."""


class TracedFact(Record):
    """One traced fact, as it is kept and written out."""

    subject: str
    prompt: str
    answer: str
    """The answer's first token, as the model says it."""
    tokens: tuple[str, ...]
    roles: tuple[str | None, ...]
    """Of each token."""
    p_clean: float
    p_corrupted: float
    layers: tuple[int, ...]
    indirect_effect: dict[str, tuple[tuple[float, ...], ...]]
    """Kind -> token -> layer -> p_restored − p_corrupted."""

    @property
    def total_effect(self) -> float:
        """p_clean − p_corrupted."""
        return self.p_clean - self.p_corrupted

    def at_role(self, kind: str, role: str) -> tuple[float, ...] | None:
        """Mean indirect effect by layer over the tokens of a role; None where the fact has none."""
        rows = [
            row for row, found in zip(self.indirect_effect[kind], self.roles, strict=True) if found == role
        ]
        return tuple(fmean(column) for column in zip(*rows, strict=True)) if rows else None


class Peak(Record):
    """Where the average indirect effect of a role is highest."""

    layer: int
    low: int
    high: int
    """95 % percentile bootstrap over facts of that layer."""
    effect: float


class TraceTable(Record):
    """Many facts."""

    n: int
    n_seen: int
    """Facts looked at to find so many that the model knows."""
    total_effect: Estimate
    layers: tuple[int, ...]
    indirect_effect: dict[str, dict[str, tuple[Estimate, ...]]]
    """Kind -> role -> layer -> average indirect effect."""
    peaks: dict[str, dict[str, Peak]]
    caveat: str = CAVEAT
    about: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, `about` laid open beside the figures."""
        plain = self.model_dump(mode="json")
        about = plain.pop("about")
        return {**plain, **about}


def roles_of(n_tokens: int, subject: tuple[int, int]) -> tuple[str | None, ...]:
    """Role of each token. A subject of one token is its last one; a token of the subject is never "last token"."""
    first, end = subject
    roles: list[str | None] = [None] * first
    roles += (
        ["first subject token", *["middle subject tokens"] * (end - first - 2)] if end - first > 1 else []
    )
    roles.append("last subject token")
    rest = n_tokens - end
    after = ["first subsequent token", *["further tokens"] * (rest - 2), "last token"]
    return (*roles, *(after if rest > 1 else after[-1:] * rest))


def traced(found: Trace, subject: str, prompt: str) -> TracedFact:
    """A trace as a record."""
    return TracedFact(
        subject=subject,
        prompt=prompt,
        answer=found.answer,
        tokens=found.tokens,
        roles=roles_of(len(found.tokens), found.subject),
        p_clean=found.p_clean,
        p_corrupted=found.p_corrupted,
        layers=found.layers,
        indirect_effect={kind: tuple(map(tuple, found.indirect(kind).tolist())) for kind in found.scores},
    )


def settings_of(handle: ModelHandle, settings: TraceSettings, std: float) -> dict[str, Any]:
    """What a trace rests on, for the record; how restorations are batched is not part of it."""
    plain = {name: value for name, value in asdict(settings).items() if name != "batch_tokens"}
    window = settings.window or window_of(handle.n_layers)
    return {
        "model": handle.name, "model_digest": handle.digest(), "embedding_std": std,
        **plain, "kinds": list(settings.kinds), "window": window,
    }  # fmt: skip


def trace_facts(
    handle: ModelHandle,
    facts: FactList,
    settings: TraceSettings,
    *,
    limit: int,
    seed: int = 0,
    state: Path | None = None,
    progress: Progress | None = None,
) -> TraceTable:
    """Trace the first `limit` facts that the model knows, in an order that `seed` decides; the model is left as it was.

    The noise level is that of all subjects in the list, known or not. `state` makes the run resumable. Raises
    BadRequestError where the model knows none of the facts, StaleError where `state` belongs to another run.
    """
    std = embedding_std(handle, facts.subjects)
    about = {
        **settings_of(handle, settings, std), "facts": facts.name, "facts_digest": facts.digest,
        "order_seed": seed, "protocol": "Meng et al. 2022",
    }  # fmt: skip
    memory = RowFile(state, about)
    rows = [TracedFact.model_validate(row) for row in memory.load()]
    done = {(row.subject, row.prompt): row for row in rows}
    order = list(facts.facts)
    random.Random(seed).shuffle(order)
    chosen, n_seen = [], len(order)
    for seen, fact in known_facts(handle, order):
        row = done.get((fact.subject, fact.prompt))
        if row is None:
            row = traced(trace(handle, fact, std, settings), fact.subject, fact.prompt)
            memory.append(row.model_dump(mode="json"))
        chosen.append(row)
        if progress is not None:
            progress("tracing", len(chosen), limit)
        if len(chosen) == limit:
            n_seen = seen
            break
    if not chosen:
        raise BadRequestError(f"{handle.name} knows none of the {len(order)} facts of {facts.name}")
    return summarise(chosen, n_seen=n_seen, about=about, seed=seed)


def summarise(rows: Sequence[TracedFact], *, n_seen: int, about: dict[str, Any], seed: int) -> TraceTable:
    """Averages with their intervals over facts."""
    total = estimate([row.total_effect for row in rows], seed, signed=True)
    if total is None:
        raise BadRequestError("no traced fact to summarise")
    effects: dict[str, dict[str, tuple[Estimate, ...]]] = {}
    peaks: dict[str, dict[str, Peak]] = {}
    for kind in (kind for kind in KINDS if kind in rows[0].indirect_effect):
        effects[kind], peaks[kind] = {}, {}
        for role in ROLES:
            curves = [curve for row in rows if (curve := row.at_role(kind, role)) is not None]
            if curves:
                columns = [estimate(c, seed, RESAMPLES, signed=True) for c in zip(*curves, strict=True)]
                effects[kind][role] = tuple(column for column in columns if column is not None)
                peaks[kind][role] = _peak(np.array(curves), rows[0].layers, seed)
    return TraceTable(
        n=len(rows), n_seen=n_seen, total_effect=total, layers=rows[0].layers, indirect_effect=effects,
        peaks=peaks, about=about,
    )  # fmt: skip


def _peak(curves: np.ndarray, layers: Sequence[int], seed: int) -> Peak:
    """Layer of the highest mean of `curves` (facts, layers), and how far it moves when facts are drawn again."""
    mean = curves.mean(0)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(curves), (RESAMPLES, len(curves)))
    tops = np.array(layers)[curves[draws].mean(1).argmax(1)]
    low, high = np.percentile(tops, (2.5, 97.5), method="nearest")
    top = int(mean.argmax())
    return Peak(layer=layers[top], low=int(low), high=int(high), effect=float(mean[top]))


def markdown(table: TraceTable) -> str:
    """Peaks by kind and role as a table for people, with the caveat."""
    te = table.total_effect
    lines = [
        f"{table.n} facts (of {table.n_seen} looked at). Total effect {te.value:.3f} ({te.low:.3f} to {te.high:.3f}).",
        "",
        "| restored | at | highest at layer (95 % of resamples) | average indirect effect | 95 % interval | facts |",
        "|---|---|---|---|---|---|",
    ]
    for kind, roles in table.indirect_effect.items():
        for role, columns in roles.items():
            peak = table.peaks[kind][role]
            at = columns[table.layers.index(peak.layer)]
            lines.append(
                f"| {kind} | {role} | {peak.layer} ({peak.low} to {peak.high}) | {at.value:.3f} "
                f"| {at.low:.3f} to {at.high:.3f} | {at.n} |"
            )
    return "\n".join([*lines, "", table.caveat])
