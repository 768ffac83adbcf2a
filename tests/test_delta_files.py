"""Files of deltas: bit for bit, and what is no delta is refused."""

from __future__ import annotations

import random

import pytest
import torch
from edits_helpers import SMALL, UPDATES, ZERO, delta_of, gaussian, low_rank, record_for
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from guardedit.edits.deltas import (
    EditDelta,
    WeightChange,
    decode,
    encode,
    post_images,
    raw_bytes,
    restore,
)
from guardedit.errors import IntegrityError
from guardedit.models.handle import ModelHandle, tensor_digest
from guardedit.records import DeltaRecord, digest_of_bytes


def claiming(data: bytes) -> DeltaRecord:
    """A record whose digest is that of `data`, whatever `data` is."""
    return DeltaRecord(
        editor="test", changes=(), file_digest=digest_of_bytes(data), hparams={}, model_digest=ZERO
    )


def broken(image: Tensor) -> dict[str, Tensor]:
    return {"shape": image[:1], "dtype": image.double(), "transposed": image.T}


@pytest.mark.parametrize("how", ["shape", "dtype", "transposed", "name"])
def test_restore_refuses_bytes_that_are_not_the_parameter_s_before_it_writes_any(
    tiny: ModelHandle, how: str
) -> None:
    good, bad = (tiny.rewrite_parameter(layer) for layer in (0, 1))
    stored = tiny.model.get_parameter(bad).detach().clone()
    second = {"model.nowhere": stored} if how == "name" else {bad: broken(stored)[how]}
    before = tiny.digest()
    with pytest.raises(IntegrityError):
        restore(tiny, {good: torch.zeros_like(tiny.model.get_parameter(good)), **second})
    assert tiny.digest() == before


def test_a_file_gives_back_the_delta_bit_for_bit(tiny: ModelHandle) -> None:
    delta = delta_of(tiny, *(update for update in UPDATES.values()))
    data = encode(delta)
    again = decode(data, record_for(delta, tiny))
    assert encode(again) == data == encode(delta_of(tiny, *UPDATES.values()))
    assert (again.editor, again.hparams, again.diagnostics) == (
        delta.editor,
        delta.hparams,
        delta.diagnostics,
    )
    assert again.layers == delta.layers == (1, 2, 3)
    for layer in delta.layers:
        first, second = (d.update(layer).tensors() for d in (delta, again))
        assert all(
            torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype
            for name in first
        )
    assert {n: tensor_digest(t) for n, t in post_images(tiny, again).items()} == {
        n: tensor_digest(t) for n, t in post_images(tiny, delta).items()
    }


def test_layers_come_back_in_the_order_of_computation() -> None:
    """By number: as text, layer 10 would stand before layer 9."""
    changes = tuple(WeightChange(f"layers.{layer}.weight", layer, low_rank()) for layer in (9, 10, 2))
    data = encode(EditDelta(changes, "test", {}, {}))
    assert [change.layer for change in decode(data, claiming(data)).changes] == [2, 9, 10]


def test_any_flipped_bit_of_a_delta_file_is_an_integrity_error(tiny_llama: ModelHandle) -> None:
    delta = delta_of(tiny_llama, low_rank())
    data, found = encode(delta), record_for(delta, tiny_llama)
    draw = random.Random(0)
    places = {0, 7, 8, 20, len(data) - 1, *(draw.randrange(len(data)) for _ in range(60))}
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        with pytest.raises(IntegrityError, match="was changed"):
            decode(bytes(flipped), found)
    for cut in (b"", data[:-1], data + b"\0"):
        with pytest.raises(IntegrityError):
            decode(cut, found)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_an_integrity_error_whether_or_not_the_digest_matches(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        decode(data, claiming(b"a delta"))
    if data[8:10] != b"{}":  # a safetensors file of no tensors is the delta that changes nothing
        with pytest.raises(IntegrityError, match="is not one that"):
            decode(data, claiming(data))


STRANGE = {
    "no separators": {"weight": torch.ones(2, 2)},
    "no layer": {"w|one|matrix": torch.ones(2, 2)},
    "one factor": {"w|1|left": torch.ones(2, 1)},
    "factors that do not meet": {"w|1|left": torch.ones(2, 1), "w|1|right": torch.ones(2, 2)},
    "a vector": {"w|1|matrix": torch.ones(2)},
    "both forms": {
        "w|1|matrix": torch.ones(2, 2),
        "w|1|left": torch.ones(2, 1),
        "w|1|right": torch.ones(1, 2),
    },
    "a layer twice": {"w|1|matrix": torch.ones(2, 2), "v|1|matrix": torch.ones(2, 2)},
}


@pytest.mark.parametrize("tensors", STRANGE.values(), ids=STRANGE)
def test_a_tensor_file_that_is_no_delta_is_an_integrity_error(tensors: dict[str, Tensor]) -> None:
    data = save(tensors)
    with pytest.raises(IntegrityError, match="is not one that"):
        decode(data, claiming(data))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SMALL])
def test_raw_bytes_are_those_of_the_tensor_s_safetensors_file(dtype: torch.dtype) -> None:
    tensor = gaussian(3, 5).to(dtype).T
    stored = save({"w": tensor.contiguous()})
    assert raw_bytes(tensor) == stored[-tensor.numel() * tensor.element_size() :]
    assert digest_of_bytes(raw_bytes(tensor)) == tensor_digest(tensor)
    assert raw_bytes(torch.empty(0, dtype=dtype)) == b""
