"""Several activation edits at once, taking them away, and passes of parts: what stays is what was there."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from activation_helpers import (
    ABOVE,
    ALWAYS,
    GATE,
    PROMPTS,
    D,
    answers,
    draw,
    gate_at,
    logits_of,
    move_at,
    rows,
    separating,
    some_edit,
    under,
)
from conftest import _trace
from torch import Tensor

from guardedit.edits.activations import (
    ActivationChange,
    Push,
    install,
    installed,
    uninstall,
)
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import patch, record, resume, rewrite_hook
from guardedit.models.suffix import split_rows


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
