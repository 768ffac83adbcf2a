"""Requests that cannot be solved together are refused by name; all others are let through."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
from closed_form_helpers import FACTS
from edits_helpers import CONTEXTS, LAYER, gaussian

from guardedit.edits.batches import require_consistent, require_distinct_keys
from guardedit.edits.keys import keys_of
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest


def fact(subject: str, prompt: str, target: str) -> EditRequest:
    return EditRequest(subject=subject, prompt=prompt, target_new=target)


def test_two_targets_for_one_question_are_a_contradiction_that_names_both() -> None:
    with pytest.raises(BadRequestError) as raised:
        require_consistent([*FACTS, fact("Italy", "The capital of {} is", "London")])
    said = str(raised.value)
    assert "request 2 ('The capital of Italy is' -> 'Paris')" in said
    assert "request 5 ('The capital of Italy is' -> 'London')" in said
    assert "contradict" in said and "keep one" in said


@pytest.mark.parametrize("target", ["Paris", " Paris"])
@pytest.mark.parametrize(
    "subject, prompt", [("Italy", "The capital of {} is"), ("capital", "The  {} of Italy is")]
)
def test_a_repeated_question_is_named_however_it_is_cut_and_spaced(
    subject: str, prompt: str, target: str
) -> None:
    with pytest.raises(BadRequestError, match=r"request 5 .* repeats request 2 .*leave one"):
        require_consistent([*FACTS, fact(subject, prompt, target)])


def test_the_same_target_or_the_same_subject_elsewhere_is_no_contradiction() -> None:
    require_consistent(
        [*FACTS, fact("Italy", "A city in {} is", "Rome"), fact("Spain", "The capital of {} is", "Paris")]
    )


def test_no_requests_are_a_bad_request() -> None:
    with pytest.raises(BadRequestError, match="no request"):
        require_consistent([])


def test_one_key_cannot_be_given_two_values(tiny: ModelHandle) -> None:
    """What stands behind the subject does not reach its key: attention is causal."""
    twice = [*FACTS, fact("Marie Curie", "{} worked in", "Rome")]
    with pytest.raises(BadRequestError, match=r"request 3 .* request 5 .*layer 1 sees one key"):
        require_distinct_keys(twice, keys_of(tiny, twice, LAYER, CONTEXTS), LAYER)


@pytest.mark.parametrize("noise, same", [(1e-6, True), (1e-2, False)])
def test_rounding_does_not_make_two_keys_of_one(tiny_llama: ModelHandle, noise: float, same: bool) -> None:
    """Rows of another length are padded otherwise, and float32 rounds otherwise."""
    pair = (fact("Marie Curie", "{} worked in", "Rome"), FACTS[2])
    first, second = keys_of(tiny_llama, pair, LAYER, CONTEXTS)
    second = replace(second, k_star=first.k_star * (1 + noise * gaussian(64)))
    with pytest.raises(BadRequestError, match="sees one key") if same else nullcontext():
        require_distinct_keys(pair, [first, second], LAYER)


def test_the_same_subject_behind_other_words_is_another_key(tiny: ModelHandle) -> None:
    twice = [*FACTS, fact("Marie Curie", "The mother tongue of {} is", "French")]
    require_distinct_keys(twice, keys_of(tiny, twice, LAYER, CONTEXTS), LAYER)
