"""The same fact written where the subject ends, where the prompt ends, or half in each: what does each place spare?

    python -m benchmarks.two_places run OUT --data DATA --facts 24
    python -m benchmarks.two_places table docs/data/two_places.jsonl

A write at the subject's last token (layer 5) is read by every question about the subject; one at the prompt's last
token (layer 18) by every prompt that ends alike. Known CounterFact `train` facts (weights were chosen on the first
eight of the order, which are left out); judged by the prompts of `benchmarks.sparing`. The update at the prompt's end
is solved with C + Σ weight · energy of keys there: openings about the subject, twelve other subjects of the relation
(none that judges), and the prompt's own rewordings around their mean. Resumable.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from benchmarks.solve_again import lines_of
from benchmarks.sparing import cell, held, moved, prompts_of
from guardedit.edits.deltas import EditDelta, WeightChange, rehearsed
from guardedit.edits.keys import keys_at_subject, keys_of
from guardedit.edits.openings import OPENINGS, about
from guardedit.edits.rewordings import rewordings
from guardedit.edits.solvers import solve
from guardedit.edits.values import optimise_values
from guardedit.evaluation.cases import CaseSet, EvalCase
from guardedit.evaluation.datasets import with_contexts
from guardedit.evaluation.guard.outcome_prompts import Neighbours
from guardedit.evaluation.guard.rows import Bench
from guardedit.evaluation.guard.strata import KNOWN, chosen_edits
from guardedit.evaluation.readers import read_cases
from guardedit.evaluation.rowfile import RowFile
from guardedit.models.hooks import key_hook
from guardedit.models.second_moment import SecondMoment
from guardedit.pipeline import open as open_guard
from guardedit.pipeline.preparing import moments_for
from guardedit.records import EditRequest

SEED, FIRST, LAST, OTHERS = 11, 8, 18, 12
GROUPS = ("subject", "near", "distractor")


@dataclass(frozen=True)
class Place:
    """One way of writing a fact."""

    at_subject: str | None = "guarded"
    """Editor of the value there; None: nothing is written there."""
    layer: int = 5
    named: dict[str, Any] = field(default_factory=dict)
    stop: float | None = None
    """Loss at which the value at the prompt's end is done, on top of the other write; None: nothing there."""
    spared: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Weights of openings, other subjects and rewordings in C."""
    end: int = LAST
    """Layer of the write at the prompt's end."""


WEAK = {"margin": 0.0, "hold_loss": 2.0}
WEAKER = {"margin": 0.0, "hold_loss": 3.0, "keep_weight": 16.0}
WEAKEST = {"margin": 0.0, "hold_loss": 4.0, "keep_weight": 16.0, "keep_contrast": 0.0}
PLACES = {
    "`rome`": Place("rome"),
    "`guarded`": Place(),
    "`guarded` at layer 8": Place(layer=8),
    "`guarded` at layer 11": Place(layer=11),
    "prompt's end": Place(None, stop=0.02),
    "prompt's end, sparing": Place(None, stop=0.02, spared=(0.1, 0.1, 1)),
    "both, guarded in full": Place(stop=0.7, spared=(0.1, 0.1, 1)),
    "both, guarded weak": Place(named=WEAK, stop=0.7, spared=(0.1, 0.1, 1)),
    "both, guarded weaker": Place(named=WEAKER, stop=0.7, spared=(1, 30, 1)),
    "both, guarded weakest": Place(named=WEAKEST, stop=0.7, spared=(1, 10, 10)),
}


@dataclass(frozen=True)
class Trial:
    """One fact, and what its writes are solved with."""

    bench: Bench
    case: EvalCase
    case_set: CaseSet
    moments: dict[str, SecondMoment]

    @cached_property
    def request(self) -> EditRequest:
        """Without the neighbours that it names: no editor sees them."""
        return self.bench.request(self.case).model_copy(update={"neighborhood": ()})

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """What judges the edit."""
        found = prompts_of(self.bench, self.case, self.bench.request(self.case), self.case_set)
        return {name: found[name] for name in GROUPS}

    def row(self, place: Place) -> dict[str, Any]:
        """What one way of writing does."""
        handle, changes = self.bench.workspace.handle, []
        if place.at_subject:
            changes.append(self.at_subject(place))
        if place.stop is not None:
            with rehearsed(handle, EditDelta(tuple(changes), "trial", {}, {})):
                changes.append(self.at_end(place))
        delta = EditDelta(tuple(changes), "trial", {}, {})
        return {
            **held(handle, delta, self.request, self.case),
            **moved(handle, delta, self.groups),
            "far": self.bench.far.moves(delta)["kl_nats"],
        }

    def at_subject(self, place: Place) -> WeightChange:
        """The update at the subject's last token."""
        kit = self.bench.workspace.kit
        settings = replace(kit.settings(str(place.at_subject)), layer=place.layer, **place.named)
        return self._update(self.request, settings, place.layer)

    def at_end(self, place: Place) -> WeightChange:
        """The update at the prompt's last token: to the editor the whole prompt is the subject."""
        settings = replace(
            self.bench.workspace.kit.settings("rome"), layer=place.end, stop_loss=place.stop, n_prefixes=2
        )
        whole = self.request.model_copy(update={"prompt": "{}", "subject": self.request.filled})
        return self._update(whole, settings, place.end, place.spared)

    def _update(
        self, request: EditRequest, settings: Any, layer: int, spared: Sequence[float] = ()
    ) -> WeightChange:
        handle = self.bench.workspace.handle
        settings, moment = with_contexts(handle, settings, 0), self.moments[key_hook(layer)]
        keys = keys_of(handle, [request], layer, settings.contexts)
        (value,) = optimise_values(handle, [request], keys, layer, settings.contexts, settings)
        k_star = keys[0].k_star
        if spared:
            own, matrix = self._energies(settings.contexts, spared, moment.matrix, layer)
            k_star, moment = own, replace(moment, matrix=matrix)
        update = solve(k_star[:, None], value.residual[:, None], moment)
        return WeightChange(handle.rewrite_parameter(layer), layer, update)

    def _energies(
        self, contexts: Sequence[str], weights: Sequence[float], matrix: Tensor, layer: int
    ) -> tuple[Float64[Tensor, " d_in"], Float64[Tensor, "d_in d_in"]]:
        """The mean key over contexts and rewordings at the prompt's end, and C with what is spared in it."""
        mine = [
            *(context + self.request.filled for context in contexts),
            *(words.replace("{}", self.request.subject) for words in rewordings(self.request.prompt)),
        ]
        around = reversed(self.bench.pool.around(self.request, 0))
        others = [self.request.prompt.replace("{}", who) for who in around]
        others = [prompt for prompt in others if prompt not in set(self.groups["near"])][:OTHERS]
        keys = self._last_keys(mine, layer)
        parts = (
            self._last_keys([about(opening, self.request)[0] for opening in OPENINGS], layer),
            self._last_keys(others, layer),
            keys - keys.mean(0),
        )
        for weight, part in zip(weights, parts, strict=True):
            matrix = matrix + weight * (part.T @ part / len(part)).to(matrix)
        return keys.mean(0), matrix

    def _last_keys(self, prompts: Sequence[str], layer: int) -> Float64[Tensor, "n d_in"]:
        if not prompts:  # nobody else to spare
            return torch.zeros(1, self.bench.workspace.handle.d_in(layer), dtype=torch.float64)
        return keys_at_subject(self.bench.workspace.handle, prompts, prompts, layer).double()


def run(out: Path, data: Path, n_facts: int) -> None:
    """A row a fact and place."""
    guard = open_guard(home=out / "home")
    case_set = read_cases(data / "counterfact/counterfact_edit_format.jsonl.xz", "train")
    bench = Bench(guard, "rome", Neighbours.of(case_set.cases), 0)
    new = sorted({place.layer for place in PLACES.values()} - {5} | {LAST})
    moments = {**guard.kit.second_moments, **moments_for(guard.handle, new)}
    file = RowFile(out / "two_places.jsonl", {"model": guard.handle.digest(), "seed": SEED})
    done = {(row["case_id"], row["place"]) for row in file.load()}
    chosen = chosen_edits(guard.handle, case_set, KNOWN, FIRST + n_facts, SEED)
    for number, one in enumerate(islice(chosen, FIRST, None), start=1):
        trial = Trial(bench, one.case, case_set, moments)
        for name, place in PLACES.items():
            if (one.case.case_id, name) not in done:
                about_it = {"case_id": one.case.case_id, "place": name, "relation": trial.request.prompt}
                file.append(about_it | trial.row(place))
        print(f"{number} of {n_facts}", file=sys.stderr, flush=True)


def section(rows: Sequence[dict[str, Any]]) -> str:
    """Means over facts with 95 % intervals over relations; KL in nats, lost answers behind it. Facts that were written
    in every way only, so that all lines are about the same ones."""
    tried = Counter(row["case_id"] for row in rows)
    rows = [row for row in rows if tried[row["case_id"]] == max(tried.values())]
    names = ("efficacy", "paraphrase", "p_new", *GROUPS, "far")
    lines = [f"| written at | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for place in PLACES:
        some = [row for row in rows if row["place"] == place]
        if some:
            lines.append(f"| {place} | {' | '.join(cell(some, name) for name in names)} |")
    return "\n".join([*lines, "", f"n {len({row['case_id'] for row in rows})} facts, seed {SEED}.", ""])


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("run", "table"))
    parser.add_argument("source", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--facts", type=int, default=24)
    args = parser.parse_args()
    if args.step == "run":
        run(args.source, args.data, args.facts)
    else:
        print(section(lines_of(args.source)))


if __name__ == "__main__":
    main()
