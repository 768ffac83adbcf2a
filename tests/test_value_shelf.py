"""Values are found once: whoever asks for the same ones gets the same bits, and whoever asks for others does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from edits_helpers import CONTEXTS, LAYER, TOWER, moments

from guardedit.editors.emmet import EmmetHparams, emmet
from guardedit.editors.located import find_wanted
from guardedit.editors.rome import RomeHparams, solve_rome
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.value_shelf import ValueShelf
from guardedit.edits.value_types import Value
from guardedit.errors import IntegrityError
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

ROME = RomeHparams(layer=LAYER, contexts=CONTEXTS, steps=4)
BRIDGE = TOWER.model_copy(update={"subject": "Tower Bridge", "target_new": "Oslo"})
BOTH = (TOWER, BRIDGE)


def inputs(folder: Path | None, **more: int) -> SolveInputs:
    shelf = None if folder is None else ValueShelf(folder)
    return SolveInputs(moments(), values=shelf, **more)  # type: ignore[arg-type]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors")}


def no_search(some: Sequence[EditRequest]) -> Sequence[Value]:
    raise LookupError(f"{len(some)} values had to be found")


def test_a_value_from_the_shelf_gives_the_same_delta(tiny: ModelHandle, tmp_path: Path) -> None:
    without = solve_rome(tiny, [TOWER], ROME, inputs(None))
    first, second = (solve_rome(tiny, [TOWER], ROME, inputs(tmp_path)) for _ in range(2))
    assert len(files(tmp_path)) == 1
    for found in (first, second):
        assert torch.equal(found.changes[0].update.dense(), without.changes[0].update.dense())
        assert found.diagnostics == without.diagnostics


def test_editors_share_values_and_only_new_facts_are_searched_for(
    tiny_llama: ModelHandle, tmp_path: Path
) -> None:
    solve_rome(tiny_llama, [TOWER], ROME, inputs(tmp_path))
    hparams = EmmetHparams(layer=LAYER, contexts=CONTEXTS, steps=4, ridge=0.5)
    find_wanted(tiny_llama, BOTH, hparams, inputs(tmp_path))
    assert len(files(tmp_path)) == 2, "one of both facts was known"
    shelf = ValueShelf(tmp_path)
    some = shelf.take(tiny_llama, (BRIDGE, TOWER), LAYER, CONTEXTS, ROME, no_search)
    turned = shelf.take(tiny_llama, BOTH, LAYER, CONTEXTS, hparams, no_search)
    assert torch.equal(some[0].residual, turned[1].residual)
    assert not torch.equal(some[0].residual, some[1].residual)
    emmet(tiny_llama, find_wanted(tiny_llama, BOTH, hparams, inputs(tmp_path)), hparams, inputs(tmp_path))
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize(
    ("request_", "hparams", "contexts"),
    [
        (TOWER.model_copy(update={"target_new": "Oslo"}), ROME, CONTEXTS),
        (TOWER, replace(ROME, steps=5), CONTEXTS),
        (TOWER, replace(ROME, keep_openings=2), CONTEXTS),
        (TOWER, ROME, CONTEXTS[:2]),
    ],
    ids=["target", "steps", "kept openings", "contexts"],
)
def test_another_question_is_another_value(
    tiny_llama: ModelHandle,
    tmp_path: Path,
    request_: EditRequest,
    hparams: RomeHparams,
    contexts: tuple[str, ...],
) -> None:
    find_wanted(tiny_llama, [TOWER], ROME, inputs(tmp_path))
    with pytest.raises(LookupError, match="1 values"):
        ValueShelf(tmp_path).take(tiny_llama, [request_], LAYER, contexts, hparams, no_search)


def test_an_edited_model_has_values_of_its_own(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    shelf = ValueShelf(tmp_path)
    find_wanted(tiny_llama, [TOWER], ROME, inputs(tmp_path))
    weight = tiny_llama.weight(LAYER + 1).data
    before = weight.clone()
    try:
        weight[0, 0] += 1.0
        with pytest.raises(LookupError):
            shelf.take(tiny_llama, [TOWER], LAYER, CONTEXTS, ROME, no_search)
    finally:
        weight.copy_(before)
    assert shelf.take(tiny_llama, [TOWER], LAYER, CONTEXTS, ROME, no_search)


def test_a_damaged_value_is_named(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    find_wanted(tiny_llama, [TOWER], ROME, inputs(tmp_path))
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(IntegrityError, match=path.name):
        find_wanted(tiny_llama, [TOWER], ROME, inputs(tmp_path))
