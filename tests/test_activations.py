"""Activation edits: what decides, what is moved, what keeps its bits, and that all of it can be taken away again."""

from __future__ import annotations

import pytest
import torch
from activation_helpers import (
    ALWAYS,
    GATE,
    KEY,
    NEVER,
    PROMPTS,
    D,
    draw,
    gate_at,
    gate_logit,
    logits_of,
    move_at,
    rows,
    separating,
    some_edit,
    under,
)
from torch import Tensor

from guardedit.edits.activations import (
    ActivationChange,
    Everywhere,
    KeyMatch,
    Move,
    Push,
    TokenMatch,
    install,
    uninstall,
)
from guardedit.edits.deltas import EditDelta, WeightChange, written
from guardedit.edits.updates import LowRank
from guardedit.errors import BadRequestError, IntegrityError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import record, rewrite_hook

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
