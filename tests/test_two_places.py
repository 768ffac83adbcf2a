"""One fact at two places: what each write answers to, and what is spared is answered less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from guard_helpers import CASES
from pipeline_helpers import Home, home, world

from benchmarks.two_places import PLACES, Place, Trial, section
from guardedit.edits.keys import keys_at_subject
from guardedit.evaluation.cases import CaseSet
from guardedit.evaluation.guard.outcome_prompts import Neighbours
from guardedit.evaluation.guard.rows import Bench
from guardedit.models.hooks import key_hook

__all__ = ["home", "world"]

FLAT = 1e-6
"""A C that forbids nothing: what is spared is then spared by the weights alone."""


@pytest.fixture
def trial(home: Home) -> Trial:
    guard = home.guard()
    bench = Bench(guard, "rome", Neighbours.of(CASES))
    layer = guard.kit.layer
    moment = guard.kit.second_moments[key_hook(layer)]
    flat = replace(moment, matrix=torch.eye(moment.width, dtype=moment.matrix.dtype) * FLAT)
    case_set = CaseSet("facts", "made", "sha256:" + "0" * 64, CASES, ())
    return Trial(bench, CASES[0], case_set, {key_hook(layer): flat})


def answers(trial: Trial, place: Place, prompts: list[str]) -> torch.Tensor:
    """Norm of what the write adds at the last token of each prompt."""
    change = trial.at_end(place)
    keys = keys_at_subject(trial.bench.workspace.handle, prompts, prompts, change.layer).double()
    return change.update.move(keys).norm(dim=1)


def test_other_subjects_of_the_relation_are_spared_where_the_prompt_ends(trial: Trial) -> None:
    plain = Place(None, stop=0.5, end=trial.bench.workspace.kit.layer)
    around = trial.bench.pool.around(trial.request, 0)
    asked = [trial.request.prompt.replace("{}", who) for who in around]
    assert asked
    vars(trial)["groups"] = {"near": []}  # nobody judges here: all are left to spare
    shares = []
    for weight in (0.0, 1e-4, 1e3):
        found = answers(trial, replace(plain, spared=(0.0, weight, 0.0)), [trial.request.filled, *asked])
        shares.append(float((found[1:] / found[0]).square().mean()))
    assert shares[0] > 1.01 * shares[1] > 1.02 * shares[2] > 0


def row(place: str, fact: int, **changes: Any) -> dict[str, Any]:
    moved = dict.fromkeys(("subject", "near", "distractor"), 1.0 + fact)
    lost = {f"{name}_lost": 0.5 for name in moved}
    plain = {"efficacy": 1.0, "paraphrase": 0.5, "p_new": 0.9, "far": 0.001}
    return {
        "case_id": f"c{fact}",
        "place": place,
        "relation": f"r{fact % 4}",
        **plain,
        **moved,
        **lost,
        **changes,
    }


def test_a_line_for_each_place_that_was_tried() -> None:
    tried = list(PLACES)[:2]
    lines = section([row(place, fact) for place in tried for fact in range(12)]).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == tried
    assert "6.5 (" in lines[2] and "; 0.50" in lines[2]
    assert lines[-1] == "n 12 facts, seed 11."
