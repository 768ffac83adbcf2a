"""Activation edits: what decides, what is moved, what keeps its bits, and that all of it can be taken away again."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from activation_helpers import (
    KEY,
    PROMPTS,
    D,
    answers,
    by_hand,
    draw,
    gate_at,
    gate_logit,
    logits_of,
    move_at,
    some_edit,
)
from conftest import _trace
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from guardedit.edits.activations import (
    ActivationChange,
    Everywhere,
    Gate,
    KeyMatch,
    Move,
    Push,
    TokenMatch,
    deciding,
    install,
    installed,
    uninstall,
)
from guardedit.edits.deltas import EditDelta, WeightChange, written
from guardedit.edits.updates import LowRank
from guardedit.errors import BadRequestError, IntegrityError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import patch, record, resume, rewrite_hook
from guardedit.models.suffix import split_rows
from guardedit.models.tokens import Tokens, pad
from guardedit.models.turns import ends_of, turn_marker

ALWAYS, NEVER = -1e6, 1e6
GATE = "blocks.1.hook_resid_post"
ABOVE = "blocks.3.mlp.hook_post"
"""Above every edit that is made here with a gate of its own layer: read in a pass before."""


@contextmanager
def under(handle: ModelHandle, *changes: ActivationChange) -> Iterator[None]:
    """The edits in force."""
    with ExitStack() as stack:
        for change in changes:
            install(handle, change)
            stack.callback(uninstall, handle, change.parameter)
        yield


def rows(handle: ModelHandle, *ids: list[int], side: str = "right") -> dict[str, Tensor]:
    """A padded batch of token rows."""
    return pad(handle, [Tokens(one, [(0, 0)] * len(one)) for one in ids], side)


def separating(
    handle: ModelHandle, first: list[int], second: list[int], hook: str = GATE
) -> ActivationChange:
    """An edit whose gate fires in the first row and not in the second."""
    for seed in range(40):
        gate = gate_at(hook, seed)
        high, low = gate_logit(handle, gate, first), gate_logit(handle, gate, second)
        if high > low + 0.5:
            found = gate_at(hook, seed, limit=(high + low) / 2)
            return ActivationChange(2, move_at(), Everywhere(), found)
    raise AssertionError("no gate tells the two rows apart")


# -- bytes


@pytest.mark.parametrize("seed", range(4))
def test_an_edit_comes_back_from_its_bytes_and_is_named_by_them(seed: int) -> None:
    change = some_edit(seed, gate_at(GATE))
    data = change.to_bytes()
    again = ActivationChange.from_bytes(data)
    assert again.to_bytes() == data == some_edit(seed, gate_at(GATE)).to_bytes()
    assert again.parameter == change.parameter and change.parameter.startswith("activation.1.")
    assert (again.layer, again.label, again.acts_at, again.looks_at) == (
        change.layer, change.label, change.acts_at, change.looks_at,
    )  # fmt: skip
    # What was read is written anew, not handed on.
    fresh = ActivationChange(again.layer, again.action, again.where, again.gate, again.label)
    assert fresh.to_bytes() == data


def test_any_difference_is_another_name() -> None:
    names = {some_edit(0).parameter, some_edit(4).parameter, some_edit(0, gate_at(GATE)).parameter}
    names.add(some_edit(0, gate_at(GATE, limit=0.25)).parameter)
    names.add(ActivationChange(1, some_edit(0).action, some_edit(0).where, None, "another label").parameter)
    assert len(names) == 5


def test_bytes_that_are_no_edit_are_refused() -> None:
    data = some_edit(0, gate_at(GATE)).to_bytes()
    at = data.index(b'"kind":"move"')
    broken = (
        b"", b"nothing", data[:-1], data + b"x", data.replace(b'"format":1', b'"format":2'),
        data.replace(b'"least"', b'"lease"'), data[:at] + b'"kind":"mope"' + data[at + 13 :],
        data.replace(b'"layer":2', b'"layer":x'),
    )  # fmt: skip
    for one in broken:
        assert one != data
        with pytest.raises(IntegrityError):
            ActivationChange.from_bytes(one)


def test_edits_that_cannot_be_are_refused_with_what_is_allowed() -> None:
    nan = draw(D, seed=0)
    nan[3] = float("nan")
    keys = KeyMatch(draw(KEY, seed=0), 0.0)
    for make, words in (
        (lambda: ActivationChange(2, Push("blocks.3.hook_mlp_out", draw(D, seed=1))), "name that layer"),
        (lambda: ActivationChange(2, Push("blocks.2.hook_attn_out", draw(D, seed=1)), keys), "later"),
        (lambda: ActivationChange(2, move_at(), KeyMatch(draw(D, seed=1), 0.0)), "keys of 32 entries"),
        (lambda: ActivationChange(-1, move_at()), "layer's number"),
        (lambda: Push(GATE, nan), "not finite"),
        (lambda: Push(GATE, draw(2, D, seed=0)), "shape"),
        (lambda: KeyMatch(draw(KEY, seed=0), float("inf")), "finite number"),
        (lambda: TokenMatch(()), "non-empty"),
        (lambda: TokenMatch(((),)), "non-empty"),
        (lambda: Move(LowRank(draw(D, 1, seed=0), draw(2, KEY, seed=0))), "columns"),
        (lambda: gate_at(GATE, limit=float("nan")), "limit"),
    ):  # fmt: skip
        with pytest.raises(BadRequestError, match=words):
            make()


def test_an_edit_of_another_model_is_refused_and_leaves_no_trace(tiny_llama: ModelHandle) -> None:
    wide = ActivationChange(2, Push("blocks.2.hook_resid_post", draw(48, seed=0)))
    with pytest.raises(BadRequestError, match="48 entries"):
        install(tiny_llama, wide)
    with pytest.raises(BadRequestError, match="layers 0 to 3"):
        install(tiny_llama, ActivationChange(9, move_at()))
    with pytest.raises(BadRequestError, match="not installed"):
        uninstall(tiny_llama, "activation.1.0123456789abcdef")
    with under(tiny_llama, some_edit(0)), pytest.raises(BadRequestError, match="already"):
        install(tiny_llama, some_edit(0))


# -- acting


def test_an_update_everywhere_is_what_the_same_update_in_the_weights_is(tiny: ModelHandle) -> None:
    update, batch = move_at().update, tiny.encode(list(PROMPTS))
    real = batch["attention_mask"].bool()
    delta = EditDelta((WeightChange(tiny.rewrite_parameter(2), 2, update),), "test", {}, {})
    before = logits_of(tiny, batch)
    with written(tiny, delta):
        expected = logits_of(tiny, batch)
    with under(tiny, ActivationChange(2, Move(update))):
        found = logits_of(tiny, batch)
    assert float((expected - before)[real].abs().max()) > 0.05
    torch.testing.assert_close(found[real], expected[real], rtol=1e-3, atol=1e-3)


def test_a_silent_gate_hands_on_the_same_object_and_keeps_every_bit(tiny: ModelHandle) -> None:
    batch, before = tiny.encode(list(PROMPTS)), logits_of(tiny, tiny.encode(list(PROMPTS)))
    change = ActivationChange(2, move_at(), Everywhere(), gate_at(GATE, limit=NEVER))
    own: list[Tensor] = []
    module = tiny.block(2).get_submodule(tiny.architecture.rewrite_module)
    # In front of all others: what the module itself puts out.
    with under(tiny, change), record(tiny, [rewrite_hook(2)], detach=False) as seen:
        first = module.register_forward_hook(lambda _, __, out: own.append(out), prepend=True)
        try:
            assert torch.equal(logits_of(tiny, batch), before)
        finally:
            first.remove()
        assert seen[rewrite_hook(2)] is own[0] or seen[rewrite_hook(2)].data_ptr() == own[0].data_ptr()


def test_only_picked_positions_of_rows_whose_gate_fires_are_moved(tiny: ModelHandle) -> None:
    first, second = (tiny.encode([p])["input_ids"][0].tolist() for p in (PROMPTS[0], PROMPTS[2]))
    change = separating(tiny, first, second)
    token = first[3]
    change = ActivationChange(2, change.action, TokenMatch(((token,),)), change.gate)
    batch = rows(tiny, first, [*second, token])
    with record(tiny, [rewrite_hook(2)]) as before:
        logits_of(tiny, batch)
    with under(tiny, change), record(tiny, [rewrite_hook(2)]) as after:
        logits_of(tiny, batch)
    moved = (before[rewrite_hook(2)] != after[rewrite_hook(2)]).any(-1)
    expected = torch.zeros_like(moved)
    expected[0] = batch["input_ids"][0] == token
    # The second row holds the token too, and its gate may still be silent: see what decides.
    if gate_logit(tiny, change.gate, [*second, token]) >= change.gate.limit:
        expected[1] = batch["input_ids"][1] == token
    assert torch.equal(moved, expected & batch["attention_mask"].bool()) and bool(moved[0].any())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_neither_decides_nor_is_moved(tiny: ModelHandle, side: str) -> None:
    """The pad token is one that the rule looks for, and the gate fires wherever it may."""
    change = ActivationChange(2, move_at(), TokenMatch(((1,),)), gate_at(GATE, limit=ALWAYS))
    short, long = (
        tiny.encode(["Rome"])["input_ids"][0].tolist(),
        tiny.encode([PROMPTS[0]])["input_ids"][0].tolist(),
    )
    batch = rows(tiny, short, long, side=side)
    assert bool((batch["input_ids"] == 1).any())
    before = logits_of(tiny, batch)
    with under(tiny, change):
        assert torch.equal(logits_of(tiny, batch), before)
    everywhere = ActivationChange(2, move_at())
    with record(tiny, [rewrite_hook(2)]) as seen:
        logits_of(tiny, batch)
    with under(tiny, everywhere), record(tiny, [rewrite_hook(2)]) as after:
        logits_of(tiny, batch)
    moved = (seen[rewrite_hook(2)] != after[rewrite_hook(2)]).any(-1)
    assert torch.equal(moved, batch["attention_mask"].bool())


def test_every_edit_works_in_every_family(every_family: ModelHandle) -> None:
    """Transposed weights, tuples from blocks, norms behind the MLP: the edit acts, and goes without a trace."""
    batch = every_family.encode(list(PROMPTS[:2]))
    before, entered, keys = (
        logits_of(every_family, batch),
        "blocks.2.hook_resid_pre",
        "blocks.0.mlp.hook_post",
    )
    for change in (
        ActivationChange(2, move_at(), KeyMatch(draw(KEY, seed=3), -1e6), gate_at(GATE, limit=ALWAYS)),
        ActivationChange(1, Push("blocks.1.hook_attn_out", draw(D, seed=4))),
        ActivationChange(2, Push(entered, draw(D, seed=5)), gate=gate_at(entered, limit=ALWAYS)),
        ActivationChange(3, Push("blocks.3.hook_mlp_out", draw(D, seed=6)), gate=gate_at(keys, limit=ALWAYS)),
        ActivationChange(1, move_at(1), gate=gate_at("blocks.3.hook_resid_post", limit=ALWAYS)),
        ActivationChange(0, move_at(0), gate=gate_at("blocks.2.mlp.hook_post", limit=ALWAYS)),
    ):  # fmt: skip
        with under(every_family, change):
            assert not torch.equal(logits_of(every_family, batch), before), change.acts_at
        assert torch.equal(logits_of(every_family, batch), before)


# -- several edits, and taking them away


def test_the_order_of_installing_does_not_matter_and_removing_one_leaves_the_others(
    tiny: ModelHandle,
) -> None:
    edits = [
        some_edit(1), some_edit(3, gate_at(GATE, limit=ALWAYS)), some_edit(0),
        ActivationChange(2, Push("blocks.2.hook_resid_post", draw(D, seed=21), 1.3)),
        ActivationChange(2, Push("blocks.2.hook_resid_post", draw(D, seed=22), 0.7)),
        ActivationChange(3, move_at(3), gate=gate_at("blocks.2.hook_resid_post", 3, limit=ALWAYS)),
        ActivationChange(1, move_at(1), gate=gate_at(ABOVE, 3, limit=ALWAYS)),
        ActivationChange(1, move_at(1, 4), gate=gate_at("blocks.2.hook_attn_out", 3, limit=ALWAYS)),
    ]  # fmt: skip
    batch, trace = tiny.encode(list(PROMPTS)), _trace(tiny)
    with under(tiny, *edits):
        together = logits_of(tiny, batch)
        assert list(installed(tiny)) == sorted(edit.parameter for edit in edits)
    with under(tiny, *edits[::-1]):
        assert torch.equal(logits_of(tiny, batch), together)
    with under(tiny, *edits[:3], *edits[4:]):
        without = logits_of(tiny, batch)
    with under(tiny, *edits):
        uninstall(tiny, edits[3].parameter)
        assert torch.equal(logits_of(tiny, batch), without) and not torch.equal(without, together)
        install(tiny, edits[3])
    assert _trace(tiny) == trace and "generate" not in vars(tiny.model) and not installed(tiny)


def test_a_digest_tells_installed_edits_and_their_taking_away(tiny: ModelHandle) -> None:
    change, before = some_edit(0, gate_at(GATE)), tiny.manifest()
    below, behind = "blocks.2.mlp.hook_post", "blocks.2.hook_mlp_out"
    found = {hook: tiny.hook_digest(hook) for hook in (below, behind)}
    with under(tiny, change):
        inside = tiny.manifest()
        assert inside.keys() - before.keys() == {change.parameter}
        # An edit at the down projection of layer 2 leaves the keys of layer 2 alone, though its gate lies below.
        assert tiny.hook_digest(below) == found[below] == tiny.hook_digest(below, inside)
        assert tiny.hook_digest(behind) != found[behind]
        assert tiny.hook_digest(behind, inside) == tiny.hook_digest(behind)
        assert tiny.layer_of(change.parameter) == 1 == tiny.lowest_layer([change.parameter])
    assert tiny.manifest() == before


def test_what_lies_before_a_block_belongs_to_the_block_below() -> None:
    """Passes are resumed at a block with its input in place: an edit of that input must be counted lower."""
    at_input = ActivationChange(2, Push("blocks.2.hook_resid_pre", draw(D, seed=0)))
    gated = ActivationChange(2, move_at(), gate=gate_at("blocks.2.hook_resid_pre"))
    first = ActivationChange(0, Push("blocks.0.hook_resid_pre", draw(D, seed=0)))
    assert [c.lowest_layer for c in (at_input, gated, first, ActivationChange(2, move_at()))] == [1, 1, 0, 2]


@pytest.mark.parametrize("hook", [GATE, ABOVE])
def test_a_copy_of_a_model_has_edits_of_its_own(tiny_llama: ModelHandle, hook: str) -> None:
    batch, change = tiny_llama.encode(list(PROMPTS), side="left"), some_edit(0, gate_at(hook, limit=ALWAYS))
    plain = answers(tiny_llama, batch)
    with under(tiny_llama, change):
        edited, twin = answers(tiny_llama, batch), copy.deepcopy(tiny_llama.model)
    assert edited != plain == answers(tiny_llama, batch)
    other = ModelHandle(twin, tiny_llama.tokenizer, tiny_llama.architecture, "twin", tiny_llama.folder)
    assert answers(other, batch) == edited and set(installed(other)) == {change.parameter}
    uninstall(other, change.parameter)
    assert answers(other, batch) == plain and not installed(tiny_llama)


@pytest.mark.parametrize("hook", [GATE, ABOVE])
def test_a_pass_in_one_thread_does_not_disturb_one_in_another(tiny_llama: ModelHandle, hook: str) -> None:
    first, second = (tiny_llama.encode([p])["input_ids"][0].tolist() for p in (PROMPTS[0], PROMPTS[2]))
    change = separating(tiny_llama, first, second, hook)
    batch, other = rows(tiny_llama, first), rows(tiny_llama, second)
    inside: list[Tensor] = []

    def meanwhile(activation: Tensor) -> Tensor:
        if not inside:
            inside.append(activation)
            worker = threading.Thread(target=lambda: inside.append(logits_of(tiny_llama, other)))
            worker.start()
            worker.join()
        return activation

    with under(tiny_llama, change):
        alone, beside = logits_of(tiny_llama, batch), logits_of(tiny_llama, other)
        with patch(tiny_llama, "blocks.2.hook_attn_out", meanwhile):
            assert torch.equal(logits_of(tiny_llama, batch), alone)
    assert torch.equal(inside[1], beside)


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


# -- passes of parts


def test_a_pass_that_goes_on_above_the_gate_is_refused_not_guessed(tiny_llama: ModelHandle) -> None:
    batch, name = tiny_llama.encode([PROMPTS[0]]), "blocks.3.hook_resid_pre"
    change = ActivationChange(3, move_at(3), gate=gate_at(GATE, limit=ALWAYS))
    with under(tiny_llama, change):
        with torch.no_grad(), record(tiny_llama, [name], stop=True) as seen:
            logits_of(tiny_llama, batch)
        with resume(tiny_llama, 3, seen[name]), pytest.raises(BadRequestError, match="was not reached"):
            logits_of(tiny_llama, batch)
        low = "blocks.1.hook_resid_pre"
        with record(tiny_llama, [low], stop=True) as seen:
            logits_of(tiny_llama, batch)
        with resume(tiny_llama, 1, seen[low]):
            resumed = logits_of(tiny_llama, batch)
        assert torch.equal(resumed, logits_of(tiny_llama, batch))


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("gate_hook", ["blocks.0.hook_mlp_out", GATE, "blocks.2.hook_resid_pre", ABOVE])
def test_the_end_of_a_row_is_that_of_the_whole_row_under_an_edit(
    tiny: ModelHandle, layer: int, gate_hook: str
) -> None:
    """Solvers run the end of a row again and again, from a block on; the gate may lie below it, or before the split."""
    ids = [tiny.encode([p])["input_ids"][0].tolist() for p in (PROMPTS[0], PROMPTS[4], PROMPTS[2])]
    ids.sort(key=len)
    change = separating(tiny, ids[0], ids[1], gate_hook)
    splits = [len(one) // 2 for one in ids]
    with torch.no_grad(), under(tiny, change):
        suffix = split_rows(tiny, ids, splits, layer)
        with patch(tiny, rewrite_hook(3), lambda output: output):
            hidden = suffix.hidden()
        for row, one in enumerate(ids):
            whole = tiny.model.base_model(input_ids=torch.tensor([one]), use_cache=False).last_hidden_state[0]
            found = hidden[row, : len(one) - splits[row]]
            torch.testing.assert_close(found, whole[splits[row] :], rtol=1e-3, atol=1e-3)
