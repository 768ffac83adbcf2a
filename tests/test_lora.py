"""Adapters trained by peft and merged on paper: the exported delta is the adapter model, and no adapter stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edits_helpers import LAYER, TOWER, p_new
from torch import Tensor

from guardedit.editors.lora import LoraHparams, exported, solve_lora, target_modules, trained_twin
from guardedit.edits.deltas import EditDelta, LowRank, encode, written
from guardedit.edits.inputs import SolveInputs
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.records import EditRequest

LONG = EditRequest(subject="Italy", prompt="The capital of {} is", target_new="the city of Milan")
_GATED = {
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj"},
}
MAPS = {
    "llama": _GATED,
    "gemma2": _GATED,
    "gpt2": {"attention": {"c_attn", "c_proj"}, "mlp": {"c_fc", "c_proj"}},
}
"""Linear maps of a block's parts, by hand."""


def hparams(**named: Any) -> LoraHparams:
    return LoraHparams(**{"steps": 6, "learning_rate": 1e-2, "rank": 3, **named})


def solved(handle: ModelHandle, *requests: EditRequest, seed: int = 0, **named: Any) -> EditDelta:
    return solve_lora(handle, requests or (TOWER,), hparams(**named), SolveInputs(seed=seed))


@torch.no_grad()
def logits(handle: ModelHandle) -> Tensor:
    batch = handle.encode([TOWER.filled, "Alan Turing was born in London."])
    hidden = handle.hidden(batch["input_ids"], batch["attention_mask"])
    return handle.logits_at(hidden, batch["attention_mask"].bool())


def test_the_exported_delta_is_the_model_with_its_adapters(tiny: ModelHandle) -> None:
    before = logits(tiny)
    with preserved(tiny), torch.enable_grad():
        adapted, _ = trained_twin(tiny, (TOWER,), hparams(), SolveInputs())
    delta = EditDelta(tuple(exported(tiny, adapted)), "lora", {}, {})
    with written(tiny, delta):
        merged = logits(tiny)
    torch.testing.assert_close(merged, logits(adapted), rtol=1e-3, atol=1e-3)
    assert float((merged - before).abs().max()) > 0.1


def test_adapters_sit_on_the_linear_maps_of_attention_and_mlp_and_nowhere_else(tiny: ModelHandle) -> None:
    family, row = tiny.architecture.name, tiny.architecture
    paths = {"attention": row.attention, "mlp": row.mlp}
    expected = {
        f"{row.layers}.{layer}.{paths[part]}.{name}.weight"
        for layer in range(tiny.n_layers)
        for part, names in MAPS[family].items()
        for name in names
    }
    delta = solved(tiny)
    assert set(delta.parameters) == expected
    assert delta.layers == tuple(range(tiny.n_layers)) and delta.lowest_layer == 0


def test_parts_and_layers_may_be_chosen(tiny: ModelHandle) -> None:
    delta = solved(tiny, targets=("attention",), layers=(2,))
    assert {c.layer for c in delta.changes} == {2} and not any(c.rewrites for c in delta.changes)
    assert len(delta.changes) == len(MAPS[tiny.architecture.name]["attention"]) and delta.lowest_layer == 2
    assert target_modules(tiny, hparams(layers=(LAYER, 2))) == [
        *target_modules(tiny, hparams(layers=(LAYER,))),
        *target_modules(tiny, hparams(layers=(2,))),
    ]


def test_updates_have_the_asked_rank_and_are_scaled_by_alpha(tiny: ModelHandle) -> None:
    """After one step B is ±rate wherever its gradient is clear, whatever alpha: ΔW is proportional to alpha."""
    single, double = (solved(tiny, steps=1, alpha=alpha) for alpha in (3, 6))
    for one, two in zip(single.changes, double.changes, strict=True):
        assert isinstance(one.update, LowRank) and one.update.rank == 3
        assert int(torch.linalg.matrix_rank(one.update.dense())) <= 3
        assert isinstance(two.update, LowRank) and torch.equal(one.update.right, two.update.right)
        # Adam divides by |g| + 1e-8, which only shows where there is hardly a gradient.
        clear = one.update.left.abs() > 0.95 * one.update.left.abs().max()
        torch.testing.assert_close(two.update.left[clear], 2 * one.update.left[clear], rtol=5e-2, atol=0)
        assert float(clear.float().mean()) > 0.8


def test_no_adapter_is_left_in_the_model(tiny: ModelHandle) -> None:
    before = [(name, type(module)) for name, module in tiny.model.named_modules()]
    solved(tiny)
    assert [(name, type(module)) for name, module in tiny.model.named_modules()] == before
    assert not hasattr(tiny.model, "peft_config")


def test_the_seed_draws_the_adapters_and_the_world_s_random_state_does_not(tiny_llama: ModelHandle) -> None:
    first = encode(solved(tiny_llama))
    torch.manual_seed(99)
    assert encode(solved(tiny_llama)) == first != encode(solved(tiny_llama, seed=1))


def test_several_requests_are_learnt_together(tiny: ModelHandle) -> None:
    before = [p_new(tiny, request) for request in (TOWER, LONG)]
    with written(tiny, solved(tiny, TOWER, LONG, steps=12)):
        after = [p_new(tiny, request) for request in (TOWER, LONG)]
    assert all(late > early + 0.3 for early, late in zip(before, after, strict=True))


BAD = {
    "rank": [0, 1.5],
    "alpha": [0, "x"],
    "targets": [(), ("head",), "mlp"],
    "layers": [[0], (-1,), ("1",)],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_setting_that_makes_no_sense_is_named(name: str, value: Any) -> None:
    with pytest.raises(BadRequestError, match=name):
        LoraHparams(**{name: value})
