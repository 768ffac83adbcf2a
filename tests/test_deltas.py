"""A delta written and a delta rehearsed are one thing, both leave no trace, and its file cannot be changed unseen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from edits_helpers import LAYER, SMALL, UPDATES, delta_of, gaussian, low_rank, record_for, twin
from torch import Tensor

from guardedit.edits.deltas import (
    Dense,
    EditDelta,
    LowRank,
    WeightChange,
    post_images,
    raw_bytes,
    rehearsed,
    written,
)
from guardedit.errors import BadRequestError, SolveError
from guardedit.models.handle import ModelHandle, tensor_digest
from guardedit.models.hooks import record
from guardedit.records import digest_of_bytes

TEXTS = ["The capital of France is Paris.", "Alan Turing was born in London. He was"]


@torch.no_grad()
def activations(handle: ModelHandle) -> dict[str, Tensor]:
    """Every residual stream state, and the hidden states after the final norm."""
    batch = handle.encode(TEXTS)
    with record(handle, [f"blocks.{layer}.hook_resid_post" for layer in range(handle.n_layers)]) as seen:
        final = handle.hidden(batch["input_ids"], batch["attention_mask"])
    real = batch["attention_mask"].bool()
    return {name: state[real] for name, state in {**seen, "final": final}.items()}


@pytest.mark.parametrize("name", UPDATES)
def test_written_and_rehearsed_give_the_same_activations(tiny: ModelHandle, name: str) -> None:
    delta, before = delta_of(tiny, UPDATES[name], low_rank(seed=5)), activations(tiny)
    with written(tiny, delta):
        real = activations(tiny)
    with rehearsed(tiny, delta):
        tried = activations(tiny)
    for hook in before:
        # (W + ΔW)x against Wx + ΔWx in float32, carried through the layers above.
        torch.testing.assert_close(tried[hook], real[hook], rtol=1e-3, atol=1e-4)
    assert torch.equal(real["blocks.0.hook_resid_post"], before["blocks.0.hook_resid_post"])
    for hook in ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post", "final"):
        assert float((real[hook] - before[hook]).abs().max()) > 0.1, "the edit must be seen to mean anything"


@pytest.mark.parametrize("way", [written, rehearsed])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_model_is_bit_identical_afterwards_also_when_the_body_raises(
    tiny: ModelHandle, way: type, error: type[BaseException] | None
) -> None:
    before, delta = tiny.manifest(), delta_of(tiny, low_rank(), low_rank(seed=3))
    inside: dict[str, str] = {}
    try:
        with way(tiny, delta):
            inside = tiny.manifest()
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert tiny.manifest() == before
    changed = {name for name in before if inside[name] != before[name]}
    assert changed == ({change.parameter for change in delta.changes} if way is written else set())


def test_one_write_inside_another_comes_back_in_order(tiny: ModelHandle) -> None:
    first, second, before = delta_of(tiny, low_rank()), delta_of(tiny, low_rank(seed=8)), tiny.digest()
    with written(tiny, first):
        middle = tiny.digest()
        with written(tiny, second):
            assert tiny.digest() not in (before, middle)
        assert tiny.digest() == middle
    assert tiny.digest() == before


def test_the_record_s_digests_are_those_of_the_bytes_that_written_puts_into_the_weights(
    tiny: ModelHandle,
) -> None:
    delta = delta_of(tiny, low_rank(), Dense(0.1 * gaussian(32, 64)))
    found, before = record_for(delta, tiny), tiny.manifest()
    with written(tiny, delta):
        after = tiny.manifest()
    images = post_images(tiny, delta)
    for change in found.changes:
        assert change.digest_before == before[change.parameter]
        assert (
            change.digest_after
            == after[change.parameter]
            == digest_of_bytes(raw_bytes(images[change.parameter]))
        )
        assert change.shape == tuple(tiny.model.get_parameter(change.parameter).shape)
    named = {change.parameter for change in found.changes}
    assert {n: d for n, d in after.items() if n not in named} == {
        n: d for n, d in before.items() if n not in named
    }


def test_the_record_says_how_large_the_update_is(tiny: ModelHandle) -> None:
    update = low_rank(rank=2)
    change = record_for(delta_of(tiny, update), tiny).changes[0]
    assert (change.rank, change.layer, change.dtype) == (2, LAYER, "float32")
    assert change.delta_norm == pytest.approx(float(torch.linalg.norm(update.left @ update.right)), rel=1e-12)
    assert change.weight_norm == pytest.approx(
        np.linalg.norm(tiny.weight(LAYER).detach().double().numpy()), rel=1e-12
    )
    assert record_for(delta_of(tiny, Dense(gaussian(32, 64))), tiny).changes[0].rank is None


def test_tied_embeddings_stay_tied(tiny: ModelHandle) -> None:
    row = tiny.architecture
    with written(tiny, delta_of(tiny, low_rank())):
        embedding, unembedding = (
            tiny.model.get_submodule(path).weight for path in (row.embedding, row.unembedding)
        )
        assert embedding is unembedding


@pytest.mark.parametrize("dtype", SMALL)
def test_a_small_type_is_added_to_in_float64_and_cast_last(tiny: ModelHandle, dtype: torch.dtype) -> None:
    small, update = twin(tiny, dtype), low_rank(0.05)
    delta, before = delta_of(small, update), small.digest()
    weight = small.weight(LAYER).detach()
    expected = torch.from_numpy(weight.double().numpy() + update.left.numpy() @ update.right.numpy()).to(
        dtype
    )
    with written(small, delta):
        assert small.weight(LAYER).dtype == dtype
        assert torch.equal(small.weight(LAYER), expected)
        assert tensor_digest(small.model.get_parameter(delta.changes[0].parameter)) == (
            record_of_written := small.manifest()[delta.changes[0].parameter]
        )
    assert record_for(delta, small).changes[0].digest_after == record_of_written
    assert not torch.equal(weight + update.dense().to(dtype), expected), "casting first would be told apart"
    assert small.digest() == before


@pytest.mark.parametrize("dtype", SMALL)
def test_a_rehearsal_in_a_small_type_is_as_near_to_the_write_as_the_type_allows(
    tiny: ModelHandle, dtype: torch.dtype
) -> None:
    small = twin(tiny, dtype)
    delta, before = delta_of(small, low_rank()), activations(small)["final"].float()
    with written(small, delta):
        real = activations(small)["final"].float()
    with rehearsed(small, delta):
        tried = activations(small)["final"].float()
    # Rounding to 8 or 11 bits in every module above; the edit itself is far larger.
    assert float((tried - real).norm() / (real - before).norm()) < 0.1


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_move_is_the_dense_matrix_times_the_key_in_the_key_s_type(update: LowRank | Dense) -> None:
    keys = gaussian(3, 4, 64, seed=4)
    expected = keys.numpy() @ update.dense().double().numpy().T
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        moved = update.move(keys.to(dtype))
        assert moved.dtype == dtype and moved.shape == (3, 4, 32)
        np.testing.assert_allclose(moved.double().numpy(), expected, rtol=tolerance, atol=4 * tolerance)


def test_factors_below_the_smallest_float16_do_not_vanish() -> None:
    """C⁻¹k / kᵀC⁻¹k has entries like 1e-9 where keys are large, and the residual makes up for it."""
    update = LowRank(
        torch.full((1, 1), 1e9, dtype=torch.float64), torch.full((1, 4), 1e-9, dtype=torch.float64)
    )
    assert float(update.move(torch.ones(4, dtype=torch.float16))) == pytest.approx(4.0, rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_refused_before_anything_is_written(
    tiny: ModelHandle, bad: float
) -> None:
    wrong = Dense(torch.zeros(32, 64).index_fill(0, torch.tensor(3), bad))
    delta, before = delta_of(tiny, low_rank(), wrong), tiny.digest()
    with pytest.raises(SolveError, match="not finite"):
        post_images(tiny, delta)
    with pytest.raises(SolveError, match="nothing was written"), written(tiny, delta):
        pytest.fail("the body must not be reached")
    assert tiny.digest() == before


def test_an_update_too_large_for_the_model_s_type_is_refused(tiny: ModelHandle) -> None:
    large = Dense(torch.full((32, 64), 1e5, dtype=torch.float64))
    assert torch.isfinite(post_images(tiny, delta_of(tiny, large))[tiny.rewrite_parameter(LAYER)]).all()
    small = twin(tiny, torch.float16)
    with pytest.raises(SolveError, match=r"not finite in torch\.float16"):
        post_images(small, delta_of(small, large))


def other_models(handle: ModelHandle) -> dict[str, WeightChange]:
    parameter = handle.rewrite_parameter(LAYER)
    return {
        "another layer's name": WeightChange(handle.rewrite_parameter(LAYER + 1), LAYER, low_rank()),
        "another family's name": WeightChange("decoder.1.weight", LAYER, low_rank()),
        "a row that would broadcast": WeightChange(parameter, LAYER, Dense(torch.ones(1, 64))),
        "the model's own layout": WeightChange(parameter, LAYER, Dense(torch.ones(64, 32))),
        "a layer that is not there": WeightChange(parameter, 40, low_rank()),
    }


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("use", [written, rehearsed])
def test_a_delta_of_another_model_is_refused(tiny: ModelHandle, case: int, use: type) -> None:
    change = list(other_models(tiny).values())[case]
    with (
        pytest.raises(BadRequestError, match=r"another model|does not exist"),
        use(tiny, EditDelta((change,), "test", {}, {})),
    ):
        pytest.fail("the body must not be reached")


def test_two_updates_of_one_layer_are_refused(tiny_llama: ModelHandle) -> None:
    change = delta_of(tiny_llama, low_rank()).changes[0]
    with pytest.raises(SolveError, match="once"):
        EditDelta((change, change), "test", {}, {})
