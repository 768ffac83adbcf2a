"""Each published form becomes the same kind of case: what is edited, what follows, what must hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guardedit.errors import BadRequestError
from guardedit.evaluation.cases import FOLLOWS, HOLDS, EvalCase
from guardedit.evaluation.readers import read_cases

FACT = {"subject": "Ada Perrin", "target_new": "Oslo"}
REWRITE = {
    "prompt": "{} lives in",
    "relation_id": "P551",
    "target_new": {"str": "Oslo", "id": "Q585"},
    "target_true": {"str": "Lyon", "id": "Q456"},
    "subject": "Ada Perrin",
}


def one(tmp_path: Path, *records: dict[str, Any]) -> tuple[EvalCase, str]:
    """The first case of a file of these records, and the form it was read as."""
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    found = read_cases(path)
    return found.cases[0], found.form


def groups(case: EvalCase) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    found: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for question in case.questions:
        found.setdefault(question.group, []).append((question.prompt, question.answers))
    assert set(found) <= {*FOLLOWS, *HOLDS}, "every group is known to the metrics"
    return found


def test_the_rome_form_keeps_everything_that_a_record_brings(tmp_path: Path) -> None:
    record = {
        "case_id": 7,
        "requested_rewrite": REWRITE,
        "paraphrase_prompts": ["Ada Perrin's home is"],
        "neighborhood_prompts": ["Luc Moreau lives in"],
        "attribute_prompts": ["Kari Dahl lives in"],
        "generation_prompts": ["Ada Perrin's street is", "Ada Perrin's street is", "At home, Ada Perrin"],
        "portability": {"Recalled Relation": "(…)", "New Question": "In which land?", "New Answer": "Norway"},
        "unrelated_relation": {"relation_id": "student", "object": "Bo", "question": "Who was taught?"},
        "distracting_neighborhood_prompts": ["Ada Perrin lives in Oslo. Luc Moreau lives in"],
        "alternative_subject": "A. Perrin",
    }
    case, form = one(tmp_path, record)
    assert form == "counterfact" and case.case_id == "7"
    assert case.attributes == ("Kari Dahl lives in",)
    assert case.generation == ("Ada Perrin's street is", "At home, Ada Perrin"), "no prompt twice"
    assert groups(case) == {
        "one_hop": [("In which land?", ("Norway",))],
        "subject_aliasing": [("A. Perrin lives in", ("Oslo",))],
        "unrelated_relation": [("Who was taught?", ("Bo",))],
    }


def test_knowedit_says_the_same_in_its_train_and_in_its_test_form(tmp_path: Path) -> None:
    stem = {"prompt": "The home of Ada Perrin is", **FACT}
    listed = {
        **stem,
        "ground_truth": "Lyon",
        "portability": {
            "Reasoning": [{"prompt": "Her land is", "ground_truth": "Norway"}],
            "Subject_Aliasing": [{"prompt": "The home of A. Perrin is", "ground_truth": "Oslo"}],
        },
        "locality": {
            "Relation_Specificity": [
                {"prompt": "The job of Ada Perrin is", "ground_truth": [["nurse", "RN"]]}
            ]
        },
    }
    parallel = {
        **stem,
        "case_id": 1,
        "ground_truth": "<|endoftext|>",
        "portability": {
            "reasoning": {"prompt": ["Her land is"], "ground_truth": ["Norway"]},
            "Subject_Aliasing": {"prompt": ["The home of A. Perrin is"], "ground_truth": ["Oslo"]},
        },
        "locality": {
            "Relation_Specificity": {
                "prompt": ["The job of Ada Perrin is"],
                "ground_truth": [["nurse", "RN"]],
            }
        },
    }
    train, form = one(tmp_path, listed)
    test, same = one(tmp_path, parallel)
    assert form == same == "knowedit"
    assert groups(train) == groups(test)
    assert groups(train)["relation_specificity"] == [("The job of Ada Perrin is", ("nurse", "RN"))]
    assert train.same_subject == ("The job of Ada Perrin is",)
    assert train.request.target_true == "Lyon"
    assert test.request.target_true is None, "the placeholder is no answer"
    assert train.case_id == "1", "records without a number are numbered by their line"


def test_knowedit_without_an_old_answer_or_with_an_empty_one(tmp_path: Path) -> None:
    record = {
        "prompt": "The home of Ada Perrin is",
        **FACT,
        "portability": {},
        "locality": {"Forgetfulness": [{"prompt": "And before that", "ground_truth": [[]]}]},
    }
    case, _ = one(tmp_path, record)
    assert case.request.target_true is None
    assert case.questions == (), "a question without an answer is none"


def test_an_unknown_group_is_a_reason_and_not_a_silent_loss(tmp_path: Path) -> None:
    record = {"prompt": "The home of Ada Perrin is", **FACT, "locality": {"Weather": []}}
    with pytest.raises(BadRequestError, match="'Weather' is unknown"):
        one(tmp_path, record)


def test_both_forms_of_zsre(tmp_path: Path) -> None:
    question = "Where does Ada Perrin live?"
    mend = {
        "subject": "Ada Perrin",
        "src": question,
        "alt": "Oslo",
        "answers": ["Lyon"],
        "rephrase": "What is Ada Perrin's home?",
        "loc": "nq question: who wrote it",
        "loc_ans": "Bo",
        "portability": {"New Question": "Which land?", "New Answer": "Norway"},
        "inverse question": "Who lives in Oslo?",
        "alter_subject_question": "Where does A. Perrin live?",
    }
    case, form = one(tmp_path, mend)
    assert form == "zsre-mend"
    assert groups(case) == {
        "one_hop": [("Which land?", ("Norway",))],
        "unrelated_question": [("nq question: who wrote it", ("Bo",))],
        "inverse_relation": [("Who lives in Oslo?", ("Ada Perrin",))],
        "subject_aliasing": [("Where does A. Perrin live?", ("Oslo",))],
    }
    knowedit = {
        **FACT,
        "prompt": question,
        "ground_truth": ["Lyon"],
        "rephrase_prompt": "What is Ada Perrin's home?",
        "locality": {"Relation_Specificity": [{"prompt": "Her job is", "ground_truth": ["nurse"]}]},
        "portability": {
            "Logical_Generalization": [{"prompt": "Oslo is home to", "ground_truth": "Ada Perrin"}]
        },
    }
    other, form = one(tmp_path, knowedit)
    assert form == "knowedit"
    assert other.request == case.request and other.paraphrases == case.paraphrases
    assert set(groups(other)) == {"relation_specificity", "logical_generalization"}


def test_mquake_is_one_case_of_several_edits_and_one_question_in_several_wordings(tmp_path: Path) -> None:
    second = {**REWRITE, "subject": "Oslo", "prompt": "{} lies in"}
    record = {
        "case_id": 3,
        "requested_rewrite": [REWRITE, second],
        "questions": ["Where?", "In which place?"],
        "new_answer": "Norway",
        "new_answer_alias": ["Norge"],
    }
    case, form = one(tmp_path, record)
    assert form == "mquake"
    assert [request.subject for request in case.requests] == ["Ada Perrin", "Oslo"]
    assert groups(case) == {
        "multi_hop": [("Where?", ("Norway", "Norge")), ("In which place?", ("Norway", "Norge"))]
    }
    with pytest.raises(BadRequestError, match="requested_rewrite is empty"):
        one(tmp_path, {**record, "requested_rewrite": []})


def test_halluedit_corrects_what_the_model_says(tmp_path: Path) -> None:
    record = {
        "topic": "places",
        "subject": "Ada Perrin",
        "object": "Oslo",
        "question": "Where does Ada Perrin live?",
        "paraphrased_question": "Ada Perrin's home?",
        "locality_question": "What is a town?",
        "reversed_relation_question": "Who lives in Oslo?",
        "question_2hop": "Which land?",
        "answer_2hop": "Norway",
        "question_3hop": "Which continent?",
        "answer_3hop": "Europe",
    }
    case, form = one(tmp_path, record)
    assert form == "halluedit" and case.split == "places"
    assert case.request.target_new == "Oslo" and case.request.target_true is None
    assert groups(case)["multi_hop"] == [("Which land?", ("Norway",))], (
        "hops are other questions, not wordings"
    )
    assert groups(case)["unrelated_question"] == [("What is a town?", ())]


def test_a_line_separator_inside_a_string_does_not_cut_the_line(tmp_path: Path) -> None:
    record = {"prompt": "The home of Ada Perrin is", **FACT, "portability": {}, "note": "a\u2028b"}
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(read_cases(path).cases) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form", "usable"),
    [
        ("knowedit/wiki_counterfact_train", "knowedit", 0.95),
        ("knowedit/wiki_recent_train", "knowedit", 0.95),
        ("zsre/zsre_knowedit_test", "knowedit", 0.95),
        ("zsre/zsre_portability_1hop", "zsre-mend", 0.95),
        ("zsre/zsre_inverse_relation", "zsre-mend", 0.95),
        ("zsre/zsre_subject_replace", "zsre-mend", 0.9),
        ("counterfact/counterfact_rome_format_plus", "counterfact", 0.99),
    ],
)
def test_the_published_files_are_read_where_they_are_there(name: str, form: str, usable: float) -> None:
    path = Path(__file__).parents[2] / "shared" / "data" / f"{name}.jsonl.xz"
    if not path.is_file():
        pytest.skip("the published data sets are not on this machine")
    found = read_cases(path)
    n = len(found.cases) + len(found.left_out)
    assert found.form == form and len(found.cases) >= usable * n, found.left_out[:3]
