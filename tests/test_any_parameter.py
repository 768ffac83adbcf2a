"""Deltas of embeddings, norms, biases and attention: written exactly, refused where they do not fit, without trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from edits_helpers import LAYER, ZERO, delta_of, everything, gaussian, low_rank, twin
from safetensors.torch import load
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from guardedit.edits.deltas import (
    Dense,
    EditDelta,
    LowRank,
    WeightChange,
    change_of,
    decode,
    encode,
    post_images,
    record_of,
    rehearsed,
    written,
)
from guardedit.errors import BadRequestError, SolveError
from guardedit.models.handle import ModelHandle
from guardedit.records import DeltaRecord

TEXTS = ["The capital of France is Paris.", "Alan Turing was born in London. He was"]


def of(*changes: WeightChange) -> EditDelta:
    return EditDelta(changes, "test", {}, {})


def attention_maps(handle: ModelHandle) -> list[str]:
    """Weights of the linear maps in the attention of one block."""
    prefix = f"{handle.architecture.layers}.{LAYER}.{handle.architecture.attention}."
    return [n for n, p in handle.model.named_parameters() if n.startswith(prefix) and p.ndim == 2]


@torch.no_grad()
def logits(handle: ModelHandle) -> Tensor:
    batch = handle.encode(TEXTS)
    hidden = handle.hidden(batch["input_ids"], batch["attention_mask"])
    return handle.logits_at(hidden, batch["attention_mask"].bool())


def test_every_parameter_becomes_w_plus_delta_in_the_model_s_own_layout(tiny: ModelHandle) -> None:
    delta = everything(tiny)
    assert set(delta.parameters) == {name for name, _ in tiny.model.named_parameters()}
    before = {name: p.detach().double() for name, p in tiny.model.named_parameters()}
    with written(tiny, delta):
        for change in delta.changes:
            moved, name = change.update.dense(), change.parameter
            module = tiny.model.get_submodule(name.rpartition(".")[0])
            moved = moved.T if isinstance(module, Conv1D) and moved.ndim == 2 else moved
            assert torch.equal(tiny.model.get_parameter(name), (before[name] + moved).float()), name


def test_the_matrix_of_any_linear_map_is_output_by_input(tiny: ModelHandle) -> None:
    names = attention_maps(tiny)
    assert names
    for name in names:
        module = tiny.model.get_submodule(name.removesuffix(".weight"))
        d_out, d_in = tiny.oriented(name).shape
        x, update = gaussian(5, d_in, seed=1).float(), Dense(gaussian(d_out, d_in, seed=2))
        with torch.no_grad():
            before = module(x)
            with written(tiny, of(change_of(tiny, name, update))):
                after = module(x)
        torch.testing.assert_close(after - before, update.move(x), rtol=1e-3, atol=1e-4)


def test_written_and_rehearsed_are_one_thing_for_mixed_deltas(tiny: ModelHandle) -> None:
    delta, before, digest = everything(tiny, 0.02), logits(tiny), tiny.digest()
    with written(tiny, delta):
        real = logits(tiny)
    with rehearsed(tiny, delta):
        tried = logits(tiny)
    assert torch.equal(tried, real) and float((real - before).abs().max()) > 0.1
    assert tiny.digest() == digest and torch.equal(logits(tiny), before)


def test_a_mixed_delta_is_the_sum_of_its_hooked_and_its_written_part(tiny: ModelHandle) -> None:
    """A rewrite module rehearsed by a hook, inside a write of all the rest, is the mixed delta rehearsed."""
    delta = everything(tiny, 0.02)
    at_layer = of(*(c for c in delta.changes if c.rewrites and c.layer == LAYER))
    rest = of(*(c for c in delta.changes if c.parameter not in at_layer.parameters))
    assert at_layer.touches_only_rewrite_modules and not rest.touches_only_rewrite_modules
    with rehearsed(tiny, delta):
        whole = logits(tiny)
    with rehearsed(tiny, rest), rehearsed(tiny, at_layer):
        parts = logits(tiny)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", [written, rehearsed])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_is_left_behind_also_when_the_body_raises(
    tiny: ModelHandle, way: type, error: type[BaseException] | None
) -> None:
    before, inside = tiny.manifest(), {}
    try:
        with way(tiny, everything(tiny)):
            inside = tiny.manifest()
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert tiny.manifest() == before and all(inside[name] != before[name] for name in before)


def test_a_file_gives_the_delta_back_and_its_record_names_every_tensor(tiny: ModelHandle) -> None:
    delta = everything(tiny)
    found = record_of(tiny, delta, model_digest=ZERO, statistics_digests={})
    again = DeltaRecord.model_validate_json(found.model_dump_json())
    read = decode(encode(delta), again)
    assert again == found and encode(read) == encode(delta)
    assert (read.layers, read.lowest_layer) == (delta.layers, 0) == (tuple(range(tiny.n_layers)), 0)
    assert sorted((c.parameter, c.layer or -1, c.rewrites) for c in read.changes) == sorted(
        (c.parameter, c.layer or -1, c.rewrites) for c in delta.changes
    )
    with written(tiny, delta):
        after = tiny.manifest()
    assert {c.parameter: c.digest_after for c in found.changes} == after
    assert {c.parameter for c in found.changes if c.layer is None} == {
        name for name in after if not name.startswith(f"{tiny.architecture.layers}.")
    }


def test_files_of_rewrite_modules_are_written_as_they_always_were(tiny: ModelHandle) -> None:
    names = load(encode(delta_of(tiny, low_rank(), Dense(gaussian(32, 64))))).keys()
    first, second = tiny.rewrite_parameter(LAYER), tiny.rewrite_parameter(LAYER + 1)
    assert set(names) == {
        f"{first}|{LAYER}|left",
        f"{first}|{LAYER}|right",
        f"{second}|{LAYER + 1}|matrix",
    }


def test_layers_are_those_of_rewrite_modules_and_the_lowest_is_of_all(tiny: ModelHandle) -> None:
    attention = change_of(tiny, attention_maps(tiny)[0], Dense(torch.ones(1, 1)))
    (rewrite,) = delta_of(tiny, low_rank(), layer=2).changes
    norm = change_of(tiny, f"{tiny.architecture.final_norm}.weight", Dense(torch.ones(32)))
    assert (attention.layer, attention.rewrites) == (LAYER, False) and rewrite.rewrites
    assert (norm.layer, norm.rewrites) == (None, False)
    both = of(rewrite, attention)
    assert (both.layers, both.lowest_layer, both.touches_only_rewrite_modules) == ((2,), LAYER, False)
    assert both.update(2) is rewrite.update
    with pytest.raises(KeyError):
        both.update(LAYER)
    assert (of(rewrite).lowest_layer, of(rewrite).touches_only_rewrite_modules) == (2, True)
    assert of(rewrite, norm).lowest_layer == of().lowest_layer == 0
    for changed in (both, of(rewrite), of(rewrite, norm), of()):
        assert tiny.lowest_layer(changed.parameters) == changed.lowest_layer


def test_a_norm_that_is_added_to_is_the_norm_and_a_bias_the_bias(tiny_gpt2: ModelHandle) -> None:
    """Vectors have their own shape: a row of one would broadcast."""
    name = f"{tiny_gpt2.architecture.layers}.{LAYER}.{tiny_gpt2.architecture.rewrite_module}.bias"
    image = post_images(tiny_gpt2, of(change_of(tiny_gpt2, name, Dense(torch.ones(32)))))[name]
    assert torch.equal(image, tiny_gpt2.model.get_parameter(name) + 1)
    with pytest.raises(BadRequestError, match="another model"):
        post_images(tiny_gpt2, of(change_of(tiny_gpt2, name, Dense(torch.ones(1, 32)))))


def test_two_changes_of_one_parameter_are_refused(tiny: ModelHandle) -> None:
    change = change_of(tiny, attention_maps(tiny)[0], Dense(torch.ones(2, 2)))
    with pytest.raises(SolveError, match="once"):
        of(change, change)
    (rewrite,) = delta_of(tiny, low_rank()).changes
    with pytest.raises(SolveError, match="once"):
        of(rewrite, replace(rewrite, rewrites=False))


def misplaced(handle: ModelHandle) -> dict[str, WeightChange]:
    attention, rewrite = attention_maps(handle)[0], handle.rewrite_parameter(LAYER)
    shape = tuple(handle.oriented(attention).shape)
    update = Dense(torch.ones(shape))
    return {
        "attention called a rewrite module": WeightChange(attention, LAYER, update),
        "a rewrite module called another": WeightChange(rewrite, LAYER, low_rank(), rewrites=False),
        "another block": WeightChange(attention, LAYER + 1, update, rewrites=False),
        "outside": WeightChange(attention, None, update, rewrites=False),
        "no such parameter": WeightChange("decoder.weight", None, update, rewrites=False),
        "a row": WeightChange(attention, LAYER, Dense(torch.ones(1, shape[1])), rewrites=False),
        "a vector": WeightChange(attention, LAYER, Dense(torch.ones(shape[1])), rewrites=False),
        "a tied parameter's second name": WeightChange(
            f"{handle.architecture.unembedding}.weight",
            None,
            Dense(torch.ones(handle.model.get_submodule(handle.architecture.unembedding).weight.shape)),
            rewrites=False,
        ),
    }


@pytest.mark.parametrize("case", range(8))
def test_a_change_in_the_wrong_place_is_refused(tiny: ModelHandle, case: int) -> None:
    delta = of(list(misplaced(tiny).values())[case])
    with pytest.raises(BadRequestError, match="another model"):
        post_images(tiny, delta)
    with pytest.raises(BadRequestError, match="another model"):
        record_of(tiny, delta, model_digest=ZERO, statistics_digests={})
    with pytest.raises(BadRequestError, match="another model"), rehearsed(tiny, delta):
        pytest.fail("the body must not be reached")


def test_a_rewrite_module_lies_in_a_layer() -> None:
    with pytest.raises(SolveError, match="lies in no layer"):
        WeightChange("w", None, low_rank())


def test_tied_embeddings_stay_tied_when_they_are_written(tiny: ModelHandle) -> None:
    row = tiny.architecture
    with written(tiny, everything(tiny)):
        pair = [tiny.model.get_submodule(path).weight for path in (row.embedding, row.unembedding)]
        assert pair[0] is pair[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_types_are_added_to_in_float64_and_cast_last(tiny: ModelHandle, dtype: torch.dtype) -> None:
    small = twin(tiny, dtype)
    delta = everything(small)
    images = post_images(small, delta)
    for change in delta.changes:
        exact = small.oriented(change.parameter).detach().double() + change.update.dense()
        expected = exact.T if small.is_transposed(change.parameter) else exact
        assert torch.equal(images[change.parameter], expected.to(dtype))


def test_low_rank_changes_of_attention_are_recorded_with_their_rank(tiny: ModelHandle) -> None:
    name = attention_maps(tiny)[0]
    d_out, d_in = tiny.oriented(name).shape
    update = LowRank(gaussian(d_out, 3), gaussian(3, d_in))
    (change,) = record_of(
        tiny, of(change_of(tiny, name, update)), model_digest=ZERO, statistics_digests={}
    ).changes
    assert (change.rank, change.layer, change.parameter) == (3, LAYER, name)
