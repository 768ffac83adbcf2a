"""What follows from an edit: which questions are asked, and that nothing changes where nothing was edited."""

from __future__ import annotations

import pandas as pd
import pytest
from drift_helpers import make_delta

from benchmarks.ripples import (
    A_GROUP,
    A_RELATION,
    GROUPS,
    answers,
    candidates,
    questions,
    section_ripples,
    spread,
)
from guardedit.evaluation.cases import CaseSet, EvalCase, Question
from guardedit.evaluation.guard.strata import Chosen
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest


def question(group: str, prompt: str = "Paris is", answers: tuple[str, ...] = ("big",)) -> Question:
    return Question(group=group, prompt=prompt, answers=answers)


def case(number: int, *asked: Question, prompt: str = "{} is in") -> EvalCase:
    request = EditRequest(subject=f"S{number}", prompt=prompt, target_new="Rome", target_true="Oslo")
    return EvalCase(case_id=str(number), request=request, questions=asked)


def test_candidates_have_a_question_about_what_follows_and_no_relation_takes_all() -> None:
    many = [case(i, question("reasoning")) for i in range(100)]
    silent, other = (
        case(200, question("relation_specificity")),
        case(201, question("reasoning"), prompt="{} by"),
    )
    found = candidates(CaseSet("x", "knowedit", "sha256:" + "0" * 64, (*many, silent, other), ()))
    assert [one.case_id for one in found.cases] == [*map(str, range(100)), "201"]
    kept = spread([Chosen("known", one) for one in found.cases])
    assert [one.case.case_id for one in kept] == [*map(str, range(A_RELATION)), "201"]


def test_questions_are_a_few_of_each_group_that_has_an_answer() -> None:
    asked = [question(group, f"{group} {i}") for group in GROUPS for i in range(A_GROUP + 2)]
    silent = question("reasoning", "nobody says", ())
    found = questions(case(1, *asked, silent))
    assert [one.group for one in found] == [group for group in GROUPS for _ in range(A_GROUP)]
    assert silent not in found and found == questions(case(1, *asked, silent))


def test_an_update_of_nothing_moves_no_answer_and_a_large_one_does(tiny_llama: ModelHandle) -> None:
    asked = [question("reasoning", "The capital of France is", ("Paris", "Rome")), question("forgetfulness")]
    still = answers(tiny_llama, make_delta(tiny_llama, 0.0), asked)
    assert [one["group"] for one in still] == ["reasoning", "forgetfulness"]
    for one in still:
        assert one["kl_nats"] == pytest.approx(0, abs=1e-9) and one["gain_nats"] == pytest.approx(0, abs=1e-6)
        assert one["says_before"] == one["says_after"]
    assert all(one["kl_nats"] > 1e-3 for one in answers(tiny_llama, make_delta(tiny_llama, 3.0), asked))


def test_the_table_holds_shares_by_group_and_the_score_that_orders_the_divergence() -> None:
    rows = pd.DataFrame(
        {
            "case_id": str(i), "relation": f"r{i % 6}", "group": group, "kl_nats": float(i), "gain_nats": -1.0,
            "says_before": True, "says_after": i % 2 == 0, "pred.key_norm": float(i), "pred.leakage": float(-i % 7),
        }
        for i in range(24) for group in ("reasoning", "relation_specificity")
    )  # fmt: skip
    text = section_ripples(rows)
    (line,) = [one for one in text.splitlines() if one.startswith(f"| {GROUPS['reasoning']}")]
    assert [cell.strip()[:4] for cell in line.strip("|").split("|")[1:6]] == [
        "24",
        "24",
        "1.00",
        "0.50",
        "-1.0",
    ]
    first = next(one for one in text.splitlines() if one.startswith("| `"))
    assert first.startswith("| `key_norm` | 1.00 (1.00 to 1.00)")
    assert "Mean divergence of an edit's entailed answers: 11.50" in text
