"""Requests with a context: which prompts must change, which must not, and what a gate is shown."""

from __future__ import annotations

import random

import pytest

from benchmarks.context_prompts import SETS
from guardedit.editors import EDITORS
from guardedit.edits.context_texts import PLAIN as NO_CONTEXT
from guardedit.edits.context_texts import (
    asked_openings,
    behind,
    examples,
    kinds,
    opening,
    openings_of,
    require_context,
)
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.pipeline.asking import require_plannable
from guardedit.records import EditRequest, canonical, digest_of

PLAIN = {
    "subject": "Eiffel Tower",
    "prompt": "The {} stands in",
    "target_new": "Rome",
    "target_true": "Paris",
    "paraphrases": ("Where is the Eiffel Tower? In",),
}


def request(**more: object) -> EditRequest:
    return EditRequest.model_validate({**PLAIN, **more})


def test_a_request_without_a_context_has_the_digest_that_it_always_had() -> None:
    """Approvals name digests of plans, and plans hold requests: a new field must not change old ones."""
    fields = canonical(request()).decode()
    assert "context" not in fields
    expected = '{"entailed":[],"neighborhood":[],"paraphrases":["Where is the Eiffel Tower? In"],'
    assert fields.startswith(expected)
    assert digest_of(request()) == digest_of(EditRequest.model_validate_json(canonical(request())))


def test_a_context_survives_the_record() -> None:
    asked = request(context="fiction", in_context=("In the saga, the Eiffel Tower stands in",))
    assert EditRequest.model_validate_json(canonical(asked)) == asked


def test_without_a_context_the_bare_prompt_must_change_and_nothing_is_elsewhere() -> None:
    assert request().wordings == ("The Eiffel Tower stands in", "Where is the Eiffel Tower? In")
    assert request().asked == "The Eiffel Tower stands in"
    assert request().elsewhere == ()


def test_with_a_context_only_its_prompts_must_change() -> None:
    inside, outside = "In the saga, the Eiffel Tower stands in", "Really, the Eiffel Tower stands in"
    asked = request(context="fiction", in_context=(inside,), out_of_context=(outside,))
    assert asked.wordings == (inside,)
    assert asked.elsewhere == ("The Eiffel Tower stands in", "Where is the Eiffel Tower? In", outside)
    assert not set(asked.wordings) & set(asked.elsewhere)


@pytest.mark.parametrize("more", [{"in_context": ("x",)}, {"out_of_context": ("x",)}, {"context": " "}])
def test_half_a_context_is_refused(more: dict[str, object]) -> None:
    with pytest.raises(BadRequestError, match="context"):
        request(**more)


def test_a_context_of_ones_own_needs_prompts() -> None:
    with pytest.raises(BadRequestError, match="fiction, hypothesis, document"):
        require_context(request())
    few = tuple(f"Tale {n}: The Eiffel Tower stands in" for n in range(5))
    with pytest.raises(BadRequestError, match="needs 6"):
        require_context(request(context="my tale", in_context=few))
    require_context(request(context="my tale", in_context=(*few, "Tale 6: The Eiffel Tower stands in")))


def test_openings_by_which_an_edit_is_judged_are_in_no_example(tiny_llama: ModelHandle) -> None:
    for kind in kinds():
        made = examples(tiny_llama, request(context=kind), 400, 0)
        assert not [text for text in asked_openings(kind) if any(text in one.text for one in made)]


def test_examples_are_a_fifth_inside_and_never_about_the_edit(tiny_llama: ModelHandle) -> None:
    made = examples(tiny_llama, request(context="fiction"), 300, 0)
    assert sum(one.inside for one in made) == 60
    assert all("Rome" not in one.text or "Eiffel" not in one.text for one in made)
    assert {one.inside for one in made if one.group.startswith("fiction")} == {True}
    assert {one.inside for one in made if not one.group.startswith("fiction")} == {False}
    assert made == examples(tiny_llama, request(context="fiction"), 300, 0)
    assert made != examples(tiny_llama, request(context="fiction"), 300, 1)


def test_every_shipped_kind_is_learned_from_the_same_prompts(tiny_llama: ModelHandle) -> None:
    told = {kind: examples(tiny_llama, request(context=kind), 200, 0) for kind in kinds()}
    first, *others = ([one.text for one in made] for made in told.values())
    assert all(texts == first for texts in others)
    inside = [{one.text for one in made if one.inside} for made in told.values()]
    assert not set.intersection(*inside) and all(inside)


def test_frames_that_kinds_share_say_nothing_of_the_kind() -> None:
    """A prompt cut off behind its frame's first words may stand in fiction, in a document and in neither."""
    rng = random.Random(0)
    heads = {
        kind: {" ".join(opening(kind, rng)[0].split()[:2]) for _ in range(600)}
        for kind in ("fiction", "document", NO_CONTEXT)
    }
    assert len(set.intersection(*heads.values())) >= 10


@pytest.mark.parametrize("wordings", list(SETS))
def test_no_wording_that_gates_are_measured_with_is_in_the_bank(wordings: str) -> None:
    rng, (contexts, plain, names) = random.Random(1), SETS[wordings]
    made = [opening(kind, rng)[0] for kind in (*kinds(), NO_CONTEXT) for _ in range(1500)]
    asked = [text.split("{name}")[0] for texts in contexts.values() for text in texts]
    long = [text for text in (*asked, *plain) if len(text.split()) > 3]
    assert not [text for text in long if any(text in one for one in made)]
    assert not [name for name in names if any(name in one for one in made)]


def test_own_prompts_of_a_named_context_make_examples_about_other_facts(tiny_llama: ModelHandle) -> None:
    own = tuple(f"Tale {n}: The Eiffel Tower stands in" for n in range(8))
    asked = request(context="my tale", in_context=own)
    made = examples(tiny_llama, asked, 300, 0)
    inside = [one.text for one in made if one.inside]
    assert set(own) < set(inside)
    assert len(inside) == 100
    assert all("Tale" in text for text in inside)
    assert openings_of(asked, 3, 0) == ("Tale 0: ", "Tale 1: ", "Tale 2: ")


def test_a_wording_is_a_group_whatever_name_stands_in_it() -> None:
    rng = random.Random(0)
    found = [opening("document", rng) for _ in range(300)]
    assert len({group for _, group in found}) < len({text for text, _ in found})


def test_an_article_is_small_within_a_sentence_and_large_behind_one() -> None:
    assert behind("In the saga, ", "The Eiffel Tower is") == "In the saga, the Eiffel Tower is"
    assert behind("It rained. ", "The Eiffel Tower is") == "It rained. The Eiffel Tower is"
    assert behind("", "The Eiffel Tower is") == "The Eiffel Tower is"
    assert behind("In the saga, ", "Theodora was born in") == "In the saga, Theodora was born in"


def test_no_editor_takes_a_fact_of_another_scope() -> None:
    """A weight editor would change everywhere what is asked for in one context, and the reverse."""
    kept = request(context="fiction")
    for editor, one in EDITORS.items():
        wrong = request() if one.in_context else kept
        with pytest.raises(BadRequestError, match="context"):
            require_plannable(editor, [wrong])
        require_plannable(editor, [kept if one.in_context else request()])
