"""What every model family owes, whichever it is: a new entry of FAMILIES is tested here without a line of its own."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from edits_helpers import LAYER, TOWER, moments, twin
from test_editors import EVERYWHERE, settings, solved
from torch import Tensor

from guardedit.audit.versions import VersionStore
from guardedit.editors import EDITORS
from guardedit.edits.deltas import post_images, rehearsed, written
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.keys import key_of
from guardedit.edits.values import optimise_value
from guardedit.errors import BadRequestError
from guardedit.models import architectures, hooks, sources
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.suffix import Suffix, past_of, split_rows

ROWS = {
    "llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "llama", "phi3": "llama", "gemma2": "gemma2",
    "gemma3": "gemma2", "olmo2": "gemma2", "gpt2": "gpt2", "gptj": "gptj", "gpt_neox": "gpt_neox",
}  # fmt: skip
TEXTS = ["The Eiffel Tower is located in the city of Paris.", "Alan Turing was born in"]
POINTS = (
    "hook_resid_pre", "hook_attn_out", "mlp.hook_post", "mlp.out.hook_out", "hook_mlp_out", "hook_resid_post",
)  # fmt: skip
LENGTHS, SPLITS = (25, 4, 17, 12), (20, 1, 13, 0)
"""Longer before the split than every tiny model's window."""


def forward(handle: ModelHandle, names: list[str], stop: bool = False) -> dict[str, Tensor]:
    batch = handle.encode(TEXTS)
    with torch.no_grad(), hooks.record(handle, names, stop=stop) as seen:
        handle.hidden(batch["input_ids"], batch["attention_mask"])
    return seen


@pytest.fixture
def fresh(every_family: ModelHandle) -> ModelHandle:
    """A copy of its own, free to be written to."""
    return twin(every_family)


def test_each_family_is_found_by_its_row_and_each_row_has_a_family(
    tiny_handles: dict[str, ModelHandle],
) -> None:
    assert {family: tiny_handles[family].architecture.name for family in FAMILIES} == ROWS
    # One row is there for what transformers called the same module before.
    assert {row.name for row in architectures.ARCHITECTURES} == {*ROWS.values(), "gpt_neox_embed_out"}


def test_the_older_name_of_a_head_is_found_too(tiny_handles: dict[str, ModelHandle]) -> None:
    model = twin(tiny_handles["gpt_neox"]).model
    model.embed_out = model.lm_head
    del model.lm_head
    assert architectures.detect(model).unembedding == "embed_out"


def test_a_stop_comes_after_everything_that_was_asked_for(every_family: ModelHandle) -> None:
    """In whichever order a family's block computes two points, both are recorded, with the bits of a whole pass."""
    names = [f"blocks.1.{point}" for point in POINTS]
    whole = forward(every_family, names)
    for pair in itertools.combinations(names, 2):
        seen = forward(every_family, [*pair], stop=True)
        assert seen.keys() == set(pair) and all(torch.equal(seen[name], whole[name]) for name in pair)


def test_a_digest_moves_wherever_its_activation_can(fresh: ModelHandle) -> None:
    """Perturb every parameter in turn. A digest may move without its activation (attention's key bias cancels in the
    softmax), but never the activation without the digest; nor does either see the layer's own output side."""
    names = [hooks.key_hook(2), hooks.rewrite_hook(2), hooks.mlp_hook(2)]
    digests, before = {name: fresh.hook_digest(name) for name in names}, forward(fresh, names, stop=True)
    behind = free_of(fresh, 2)
    for parameter_name, parameter in fresh.model.named_parameters():
        saved = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        after = forward(fresh, names, stop=True)
        for name in names:
            moved = not torch.equal(after[name], before[name])
            told = fresh.hook_digest(name) != digests[name]
            assert told or not moved, (parameter_name, name)
            assert not (told and parameter_name.startswith(behind[name])), (parameter_name, name)
        with torch.no_grad():
            parameter.copy_(saved)


def free_of(handle: ModelHandle, layer: int) -> dict[str, tuple[str, ...]]:
    """By hook name, the beginnings of parameters that it cannot depend on."""
    row = handle.architecture
    block, above = f"{row.layers}.{layer}.", f"{row.layers}.{layer + 1}."
    norm = () if row.post_mlp_norm is None else (f"{block}{row.post_mlp_norm}.",)
    return {
        hooks.key_hook(layer): (above, f"{block}{row.rewrite_module}.", *norm),
        hooks.rewrite_hook(layer): (above, *norm),
        hooks.mlp_hook(layer): (above, row.final_norm),
    }


def rows_of(seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(4, 380) for _ in range(length)] for length in LENGTHS]


def adding(residual: Tensor, at: int) -> Callable[[Tensor], Tensor]:
    def add(output: Tensor) -> Tensor:
        where = torch.zeros(output.shape[1], 1)
        where[at] = 1.0
        return output + where * residual

    return add


def whole_row(handle: ModelHandle, row: list[int]) -> Tensor:
    """(seq, d_model): one row alone, without padding, cache or resume."""
    states: Tensor = handle.model.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state
    return states[0]


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "whole rows"])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_end_of_a_row_and_its_gradient_are_those_of_the_whole_row(
    every_family: ModelHandle, layer: int, cached: bool
) -> None:
    """With a change at each row's split token: what an optimisation of values runs, against plain forward passes."""
    handle = replace(every_family, architecture=replace(every_family.architecture, prefix_cache=cached))
    rows, residual = rows_of(), 0.3 * torch.ones(handle.d_model)
    residual.requires_grad_()
    with preserved(handle):
        suffix = split_rows(handle, rows, SPLITS, layer)
        assert bool(suffix.past) is cached and bool(suffix.again.shape[1]) is not cached
        with hooks.patch(handle, hooks.rewrite_hook(layer), adding(residual, 0)):
            found = suffix.hidden()
        ends = [found[i, : len(row) - split] for i, (row, split) in enumerate(zip(rows, SPLITS, strict=True))]
        expected = []
        for row, split in zip(rows, SPLITS, strict=True):
            with hooks.patch(handle, hooks.rewrite_hook(layer), adding(residual, split)):
                expected.append(whole_row(handle, row)[split:])
        for end, other in zip(ends, expected, strict=True):
            # The same sums over another padding, in float32.
            torch.testing.assert_close(end, other, rtol=1e-4, atol=1e-4)
        pull = torch.linspace(-1, 1, handle.d_model)
        gradient, plain = (
            torch.autograd.grad(sum((end @ pull).sum() for end in each), residual)[0]  # type: ignore[arg-type]
            for each in (ends, expected)
        )
    assert float((gradient - plain).norm()) < 1e-3 * float(plain.norm()) and float(plain.norm()) > 1e-2


def test_keys_and_values_that_do_not_say_all_are_not_handed_out(tiny_llama: ModelHandle) -> None:
    handle = replace(tiny_llama, architecture=replace(tiny_llama.architecture, prefix_cache=False))
    ids = torch.tensor([[5, 6]])
    with pytest.raises(BadRequestError, match="do not say all"):
        past_of(handle, ids, torch.ones_like(ids))


def test_some_of_the_rows_are_what_they_were_among_all(every_family: ModelHandle) -> None:
    for cached in (True, False):
        handle = replace(every_family, architecture=replace(every_family.architecture, prefix_cache=cached))
        with torch.no_grad():
            suffix = split_rows(handle, rows_of(), SPLITS, 2)
            some: Suffix = suffix.select(torch.tensor([0, 2]))
            for index, row in enumerate((0, 2)):
                n = int(suffix.mask[row].sum())
                torch.testing.assert_close(
                    some.hidden()[index, :n], suffix.hidden()[row, :n], rtol=1e-4, atol=1e-4
                )


def read(handle: ModelHandle, layer: int) -> tuple[Tensor, Tensor]:
    """What the rewrite module of `layer` is asked and answers, and the final states, over TEXTS."""
    batch = handle.encode(TEXTS)
    with torch.no_grad(), hooks.record(handle, [hooks.rewrite_hook(layer)]) as seen:
        final = handle.hidden(batch["input_ids"], batch["attention_mask"])
    return seen[hooks.rewrite_hook(layer)], final[batch["attention_mask"].bool()]


@pytest.mark.parametrize("editor", EVERYWHERE)
def test_an_edit_does_what_it_says_and_is_undone_bit_for_bit(every_family: ModelHandle, editor: str) -> None:
    """The answer moves by ΔW·key, before any norm; what is rehearsed is what is written; nothing else is touched."""
    handle, before = every_family, every_family.manifest()
    tied = handle.model.config.tie_word_embeddings
    delta = solved(editor, handle, steps=4)
    layer = (delta.layers or (LAYER,))[0]
    key = forward(handle, [hooks.key_hook(layer)])[hooks.key_hook(layer)]
    answer, final = read(handle, layer)
    with rehearsed(handle, delta):
        tried = read(handle, layer)
    with written(handle, delta):
        real = read(handle, layer)
        changed = {name for name, digest in handle.manifest().items() if digest != before[name]}
        assert changed == set(delta.parameters)
        head, embedding = (
            handle.model.get_submodule(path).weight
            for path in (handle.architecture.unembedding, handle.architecture.embedding)
        )
        assert (head is embedding) == tied
    if delta.touches_only_rewrite_modules:
        expected = answer + delta.update(layer).move(key)
        # (W + ΔW)x against Wx + ΔWx in float32.
        for found in (tried, real):
            torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(tried[1], real[1], rtol=1e-3, atol=2e-3)
    assert float((real[1] - final).abs().max()) > 0.01, "the edit must be seen to be compared"
    assert handle.manifest() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rome_meets_its_constraint_before_the_cast_in_every_type(
    every_family: ModelHandle, dtype: torch.dtype
) -> None:
    """(W + ΔW) k_star = W k_star + r in float64; the weights are that, cast last."""
    handle = every_family if dtype == torch.float32 else twin(every_family, dtype)
    hparams = settings("rome", steps=3)
    key = key_of(handle, TOWER, LAYER, ("",))
    value = optimise_value(handle, TOWER, key, LAYER, ("",), hparams)
    delta = EDITORS["rome"].solve(handle, [TOWER], hparams, SolveInputs(moments()))
    weight, update = handle.weight(LAYER).detach().double(), delta.update(LAYER).dense()
    v_star = weight @ key.k_star + value.residual
    assert float(value.residual.norm()) > 0.1
    torch.testing.assert_close((weight + update) @ key.k_star, v_star, rtol=1e-9, atol=1e-9)
    image = post_images(handle, delta)[handle.rewrite_parameter(LAYER)]
    stored = image.T if handle.architecture.transposed else image
    assert torch.equal(stored, (weight + update).to(dtype)) and bool(torch.isfinite(stored).all())


def test_a_version_store_takes_every_family_s_folder(every_family: ModelHandle, tmp_path: Path) -> None:
    """Every parameter is found in the files, under whichever name transformers saved it."""
    store = VersionStore(tmp_path / "home")
    store.import_base(every_family.manifest(), every_family.folder, every_family.name)
    assert store.digest() == every_family.digest()


def test_the_layer_s_output_norm_is_the_row_s(every_family: ModelHandle) -> None:
    """A row without a norm behind the MLP means that the MLP's output is the down projection's, dropout apart."""
    seen = forward(every_family, [hooks.rewrite_hook(1), hooks.mlp_hook(1)])
    same = torch.equal(seen[hooks.rewrite_hook(1)], seen[hooks.mlp_hook(1)])
    assert same == (every_family.architecture.post_mlp_norm is None)


def test_loading_again_gives_the_same_bits(every_family: ModelHandle) -> None:
    """Also buffers that no file holds (rotary tables, embedding scales) are made again."""
    again, name = sources.load(str(every_family.folder)), ["blocks.3.hook_resid_post"]
    assert torch.equal(forward(again, name)[name[0]], forward(every_family, name)[name[0]])
