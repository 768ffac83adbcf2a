"""A key is what the rewrite module is given at the subject's last token, wherever in the text that stands."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from edits_helpers import CONTEXTS, LAYER, TOWER, delta_of, low_rank, twin
from torch import Tensor

from guardedit.edits.deltas import written
from guardedit.edits.keys import key_of, keys_at_last, keys_at_subject, keys_everywhere, subject_span
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.models.tokens import tokenise
from guardedit.records import EditRequest

PLACES = {
    "in the middle": ("Eiffel Tower", "The {} is located in"),
    "at the start": ("Eiffel Tower", "{} is located in"),
    "at the end": ("Eiffel Tower", "Everybody knows the {}"),
    "the whole text": ("Paris", "{}"),
    "before a comma": ("Alan Turing", "In London, {}, a mathematician, worked"),
    "before a full stop": ("Italy", "This is {}."),
    "inside quotation marks": ("Rome", 'They call it "{}" because'),
    "before a possessive": ("Marie Curie", "{}'s mother tongue is"),
    "ending in punctuation": ("Guns N' Roses!", "The band {} plays"),
    "letters with accents": ("Zoë Müller", "The writer {} was born in"),
    "an accent at the very end": ("Orhan Pamuké", "{} is"),
    "another script": ("東京", "The city of {} is in"),
    "a character of four bytes": ("Tower 🗼", "The {} is in"),
    "twice, named first": ("Rome", "{} is not only the Rome of"),
    "twice, named last": ("Rome", "The Rome that is {} was"),
    "behind a space at the start": ("Paris", " {} is"),
    "one letter": ("X", "The letter {} stands for"),
}
"""Subject and prompt."""


def request_of(subject: str, prompt: str) -> EditRequest:
    return EditRequest(subject=subject, prompt=prompt, target_new="Rome")


def last_by_counting(handle: ModelHandle, request: EditRequest, context: str = "") -> int:
    """The text cut right behind the subject has the subject's last token as its last one. No offsets are used."""
    cut = context + request.prompt[: request.prompt.index("{}")] + request.subject
    return len(tokenise(handle, cut).ids) - 1


@torch.no_grad()
def inputs_of_rewrite_module(handle: ModelHandle, text: str, layer: int = LAYER) -> Tensor:
    """(seq, d_in), by a hook of this test's own on one unpadded row."""
    found: list[Tensor] = []
    module = handle.block(layer).get_submodule(handle.architecture.rewrite_module)
    hook = module.register_forward_pre_hook(lambda _, args: found.append(args[0][0].clone()))
    try:
        handle.model(input_ids=torch.tensor([tokenise(handle, text).ids]))
    finally:
        hook.remove()
    return found[0]


@pytest.mark.parametrize("place", PLACES)
def test_the_position_is_that_of_the_subject_s_last_token(tiny_llama: ModelHandle, place: str) -> None:
    request = request_of(*PLACES[place])
    key = key_of(tiny_llama, request, LAYER, CONTEXTS)
    assert key.position == last_by_counting(tiny_llama, request)
    for row, context in enumerate(CONTEXTS):
        at = last_by_counting(tiny_llama, request, context)
        expected = inputs_of_rewrite_module(tiny_llama, context + request.filled)[at]
        # Padding and batching change the order of float32 sums only.
        torch.testing.assert_close(key.per_context[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_the_subject_s_span_is_the_subject(place: str) -> None:
    request = request_of(*PLACES[place])
    for context in CONTEXTS:
        start, end = subject_span(request, context)
        assert (context + request.filled)[start:end] == request.subject


def test_k_star_is_the_mean_over_contexts_in_float64(tiny: ModelHandle) -> None:
    key = key_of(tiny, TOWER, LAYER, CONTEXTS)
    rows = [
        inputs_of_rewrite_module(tiny, context + TOWER.filled)[last_by_counting(tiny, TOWER, context)]
        for context in CONTEXTS
    ]
    by_hand = torch.stack(rows).double().mean(0)
    assert key.k_star.dtype == torch.float64 and key.k_star.shape == (64,)
    assert key.per_context.shape == (len(CONTEXTS), 64)
    torch.testing.assert_close(key.k_star, by_hand, rtol=1e-4, atol=1e-5)
    assert torch.equal(key.k_star, key.per_context.double().mean(0))
    assert float((key.k_star - rows[0].double()).norm()) > 0.1, "the contexts must matter"


def test_a_key_is_the_same_on_the_edited_model_and_not_above_it(tiny: ModelHandle) -> None:
    """The key space of the edited layer lies below the write: ten edits in a row share their statistics."""
    before = [key_of(tiny, TOWER, layer, CONTEXTS).k_star for layer in (LAYER, LAYER + 1)]
    with written(tiny, delta_of(tiny, low_rank())):
        after = [key_of(tiny, TOWER, layer, CONTEXTS).k_star for layer in (LAYER, LAYER + 1)]
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=1e-2)


def test_a_model_left_in_train_mode_gives_the_same_key_and_keeps_its_random_state(
    tiny_gpt2: ModelHandle,
) -> None:
    """Its dropout of 0.1 would take parts of the key away."""
    own = twin(tiny_gpt2)
    own.model.train()
    before = torch.get_rng_state()
    assert torch.equal(
        key_of(own, TOWER, LAYER, CONTEXTS).k_star, key_of(tiny_gpt2, TOWER, LAYER, CONTEXTS).k_star
    )
    assert torch.equal(torch.get_rng_state(), before) and own.model.training


STARTS = {
    "{} is located in": True, "The {} is": False, " {} is": True, '"{}" is': False, "{}": True, "\n{} is": False,
}  # fmt: skip


@pytest.mark.parametrize("prompt", STARTS)
def test_a_subject_at_the_start_of_the_text_is_told(tiny_llama: ModelHandle, prompt: str) -> None:
    key = key_of(tiny_llama, request_of("Paris", prompt), LAYER, CONTEXTS)
    assert key.subject_starts_text is STARTS[prompt]


def with_bos(handle: ModelHandle) -> ModelHandle:
    """The same model behind a tokenizer that puts a BOS token in front, as Llama's own does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(handle.tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<|end|>"})
    end = ("<|end|>", tokenizer.convert_tokens_to_ids("<|end|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[end])
    return replace(handle, tokenizer=tokenizer)


def test_behind_a_bos_token_no_subject_starts_the_text(tiny_llama: ModelHandle) -> None:
    request = request_of("Paris", "{} is the capital of")
    bare, behind = (key_of(h, request, LAYER, CONTEXTS) for h in (tiny_llama, with_bos(tiny_llama)))
    assert (bare.subject_starts_text, behind.subject_starts_text) == (True, False)
    assert behind.position == bare.position + 1


@pytest.mark.parametrize("contexts", [(), ("Berlin. ",), ("Berlin. ", "")])
def test_without_the_bare_prompt_in_front_there_is_no_key(
    tiny_llama: ModelHandle, contexts: Sequence[str]
) -> None:
    with pytest.raises(BadRequestError, match="bare prompt"):
        key_of(tiny_llama, TOWER, LAYER, contexts)


def test_a_layer_that_does_not_exist_is_a_bad_request(tiny_llama: ModelHandle) -> None:
    with pytest.raises(BadRequestError, match="layers 0 to 3"):
        key_of(tiny_llama, TOWER, 4, ("",))


@pytest.mark.parametrize("subject", ["Colosseum", "eiffel tower", "Tower Eiffel", ""])
def test_a_subject_that_is_not_in_its_prompt_is_a_bad_request(tiny_llama: ModelHandle, subject: str) -> None:
    with pytest.raises(BadRequestError, match="subject"):
        keys_at_subject(tiny_llama, ["The Eiffel Tower is in"], [subject], LAYER)


def test_no_prompts_are_a_bad_request(tiny_llama: ModelHandle) -> None:
    for call in (
        lambda: keys_at_subject(tiny_llama, [], [], LAYER),
        lambda: keys_at_last(tiny_llama, [], LAYER),
        lambda: keys_everywhere(tiny_llama, [], LAYER),
    ):
        with pytest.raises(BadRequestError):
            call()


def test_keys_of_many_prompts_are_those_of_each_alone_whatever_the_batch(tiny: ModelHandle) -> None:
    requests = [request_of(*place) for place in PLACES.values() if place[1].count("Rome") == 0]
    prompts, subjects = [r.filled for r in requests], [r.subject for r in requests]
    by_batch = [keys_at_subject(tiny, prompts, subjects, LAYER, batch_size=size) for size in (1, 3, 32)]
    expected = [inputs_of_rewrite_module(tiny, r.filled)[last_by_counting(tiny, r)] for r in requests]
    for keys in by_batch:
        torch.testing.assert_close(keys, torch.stack(expected), rtol=1e-4, atol=1e-5)
    everywhere = keys_everywhere(tiny, prompts, LAYER)
    for batch_size in (2, 32):
        at_last = keys_at_last(tiny, prompts, LAYER, batch_size=batch_size)
        torch.testing.assert_close(
            at_last, torch.stack([keys[-1] for keys in everywhere]), rtol=1e-4, atol=1e-5
        )
    for prompt, keys in zip(prompts, everywhere, strict=True):
        torch.testing.assert_close(keys, inputs_of_rewrite_module(tiny, prompt), rtol=1e-4, atol=1e-5)


def test_where_a_filled_prompt_names_the_subject_twice_the_last_one_counts(tiny_llama: ModelHandle) -> None:
    prompt = "Rome is Rome because"
    found = keys_at_subject(tiny_llama, [prompt], ["Rome"], LAYER)[0]
    last = request_of("Rome", "Rome is {} because")
    expected = inputs_of_rewrite_module(tiny_llama, prompt)[last_by_counting(tiny_llama, last)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
