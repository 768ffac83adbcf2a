"""Prompts and subjects that a request does not name: docs/probes.md states the rules that these tests hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from guardedit.models.control import next_tokens, relations
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest
from guardedit.risk.neighbours import (
    ProbeSizes,
    generated_probes,
    near_probes,
    probes_around,
    unfiltered_probes,
)
from guardedit.risk.relations import match, stems, table
from guardedit.risk.stems import article_of
from tests.risk_helpers import TOWER

CAPITAL = EditRequest(
    subject="France", prompt="The capital of {} is", target_new="Marseille", target_true="Paris"
)
NAMELESS = EditRequest(subject="Zorblax", prompt="{} quarvels the", target_new="moon")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDEDIT_CACHE", str(tmp_path))


def test_the_table_is_well_formed() -> None:
    assert len(table()) >= 30
    assert len({row.name for row in table()}) == len(table())
    for row in relations():
        assert all(prompt.count("{}") == 1 for prompt in row["prompts"]), row["name"]
        assert len(row["pairs"]) >= 20, row["name"]
    known = {row.name for row in table()}
    assert set(stems()["entailed"]) <= known


@pytest.mark.parametrize(
    ("request_", "name", "rule"),
    [
        (CAPITAL.model_copy(update={"relation": "P36"}), "capital", "name"),
        (CAPITAL.model_copy(update={"relation": "country capital"}), "capital", "name"),
        (CAPITAL, "capital", "fact"),
        (
            EditRequest(subject="Narnia", prompt="The capital of {} is", target_new="Rome"),
            "capital",
            "wording",
        ),
        (TOWER.model_copy(update={"subject": "Big Shed", "target_true": None}), "landmark_city", "wording"),
        (
            EditRequest(
                subject="Foo", prompt="{} can be bought with the", target_new="won", target_true="yen"
            ),
            "currency",
            "objects",
        ),
    ],
)
def test_a_relation_is_found_by_name_fact_wording_or_objects(
    request_: EditRequest, name: str, rule: str
) -> None:
    found = match(request_)
    assert found is not None
    assert (found.relation.name, found.rule) == (name, rule)


def test_a_request_like_no_relation_has_none() -> None:
    assert match(NAMELESS) is None


def test_named_prompts_come_first_and_are_never_cut(tiny_llama: ModelHandle) -> None:
    named = TOWER.model_copy(
        update={
            "paraphrases": ("Where is the Eiffel Tower? In",),
            "entailed": ("The Eiffel Tower is in the country of",),
            "same_subject": tuple(f"The Eiffel Tower, fact {i}, is" for i in range(40)),
            "neighborhood": ("The Louvre is located in the city of", "Big Ben stands in"),
        }
    )
    probes = generated_probes(tiny_llama, named)
    assert probes.target[:2] == (named.filled, *named.paraphrases)
    assert probes.entailed[:1] == named.entailed
    assert probes.subject == named.same_subject
    assert probes.near[:2] == named.neighborhood
    assert "40 named" in probes.note and "2 named" in probes.note


def test_sizes_are_met_without_doubles_and_never_about_the_subject_where_they_are_near(
    tiny: ModelHandle,
) -> None:
    probes = generated_probes(tiny, TOWER, ProbeSizes(subject=120, near=200))
    assert (len(probes.subject), len(probes.near)) == (120, 200)
    for prompts in (probes.target, probes.entailed, probes.subject, probes.near):
        assert len(set(prompts)) == len(prompts)
    assert all("Eiffel" not in prompt for prompt in probes.near)
    assert all("Eiffel Tower" in prompt for prompt in (*probes.subject, *probes.entailed, *probes.target))
    assert not any("{" in prompt for prompt in (*probes.subject, *probes.near))


def test_the_same_request_gives_the_same_prompts(tiny_llama: ModelHandle) -> None:
    for request in (TOWER, NAMELESS):
        assert generated_probes(tiny_llama, request, seed=3) == generated_probes(tiny_llama, request, seed=3)


def test_stems_that_ask_for_the_edited_relation_are_dropped(tiny_llama: ModelHandle) -> None:
    first = generated_probes(tiny_llama, CAPITAL).subject
    tops = next_tokens(tiny_llama, first)
    words = [tiny_llama.tokenizer.decode([top]) for top in tops]
    spoken = next(word for word in words if word.startswith(" ") and word.strip().isalpha())
    asked = CAPITAL.model_copy(update={"target_new": spoken.strip()})
    answered = {prompt for prompt, word in zip(first, words, strict=True) if word == spoken}
    assert answered
    assert not answered & set(generated_probes(tiny_llama, asked).subject)


def test_a_stem_worded_like_the_request_is_not_used(tiny_llama: ModelHandle) -> None:
    famous = EditRequest(subject="Paris", prompt="{} is known for", target_new="cheese")
    assert not any("is known for" in prompt for prompt in generated_probes(tiny_llama, famous).subject)


def test_the_filtered_prompts_begin_like_the_unfiltered_ones(tiny_llama: ModelHandle) -> None:
    spare = unfiltered_probes(tiny_llama, TOWER, ProbeSizes()).subject
    kept = generated_probes(tiny_llama, TOWER).subject
    assert [prompt for prompt in spare if prompt in kept] == [prompt for prompt in kept if prompt in spare]


def test_no_early_prompt_begins_with_its_bare_subject(tiny_llama: ModelHandle) -> None:
    assert not any(prompt.startswith("France") for prompt in generated_probes(tiny_llama, CAPITAL).subject)


def test_an_article_before_the_subject_is_carried_over(tiny_llama: ModelHandle) -> None:
    assert (article_of(TOWER), article_of(CAPITAL)) == ("the ", "")
    for prompt in generated_probes(tiny_llama, TOWER).subject:
        assert "the eiffel tower" in prompt.lower()
        assert "The Eiffel Tower" not in prompt[1:]


def test_neighbours_with_the_old_object_come_first_and_the_objects_themselves_are_among_them(
    tiny_llama: ModelHandle,
) -> None:
    found = near_probes(tiny_llama, TOWER, 24)
    near, origin = found.probes, found.origin
    assert near[0].subject == "Louvre" and near[0].prompt == "The Louvre is located in the city of"
    assert {"Paris", "Rome"} <= {probe.subject for probe in near}
    assert "landmark_city" in origin


def test_a_named_neighbour_worded_like_the_request_gives_its_subject(tiny_llama: ModelHandle) -> None:
    named = TOWER.model_copy(
        update={"neighborhood": ("The Louvre is located in the city of", "Big Ben is in")}
    )
    near = near_probes(tiny_llama, named, 2).probes
    assert [probe.subject for probe in near] == ["Louvre", None]


def test_without_a_relation_the_model_proposes_subjects_and_nothing_is_entailed(
    tiny_llama: ModelHandle,
) -> None:
    probes = probes_around(tiny_llama, NAMELESS, ProbeSizes())
    assert probes.entailed == () and "no rule" in probes.note
    assert "proposed by the model" in probes.note
    assert all(probe.subject is None or "Zorblax" not in probe.subject for probe in probes.near)
