"""When a gate decides, what it holds through, and gates that read above their edits."""

from __future__ import annotations

import copy

import pytest
import torch
from activation_helpers import (
    ABOVE,
    ALWAYS,
    GATE,
    NEVER,
    PROMPTS,
    answers,
    by_hand,
    gate_at,
    gate_logit,
    logits_of,
    move_at,
    rows,
    separating,
    some_edit,
    under,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from guardedit.edits.activations import (
    ActivationChange,
    Everywhere,
    Gate,
    TokenMatch,
    deciding,
    installed,
)
from guardedit.edits.deltas import EditDelta, WeightChange, written
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import record, rewrite_hook
from guardedit.models.turns import ends_of, turn_marker

# -- decisions


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_generation_is_what_the_definition_says_however_it_is_run(
    tiny_llama: ModelHandle, data: st.DataObject
) -> None:
    """One edit against a loop over positions on single rows: batched, padded left, with and without a cache."""
    prompts = data.draw(st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=3, unique=True))
    ids = [tiny_llama.encode([p])["input_ids"][0].tolist() for p in prompts]
    seed = data.draw(st.integers(0, 11))
    gate = data.draw(st.sampled_from([None, GATE, "blocks.0.hook_mlp_out", "blocks.1.mlp.hook_post", ABOVE]))
    logit = (
        None if gate is None else gate_logit(tiny_llama, gate_at(gate, seed), data.draw(st.sampled_from(ids)))
    )
    shift = data.draw(st.sampled_from([-0.3, 0.3]))
    change = some_edit(seed, None if gate is None else gate_at(gate, seed, limit=(logit or 0.0) + shift))
    if isinstance(change.where, TokenMatch):
        sequences = ((ids[0][-1],), tuple(ids[0][:2]))
        change = ActivationChange(change.layer, change.action, TokenMatch(sequences), change.gate)
    expected = [by_hand(tiny_llama, change, one, 4) for one in ids]
    assume(min(margins.least for _, margins in expected) > 2e-3)
    batch = rows(tiny_llama, *ids, side="left")
    with under(tiny_llama, change):
        for cache in (True, False):
            assert answers(tiny_llama, batch, 4, use_cache=cache) == [tokens for tokens, _ in expected]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_several_edits_answer_alike_in_any_batch(tiny_llama: ModelHandle, data: st.DataObject) -> None:
    seeds = data.draw(st.lists(st.integers(0, 11), min_size=2, max_size=4, unique=True))
    edits = [some_edit(s, data.draw(st.sampled_from(gates(s)))) for s in seeds]
    batch = {side: tiny_llama.encode(list(PROMPTS[:4]), side) for side in ("left", "right")}
    with under(tiny_llama, *edits):
        alone = [logits_of(tiny_llama, tiny_llama.encode([p]))[0] for p in PROMPTS[:4]]
        for side, one in batch.items():
            found = logits_in_place(tiny_llama, one)
            for row, expected in enumerate(alone):
                real = one["attention_mask"][row].bool()
                assert close(found[row][real], expected), side


def gates(seed: int) -> list[Gate | None]:
    """None, one below all edits, one above them."""
    return [None, gate_at(GATE, seed, limit=0.5), gate_at("blocks.3.hook_resid_post", seed, limit=0.5)]


def logits_in_place(handle: ModelHandle, batch: dict[str, Tensor]) -> Tensor:
    """Logits with positions counted from each row's first real token, as `generate` has them."""
    with torch.no_grad():
        return handle.logits_at(
            handle.hidden(batch["input_ids"], batch["attention_mask"]),
            torch.ones_like(batch["attention_mask"], dtype=torch.bool),
        ).view(*batch["input_ids"].shape, -1)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool(torch.allclose(found, expected, rtol=1e-3, atol=2e-3))


def test_a_prompt_of_one_token_decides(tiny_llama: ModelHandle) -> None:
    """It looks like a step of a generation, and is a question."""
    for number in range(5, 60):
        gate = gate_at(GATE, 4)
        loud, quiet = gate_logit(tiny_llama, gate, [number]), gate_logit(tiny_llama, gate, [number + 1])
        if loud > quiet + 0.5:
            break
    change = ActivationChange(2, move_at(), gate=gate_at(GATE, 4, limit=(loud + quiet) / 2))
    expected = [by_hand(tiny_llama, change, [one], 4)[0] for one in (number, number + 1)]
    plain = answers(tiny_llama, rows(tiny_llama, [number], [number + 1]), 4)
    with under(tiny_llama, change):
        for cache in (True, False):
            batch = rows(tiny_llama, [number], [number + 1])
            assert answers(tiny_llama, batch, 4, use_cache=cache) == expected
            assert answers(tiny_llama, rows(tiny_llama, [number]), 4, use_cache=cache) == expected[:1]
    assert expected[1] == plain[1]


@pytest.mark.parametrize("hook", [GATE, ABOVE])
@pytest.mark.parametrize("settings_", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_follow_the_decision_of_their_prompt(
    tiny: ModelHandle, settings_: dict[str, int], hook: str
) -> None:
    ids = [tiny.encode([p])["input_ids"][0].tolist() for p in (PROMPTS[0], PROMPTS[2], PROMPTS[1])]
    change = separating(tiny, ids[0], ids[1], hook)
    n = settings_.get("num_return_sequences", 1)
    plain = [answers(tiny, rows(tiny, one), **settings_) for one in ids]
    with under(tiny, change):
        alone = [answers(tiny, rows(tiny, one), **settings_) for one in ids]
        together = {
            cache: answers(tiny, rows(tiny, *ids, side="left"), **settings_, use_cache=cache)
            for cache in (True, False)
        }
    for found in together.values():
        assert [found[at * n : (at + 1) * n] for at in range(3)] == alone
    assert alone[1] == plain[1], "a silent gate changes no beam"


@pytest.mark.parametrize("hook", [GATE, ABOVE])
def test_samples_of_one_prompt_share_its_decision(tiny_llama: ModelHandle, hook: str) -> None:
    first, second = (tiny_llama.encode([p])["input_ids"][0].tolist() for p in (PROMPTS[0], PROMPTS[2]))
    change = separating(tiny_llama, first, second, hook)
    batch, found = rows(tiny_llama, first, second, side="left"), {}
    with under(tiny_llama, change):
        for cache in (True, False):
            torch.manual_seed(0)
            found[cache] = answers(tiny_llama, batch, do_sample=True, num_return_sequences=3, use_cache=cache)
    torch.manual_seed(0)
    plain = answers(tiny_llama, batch, do_sample=True, num_return_sequences=3)
    assert found[True] == found[False] and found[True][3:] == plain[3:] and found[True][:3] != plain[:3]


def test_a_target_behind_the_prompt_does_not_decide(tiny: ModelHandle) -> None:
    """As in generation: scored after its prompt, a target is read under the prompt's own decision."""
    prompt, target = PROMPTS[2], PROMPTS[4]
    whole = tiny.encode_pairs([prompt], [target])
    ids = whole["input_ids"][0].tolist()
    start = int(whole["target_mask"][0].nonzero()[0])
    change = next(c for c in (separating_tail(tiny, ids, start, seed) for seed in range(60)) if c is not None)
    before = tiny.token_logprobs([prompt], [target])[0]
    with under(tiny, change):
        assert torch.equal(tiny.token_logprobs([prompt], [target])[0], before)
        everything = logits_of(tiny, whole)
        with deciding(tiny, ~whole["target_mask"]):
            held = logits_of(tiny, whole)
        with deciding(tiny, torch.ones(1, 3, dtype=torch.bool)):
            assert torch.equal(logits_of(tiny, whole), everything), (
                "a mask of another shape is not this pass's"
            )
    assert not torch.equal(everything, held) and torch.equal(held, logits_of(tiny, whole))


def separating_tail(handle: ModelHandle, ids: list[int], start: int, seed: int) -> ActivationChange | None:
    """An edit that fires in the row, and not in its beginning."""
    gate = gate_at(GATE, seed)
    low, high = gate_logit(handle, gate, ids[:start]), gate_logit(handle, gate, ids)
    found = gate_at(GATE, seed, limit=(low + high) / 2)
    return ActivationChange(2, move_at(), Everywhere(), found) if high > low + 0.3 else None


def test_a_cache_holds_the_decision_and_a_longer_pass_decides_anew(tiny_llama: ModelHandle) -> None:
    first, second = (tiny_llama.encode([p])["input_ids"][0].tolist() for p in (PROMPTS[0], PROMPTS[2]))
    # Token embeddings: what the gate reads does not depend on what stands before.
    change = separating(tiny_llama, first, second, "blocks.0.hook_resid_pre")
    loud, quiet = torch.tensor([first]), torch.tensor([second])
    with torch.no_grad(), under(tiny_llama, change):
        after_loud, after_quiet = (
            tiny_llama.model(input_ids=ids, use_cache=True).past_key_values for ids in (loud, quiet)
        )
    one = torch.tensor([[second[0]]])
    assert moved_in(tiny_llama, change, one, after_loud) == [True]
    assert moved_in(tiny_llama, change, one, after_quiet) == [False]
    # Several tokens behind a cache are a new question.
    assert all(moved_in(tiny_llama, change, loud, after_quiet))
    assert not any(moved_in(tiny_llama, change, quiet, after_loud))


def test_a_cache_that_was_filled_before_the_edit_is_silent(tiny_llama: ModelHandle) -> None:
    ids = tiny_llama.encode([PROMPTS[0]])["input_ids"]
    with torch.no_grad():
        cache = tiny_llama.model(input_ids=ids, use_cache=True).past_key_values
        plain = tiny_llama.model(input_ids=ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
        with under(tiny_llama, ActivationChange(2, move_at(), gate=gate_at(GATE, limit=ALWAYS))):
            found = tiny_llama.model(input_ids=ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(found, plain)


def test_each_turn_of_a_talk_decides_for_itself(tiny_llama: ModelHandle) -> None:
    """Behind a marker a new segment begins; behind a cache, what stands before it keeps the held decision."""
    marker = turn_marker(tiny_llama.tokenizer)
    first, second = (tiny_llama.encode([p])["input_ids"][0].tolist() for p in (PROMPTS[0], PROMPTS[2]))
    change = separating(tiny_llama, first, second, "blocks.0.hook_resid_pre")
    talk = [*first, *marker, *second, *marker, *first]
    turns = [True] * (len(first) + 1) + [False] * (len(second) + 1) + [True] * len(first)
    ids = torch.tensor([talk])
    assert moved_in(tiny_llama, change, ids) == turns
    tail = torch.tensor([[first[0], *marker, *second]])
    with torch.no_grad(), under(tiny_llama, change):
        cache = tiny_llama.model(input_ids=torch.tensor([first]), use_cache=True).past_key_values
    assert moved_in(tiny_llama, change, tail, cache) == [True] * (1 + len(marker)) + [False] * len(second)


def moved_in(handle: ModelHandle, change: ActivationChange, ids: Tensor, cache: object = None) -> list[bool]:
    """Positions that the edit moves in one pass."""
    seen = []
    for edits in ((), (change,)):
        with torch.no_grad(), under(handle, *edits), record(handle, [rewrite_hook(change.layer)]) as now:
            handle.model(input_ids=ids, past_key_values=copy.deepcopy(cache), use_cache=cache is not None)
        seen.append(now[rewrite_hook(change.layer)][0])
    return [bool(one) for one in (seen[0] != seen[1]).any(-1)]


def test_the_marker_is_what_a_template_puts_before_a_users_turn(tiny_llama: ModelHandle) -> None:
    assert turn_marker(tiny_llama.tokenizer) == (tiny_llama.tokenizer.convert_tokens_to_ids("<|user|>"),)
    bare = copy.deepcopy(tiny_llama.tokenizer)
    bare.chat_template = None
    assert turn_marker(bare) == ()
    bare.chat_template = "{{ raise_exception('no roles') }}"
    assert turn_marker(bare) == ()


def test_ends_of_sequences_are_their_last_tokens() -> None:
    ids = torch.tensor([[5, 6, 5, 6, 7], [-1, -1, 6, 7, 5]])
    found = ends_of(ids, ((5, 6), (7,), (9, 9, 9, 9, 9, 9)))
    assert found.tolist() == [[False, True, False, True, True], [False, False, False, True, False]]


def test_a_call_that_hides_its_tokens_or_its_padding_is_refused(tiny_llama: ModelHandle) -> None:
    batch = tiny_llama.encode([PROMPTS[0]])
    embedded = tiny_llama.model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad(), under(tiny_llama, some_edit(0, gate_at(GATE))):
        with pytest.raises(BadRequestError, match="input_ids"):
            tiny_llama.model(inputs_embeds=embedded)
        with pytest.raises(BadRequestError, match="attention_mask"):
            tiny_llama.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"][None, None])
    assert not installed(tiny_llama)


# -- gates above their edits


def test_a_gate_above_its_edit_reads_the_prompt_as_the_unedited_model_does(tiny: ModelHandle) -> None:
    """Bit for bit what the edit's own gate at the same place says of a model without it, and no bit where silent."""
    first, second = (tiny.encode([p])["input_ids"][0].tolist() for p in (PROMPTS[0], PROMPTS[2]))
    change, names = separating(tiny, first, second, ABOVE), [ABOVE, rewrite_hook(2)]
    assert change.looks_ahead is not None and change.looks_ahead not in change.looks_at
    always = ActivationChange(2, change.action)
    for ids, fires in ((first, True), (second, False)):
        batch = rows(tiny, ids)
        before = logits_of(tiny, batch)
        with under(tiny, always):
            moved = logits_of(tiny, batch)
        with under(tiny, change), record(tiny, names) as seen:
            assert torch.equal(logits_of(tiny, batch), moved if fires else before)
        assert tuple(seen[ABOVE].shape[:2]) == batch["input_ids"].shape
    assert not torch.equal(moved, before)


def test_reading_ahead_sees_the_weights_as_they_are_and_leaves_the_cache_alone(
    tiny_llama: ModelHandle,
) -> None:
    first, second = (tiny_llama.encode([p])["input_ids"][0].tolist() for p in (PROMPTS[0], PROMPTS[2]))
    change = separating(tiny_llama, first, second, ABOVE)
    ids, more = torch.tensor([first]), torch.tensor([second])
    silent = ActivationChange(2, change.action, gate=gate_at(ABOVE, limit=NEVER))
    with torch.no_grad():
        plain = tiny_llama.model(input_ids=ids, use_cache=True).past_key_values
        expected = tiny_llama.model(input_ids=more, past_key_values=plain, use_cache=True).logits
        with under(tiny_llama, silent):
            cache = tiny_llama.model(input_ids=ids, use_cache=True).past_key_values
            found = tiny_llama.model(input_ids=more, past_key_values=cache, use_cache=True).logits
    assert torch.equal(found, expected) and cache.get_seq_length() == plain.get_seq_length()
    weights = EditDelta(
        (WeightChange(tiny_llama.rewrite_parameter(1), 1, move_at(1, 9, 5.0).update),), "x", {}, {}
    )
    assert moved_in(tiny_llama, change, ids) == [True] * len(first)
    with written(tiny_llama, weights):
        logit = gate_logit(tiny_llama, change.gate, first)  # type: ignore[arg-type]
        fires = logit >= change.gate.limit  # type: ignore[union-attr]
        assert moved_in(tiny_llama, change, ids) == [fires] * len(first)
    assert abs(logit - gate_logit(tiny_llama, change.gate, first)) > 1e-3  # type: ignore[arg-type]
