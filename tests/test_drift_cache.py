"""The far side on disk: computed once, and computed again where it is another or was changed."""

from __future__ import annotations

from pathlib import Path

import torch
from drift_helpers import FAR, LAYER, PROMPTS, REQUEST, make_delta, make_probes, make_saes
from monitor_helpers import measured, record_base, value

from guardedit.drift.cache import KEPT_FILES
from guardedit.drift.measure import base_side
from guardedit.drift.probes import build_probes
from guardedit.edits.deltas import written
from guardedit.models.handle import ModelHandle
from guardedit.records import ProbePrompts


def test_the_far_side_is_computed_once_for_all_edits_of_a_layer(
    tiny_llama: ModelHandle, tmp_path: Path
) -> None:
    _, first = record_base(tiny_llama, cache=tmp_path)
    other = build_probes(
        tiny_llama, [REQUEST], [ProbePrompts(near=PROMPTS.near[:6])], far_tokens=3000, far_texts=FAR
    )
    second = base_side(tiny_llama, other, LAYER, tuple(make_saes()), cache=tmp_path)
    assert (first.far_from_cache, second.far_from_cache) == (False, True)
    assert len(list(tmp_path.iterdir())) == 1
    for a, b in zip(first.recorded["far"], second.recorded["far"], strict=True):
        assert torch.equal(a.resid, b.resid)
        assert torch.equal(a.final, b.final)
    assert value(measured(tiny_llama, (other, second), None), "far_kl") == 0.0


def test_a_changed_model_does_not_reuse_the_cached_side(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    record_base(tiny_llama, cache=tmp_path)
    with written(tiny_llama, make_delta(tiny_llama, 0.1)):
        assert not record_base(tiny_llama, cache=tmp_path)[1].far_from_cache


def test_a_flipped_byte_in_the_cache_is_noticed_and_computed_again(
    tiny_llama: ModelHandle, tmp_path: Path
) -> None:
    record_base(tiny_llama, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    for place in (10, len(path.read_bytes()) // 2, len(path.read_bytes()) - 1):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(bytes(data))
        assert not record_base(tiny_llama, cache=tmp_path)[1].far_from_cache
        assert record_base(tiny_llama, cache=tmp_path)[1].far_from_cache


def test_a_cache_that_cannot_be_written_stops_nothing(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    sides = record_base(tiny_llama, cache=blocked / "drift")
    assert value(measured(tiny_llama, sides, None), "far_kl") == 0.0


def test_old_far_sides_make_room_for_new_ones(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    for size in range(KEPT_FILES + 2):
        probes = make_probes(tiny_llama, far_tokens=100 + 40 * size)
        base_side(tiny_llama, probes, LAYER, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == KEPT_FILES
    assert base_side(tiny_llama, probes, LAYER, cache=tmp_path).far_from_cache
