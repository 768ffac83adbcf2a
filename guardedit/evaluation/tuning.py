"""Which layer and which settings for this model: edits of known facts, tried layer by layer and setting by setting.

Tracing does not answer that (Hase et al. 2023), trying does. Layers first, with the settings as they are; then, at the
best layers, each setting varied alone; successive halving in both rounds. What is maximised is the harmonic mean of
efficacy, paraphrase and neighborhood ("score" of Meng et al. 2022).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from guardedit.editors import EDITORS
from guardedit.edits.contexts import sample_contexts
from guardedit.edits.deltas import written
from guardedit.edits.inputs import SolveInputs
from guardedit.errors import BadRequestError, SolveError
from guardedit.evaluation.halving import halve, planned
from guardedit.evaluation.metrics import harmonic_mean
from guardedit.evaluation.rowfile import RowFile
from guardedit.evaluation.scoring import score_pairs
from guardedit.evaluation.tune_cases import TuneCase, TuneCases, known_cases
from guardedit.evaluation.tune_table import Tuned, TuneRow, score_interval
from guardedit.models.handle import ModelHandle

METRICS = ("efficacy", "paraphrase", "neighborhood")
FACTORS: dict[str, tuple[float, ...]] = {
    "learning_rate": (0.5, 2.0),
    "clamp_norm_factor": (0.6, 1.6),
    "stop_loss": (0.4, 2.5),
    "clamp": (0.5, 2.0),
}
"""Setting -> what its value is multiplied by, one at a time; left out where an editor lacks it or leaves it free."""
FINALISTS = 2
Progress = Callable[[str, int, int], None]
"""Called with (what, edits done, edits planned)."""


@dataclass(frozen=True)
class TunePlan:
    """What is tried."""

    editor: str = "rome"
    layers: tuple[int, ...] = ()
    """Candidates; none: every second layer of the lower two thirds."""
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Setting -> values to try instead of the present one; none: see FACTORS."""
    facts: int = 40
    """Known facts that the finalists are measured on."""
    first: int = 6
    """Facts of the first round."""
    seed: int = 0

    def candidates(self, handle: ModelHandle) -> tuple[int, ...]:
        """The layers to try; raises BadRequestError for one that the model does not have."""
        for layer in self.layers:
            handle.block(layer)
        return self.layers or tuple(range(1, max(2, 2 * handle.n_layers // 3), 2))

    def values(self, start: Any) -> dict[str, tuple[float, ...]]:
        """Setting -> values to try, the present one left out."""
        present = {name: getattr(start, name, None) for name in FACTORS}
        around = {n: tuple(float(v) * f for f in FACTORS[n]) for n, v in present.items() if v}
        return {
            name: tuple(value for value in values if value != getattr(start, name))
            for name, values in (self.grid or around).items()
        }


@dataclass(frozen=True)
class Candidate:
    """One layer with one group of settings."""

    settings: Any
    """The editor's own settings."""
    changed: tuple[tuple[str, float], ...] = ()
    """What differs from the settings that tuning began with, beside the layer."""

    @property
    def name(self) -> str:
        """`layer 5, learning_rate 0.5`."""
        return ", ".join(
            [f"layer {self.settings.layer}", *(f"{name} {value:g}" for name, value in self.changed)]
        )


def start_settings(handle: ModelHandle, plan: TunePlan, known: Mapping[str, Any]) -> Any:
    """The settings that tuning begins with: the kit's where there is one, contexts sampled once.

    Raises BadRequestError for an editor without a layer, or a setting to vary that it does not have.
    """
    kind = EDITORS[plan.editor].hparams
    names = {f.name for f in fields(kind)}
    if "layer" not in names:
        raise BadRequestError(f"{plan.editor} does not write to one layer, so there is none to tune")
    unknown = sorted(set(plan.grid) - names)
    if unknown:
        raise BadRequestError(
            f"{plan.editor} has no setting {unknown[0]!r}; it has {', '.join(sorted(names))}"
        )
    settings = kind(
        **{name: tuple(v) if isinstance(v, list) else v for name, v in known.items() if name in names}
    )
    if getattr(settings, "contexts", None) == () and hasattr(settings, "n_prefixes"):
        settings = replace(settings, contexts=sample_contexts(handle, settings.n_prefixes, plan.seed))
    return settings


def varied(start: Any, layer: int, values: Mapping[str, tuple[float, ...]]) -> list[Candidate]:
    """The layer with the settings as they are, and with each of them changed alone."""
    here = replace(start, layer=layer)
    changed = [((name, value),) for name, tried in values.items() for value in tried]
    return [Candidate(here), *(Candidate(replace(here, **dict(one)), one) for one in changed)]


def edits_planned(handle: ModelHandle, plan: TunePlan, start: Any, n_facts: int) -> int:
    """How many edits tuning takes at most, to say how long it will be before it begins."""
    layers = len(plan.candidates(handle))
    settings = len(varied(start, start.layer, plan.values(start))) * min(FINALISTS, layers)
    rounds = [(layers, plan.first), (settings, 2 * plan.first)]
    halving = sum(planned(n, first=first, most=n_facts, keep=FINALISTS) for n, first in rounds)
    return halving + FINALISTS * n_facts


def tune(
    handle: ModelHandle,
    cases: TuneCases,
    plan: TunePlan,
    start: Any,
    inputs: SolveInputs,
    *,
    state: Path | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Try the plan's layers and settings on known facts, one edit at a time; the model is left as it was.

    `start` is what `start_settings` gives, `inputs` holds the second moments of all candidate layers. `state` makes
    the run resumable. Raises BadRequestError where too few facts are known, StaleError where `state` belongs to
    another run.
    """
    known = known_cases(handle, cases.cases, plan.facts, plan.seed)
    about = _about(handle, cases, plan, start, inputs)
    bench = _Bench(handle, known, plan, inputs, RowFile(state, about), progress)
    bench.planned = edits_planned(handle, plan, start, len(known))
    layers = [Candidate(replace(start, layer=layer)) for layer in plan.candidates(handle)]
    best = halve(layers, bench.score, first=plan.first, most=len(known), keep=FINALISTS)
    more = [one for found in best for one in varied(start, found.settings.layer, plan.values(start))]
    finalists = halve(more, bench.score, first=2 * plan.first, most=len(known), keep=FINALISTS)
    for finalist in finalists:
        bench.score(finalist, len(known))
    tried = {candidate.name: candidate for candidate in [*layers, *more]}
    rows = [bench.row(candidate) for candidate in tried.values()]
    rows.sort(key=lambda row: (-row.n, -row.score.value))
    base = fmean(_measured(handle, case)["neighborhood"] for case in known)
    return Tuned(rows=tuple(rows), neighborhood_base=base, edits=len(bench.rows), about=about)


def _about(
    handle: ModelHandle, cases: TuneCases, plan: TunePlan, start: Any, inputs: SolveInputs
) -> dict[str, Any]:
    """What single results depend on. Which layers and values are tried is not part of it: a run can be widened."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(start).items() if k != "layer"}
    text = sorted({moment.corpus_digest for moment in inputs.second_moments.values()})
    return {
        "model": handle.name, "model_digest": handle.digest(), "editor": plan.editor, "settings": plain,
        "facts": cases.name, "facts_digest": cases.digest, "seed": plan.seed, "second_moment_text": text,
    }  # fmt: skip


@dataclass
class _Bench:
    """Measures candidates on facts, each pair once."""

    handle: ModelHandle
    cases: Sequence[TuneCase]
    plan: TunePlan
    inputs: SolveInputs
    memory: RowFile
    progress: Progress | None
    planned: int = 0

    def __post_init__(self) -> None:
        self.rows = {(row["candidate"], row["case_id"]): row for row in self.memory.load()}

    def score(self, candidate: Candidate, n: int) -> float:
        """Harmonic mean on the first n facts."""
        found = [self._row(candidate, case) for case in self.cases[:n]]
        return harmonic_mean([fmean(row[name] for row in found) for name in METRICS])

    def row(self, candidate: Candidate) -> TuneRow:
        """A candidate's figures on the facts that it was tried on."""
        known = [self.rows.get((candidate.name, case.case_id)) for case in self.cases]
        found = [row for row in known if row is not None]
        values = np.array([[row[name] for name in METRICS] for row in found])
        means = dict(zip(METRICS, map(float, values.mean(0)), strict=True))
        return TuneRow(
            name=candidate.name,
            layer=candidate.settings.layer,
            changed=dict(candidate.changed),
            n=len(found),
            **means,
            score=score_interval(values, self.plan.seed),
            seconds_per_edit=fmean(row["seconds"] for row in found),
        )

    def _row(self, candidate: Candidate, case: TuneCase) -> dict[str, Any]:
        key = (candidate.name, case.case_id)
        if key not in self.rows:
            found = _edited(self.handle, case, self.plan.editor, candidate.settings, self.inputs)
            row = {"candidate": candidate.name, "case_id": case.case_id, **found}
            self.memory.append(row)
            self.rows[key] = row
            if self.progress is not None:
                self.progress(candidate.name, len(self.rows), max(self.planned, len(self.rows)))
        return self.rows[key]


def _edited(
    handle: ModelHandle, case: TuneCase, editor: str, settings: Any, inputs: SolveInputs
) -> dict[str, Any]:
    """One edit, measured and taken back; one that cannot be solved has no efficacy and moves nobody."""
    started = time.perf_counter()
    try:
        delta = EDITORS[editor].solve(handle, [case.request], settings, inputs)
    except SolveError as error:
        unedited = _measured(handle, case)
        seconds = time.perf_counter() - started
        return {**unedited, "efficacy": 0.0, "paraphrase": 0.0, "seconds": seconds, "error": str(error)}
    seconds = time.perf_counter() - started
    with written(handle, delta):
        return {**_measured(handle, case), "seconds": seconds}


def _measured(handle: ModelHandle, case: TuneCase) -> dict[str, float]:
    """The three metrics of the model as it is."""
    prompts = (case.request.filled, *case.paraphrases, *case.neighborhood)
    targets = (case.request.target_new, case.request.target_true or "")
    scores = score_pairs(handle, [(prompt, target) for prompt in prompts for target in targets])
    new, true = scores[::2], scores[1::2]
    wins = [
        float(n.logprob is not None and t.logprob is not None and n.logprob > t.logprob)
        for n, t in zip(new, true, strict=True)
    ]
    keeps = [
        float(n.logprob is not None and t.logprob is not None and t.logprob > n.logprob)
        for n, t in zip(new, true, strict=True)
    ]
    at = 1 + len(case.paraphrases)
    return {"efficacy": wins[0], "paraphrase": fmean(wins[1:at]), "neighborhood": fmean(keeps[at:])}
