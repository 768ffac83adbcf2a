"""The generated world: the same twice, functional, held-out wordings in no text, ripples right by composition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.world import HELD_OUT, World, edits, make_world, pairs_of, prompt_of
from benchmarks.world_relations import BASE, BY_NAME, DERIVED, RELATIONS
from benchmarks.world_ripple import questions
from benchmarks.world_text import documents
from guardedit.evaluation.readers import read_cases
from guardedit.risk.relations import match

seeds = st.integers(0, 10**6)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(0)


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_a_seed_gives_one_world_and_one_text(seed: int) -> None:
    first, second = make_world(seed), make_world(seed)
    assert first == second
    assert list(documents(first, 5, 0)) == list(documents(second, 5, 0))
    assert list(edits(first)) == list(edits(second))


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_no_name_stands_inside_another(seed: int) -> None:
    names = [name for kind in make_world(seed).names.values() for name in kind]
    assert len(set(names)) == len(names)
    assert not [(a, b) for a in names for b in names if a != b and a in b]


def test_every_subject_has_one_object_of_the_right_kind(world: World) -> None:
    for one in RELATIONS:
        for subject in world.names[one.subjects]:
            assert world.answer(one.name, subject) in world.names[one.objects]
    assert len(world.facts) == sum(len(world.names[one.subjects]) for one in BASE)


def test_derived_relations_are_compositions_whose_kinds_fit() -> None:
    for one in DERIVED:
        steps = [BY_NAME[step] for step in one.path]
        assert not any(step.path for step in steps)
        kinds = [one.subjects, *(step.objects for step in steps)]
        assert [step.subjects for step in steps] == kinds[:-1] and kinds[-1] == one.objects


@given(seeds, st.integers(0, 500))
@settings(max_examples=40, deadline=None)
def test_what_an_edit_entails_is_what_the_changed_world_says(seed: int, number: int) -> None:
    world = make_world(seed)
    edit = list(world.facts)[number]
    new = next(o for o in world.names[BY_NAME[edit[0]].objects] if o != world.facts[edit])
    changed = World(world.seed, world.names, {**world.facts, edit: new})
    entailed = world.entailed(edit, new)
    for one in DERIVED:
        for subject in world.names[one.subjects]:
            before, after = world.answer(one.name, subject), changed.answer(one.name, subject)
            assert entailed.get((one.name, subject), (before, before)) == (before, after)


def test_a_town_moved_to_another_country_takes_its_people_along(world: World) -> None:
    person = world.names["person"][0]
    town = world.answer("hometown", person)
    land = next(c for c in world.names["country"] if c != world.answer("land", town))
    assert world.entailed(("land", town), land)["homeland", person] == (
        world.answer("homeland", person),
        land,
    )


def test_held_out_pairs_and_unstated_facts_are_in_no_text(world: World) -> None:
    text = "\n".join([*documents(world, 1500, 0), *documents(world, 200, 1)])
    said = {
        line for line in text.replace(". ", ".\n").splitlines() if not line.startswith("Some of them are")
    }
    allowed = {
        f"{prompt_of(BY_NAME[name], w, subject, o)} {world.answer(name, subject)}."
        for name, subject in world.stated
        for w, o in pairs_of(BY_NAME[name], held_out=False)
    }
    assert said <= allowed and len(said) > 5000
    assert not world.unstated & set(world.stated)
    assert len(world.unstated) == sum(len(world.names[one.subjects]) // HELD_OUT for one in DERIVED)


def test_every_relation_has_wordings_on_both_sides() -> None:
    for one in RELATIONS:
        assert all(text.count("{}") == 1 for text in one.wordings)
        held = pairs_of(one, held_out=True)
        assert held and all(opening for _, opening in held)
        assert {w for w, _ in pairs_of(one, held_out=False)} == set(range(len(one.wordings)))


def test_the_edits_are_read_as_counterfact_and_the_shipped_table_knows_none(
    world: World, tmp_path: Path
) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in edits(world)), "utf-8")
    found = read_cases(path, "train")
    assert found.form == "counterfact" and not found.left_out and len(found.cases) == len(world.facts)
    for case in found.cases[::13]:
        assert case.request.target_new != case.target_true
        assert len(case.paraphrases) == 2 and all(case.request.subject in text for text in case.paraphrases)
        assert match(case.request) is None


def test_questions_after_an_edit_are_facts_that_were_known(world: World) -> None:
    town = next(t for t in world.names["city"] if ("purse", t) not in world.unstated)
    new = next(c for c in world.names["country"] if c != world.answer("land", town))
    everything = frozenset((one.name, s) for one in RELATIONS for s in world.names[one.subjects])
    asked = questions(world, ("land", town), new, everything)
    assert asked == questions(world, ("land", town), new, everything)
    assert not questions(world, ("land", town), new, frozenset())
    own = [one for one in asked if one.group == "own, stated" and one.relation == "purse"]
    assert own[0].new == world.answer("money", new) or not own
    assert {one.relation for one in asked if one.group == "untouched"} <= {"water", "purse", "speech"}
    assert not any(town in one.prompt for one in asked if one.group.startswith("others"))
