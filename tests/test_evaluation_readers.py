"""Readers turn each published form into the same cases, and say why a record cannot be used."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from guardedit.errors import BadRequestError
from guardedit.evaluation.readers import choose, read_cases, with_neighbours, without


def short(case_id: int = 1, **changes: Any) -> dict[str, Any]:
    """A record in CounterFact's short form."""
    record = {
        "case_id": case_id,
        "prompt": "The mother tongue of Ada Perrin is",
        "subject": "Ada Perrin",
        "target_new": "English",
        "ground_truth": "French",
        "rephrase_prompt": "Ada Perrin speaks",
        "locality_prompt": "Jean Valois speaks",
        "locality_ground_truth": "French",
        "split": "train",
    }
    return {**record, **changes}


def rome(case_id: int = 1, **changes: Any) -> dict[str, Any]:
    """The same fact as ROME's files have it."""
    rewrite = {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Ada Perrin",
    }
    record = {
        "case_id": case_id,
        "requested_rewrite": {**rewrite, **changes},
        "paraphrase_prompts": ["Ada Perrin speaks", "Ada Perrin, a speaker of"],
        "neighborhood_prompts": ["Jean Valois speaks"],
        "distracting_neighborhood_prompts": [
            "The mother tongue of Ada Perrin is English. Jean Valois speaks"
        ],
    }
    return record


def save(path: Path, records: list[Any]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".json":
        text = json.dumps(records)
    path.write_bytes(lzma.compress(text.encode()) if path.suffix == ".xz" else text.encode())
    return path


def test_both_forms_of_a_fact_give_the_same_edit(tmp_path: Path) -> None:
    brief = read_cases(save(tmp_path / "short.jsonl.xz", [short()])).cases[0]
    full = read_cases(save(tmp_path / "rome.json", [rome()])).cases[0]
    assert brief.request == full.request.model_copy(update={"relation": None})
    assert brief.request.filled == "The mother tongue of Ada Perrin is"
    assert set(brief.paraphrases) <= set(full.paraphrases)
    assert brief.neighborhood == full.neighborhood
    assert full.distractors and not brief.distractors


def test_the_editor_is_not_shown_the_prompts_it_is_measured_on(tmp_path: Path) -> None:
    case = read_cases(save(tmp_path / "rome.jsonl", [rome()])).cases[0]
    assert not (case.request.paraphrases or case.request.neighborhood or case.request.same_subject)


def test_unusable_records_are_left_out_with_their_place_and_reason(tmp_path: Path) -> None:
    lost = short(3)
    del lost["target_new"]
    records = [
        short(1),
        short(2, subject="Nobody"),
        lost,
        short(4, target_new="French"),
        short(5, locality_ground_truth="Dutch"),
        short(6, subject=7),
    ]
    found = read_cases(save(tmp_path / "a.jsonl", records))
    assert [case.case_id for case in found.cases] == ["1"]
    assert [where for where, _ in found.left_out] == ["line 2", "line 3", "line 4", "line 5", "line 6"]
    reasons = [why for _, why in found.left_out]
    assert "Nobody" in reasons[0] and "target_new" in reasons[1] and "nothing would change" in reasons[2]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"{not json\n", "cannot be read"),
        (b"[1]\n", "a record is an object"),
        (b'{"question": "?"}\n', "no form that is known"),
        (b'{"ground_truth": "a", "rephrase_prompt": "b"}\n', "no usable case; line 1"),
        ("é".encode("latin-1"), "cannot be read"),
    ],
)
def test_a_file_without_a_usable_case_is_refused_in_one_line(
    tmp_path: Path, content: bytes, says: str
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(BadRequestError, match=says) as raised:
        read_cases(tmp_path / "bad.jsonl")
    assert "\n" not in str(raised.value)


def test_a_split_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", [short(1), short(2, split="edit")])
    assert [case.case_id for case in read_cases(path, split="edit").cases] == ["2"]
    with pytest.raises(BadRequestError, match=r"'test'.*'edit', 'train'"):
        read_cases(path, split="test")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="there is no data file"):
        read_cases(tmp_path / "none.jsonl")


def test_neighbours_share_relation_and_old_object_and_never_the_subject(tmp_path: Path) -> None:
    people = [(2, "Luc Moreau", "French"), (3, "Ada Perrin Junior", "French"), (4, "Jan Smit", "Dutch")]
    others = [
        short(
            i,
            subject=who,
            prompt=f"The mother tongue of {who} is",
            ground_truth=said,
            locality_ground_truth=said,
        )
        for i, who, said in people
    ]
    others += [short(5, subject="Eva Roux", prompt="Eva Roux writes in")]
    cases = read_cases(save(tmp_path / "a.jsonl", [short(1), *others])).cases
    filled = with_neighbours(cases[:1], 10, cases)[0]
    assert filled.neighborhood == ("Jean Valois speaks", "The mother tongue of Luc Moreau is")
    assert with_neighbours(cases[:1], 1, cases)[0].neighborhood == ("Jean Valois speaks",)


def test_the_order_of_cases_depends_on_the_seed_and_not_on_the_file(tmp_path: Path) -> None:
    cases = read_cases(save(tmp_path / "a.jsonl", [short(i) for i in range(20)])).cases
    once = choose(cases, seed=3)
    assert once == choose(tuple(reversed(cases)), seed=3)
    assert once != choose(cases, seed=4)
    assert sorted(case.case_id for case in once) == sorted(case.case_id for case in cases)


def test_cases_about_some_subjects_can_be_kept_out(tmp_path: Path) -> None:
    found = read_cases(save(tmp_path / "a.jsonl", [short(1), short(2, subject="Ada")]))
    assert [case.case_id for case in without(found, {"Ada Perrin"}).cases] == ["2"]
