"""A model that accelerate has spread over devices gives the bytes that it gives without, and is left as it was found.

There is one device here, but accelerate's own forward sits on every block all the same, as it does over several.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edits_helpers import LAYER, TOWER, moments
from test_editors import settings, solved
from torch import Tensor

from guardedit.editors import EDITORS
from guardedit.edits.deltas import encode, rehearsed, written
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.keys import key_of
from guardedit.errors import BadModelError
from guardedit.models import hooks, sources
from guardedit.models.handle import ModelHandle

TEXTS = ["The Eiffel Tower is located in the city of Paris.", "Alan Turing was born in"]
FAMILIES = ("llama", "gemma2", "gpt2", "gptj")
START, TOP = "blocks.2.hook_resid_pre", "blocks.3.hook_resid_post"


def parts(handle: ModelHandle) -> list[str]:
    """Every module that a device map of this model names: the blocks, and what stands beside them."""
    body = handle.model.base_model_prefix
    blocks = [f"{handle.architecture.layers}.{layer}" for layer in range(handle.n_layers)]
    beside = [f"{body}.{name}" for name, _ in handle.model.base_model.named_children()]
    head = handle.architecture.unembedding
    return [*(name for name in beside if name != handle.architecture.layers), *blocks, head]


@pytest.fixture(params=FAMILIES)
def plain(request: pytest.FixtureRequest, tiny_handles: dict[str, ModelHandle]) -> ModelHandle:
    return tiny_handles[request.param]


@pytest.fixture
def spread(plain: ModelHandle) -> ModelHandle:
    """A copy with accelerate's forward on every block."""
    from accelerate import dispatch_model

    model = copy.deepcopy(plain.model)
    dispatch_model(model, device_map=dict.fromkeys(parts(plain), "cpu"), force_hooks=True)
    handle = replace(plain, model=model)
    assert all("forward" in vars(handle.block(layer)) for layer in range(handle.n_layers))
    return handle


@pytest.fixture
def offloaded(plain: ModelHandle) -> Iterator[ModelHandle]:
    """A copy whose weights no device holds between two forward passes."""
    from accelerate import cpu_offload

    yield replace(plain, model=cpu_offload(copy.deepcopy(plain.model), execution_device=torch.device("cpu")))


def run(handle: ModelHandle) -> Tensor:
    batch = handle.encode(TEXTS)
    with torch.no_grad():
        return handle.hidden(batch["input_ids"], batch["attention_mask"])


def recorded(handle: ModelHandle, *names: str) -> dict[str, Tensor]:
    with hooks.record(handle, names) as seen:
        run(handle)
    return seen


def test_recording_patching_and_resuming_give_the_same_bits(plain: ModelHandle, spread: ModelHandle) -> None:
    own = {layer: vars(spread.block(layer))["forward"] for layer in range(spread.n_layers)}
    results = []
    for handle in (plain, spread):
        seen = recorded(handle, START, hooks.key_hook(1), TOP)
        with hooks.patch(handle, hooks.rewrite_hook(1), lambda x: x + 0.5):
            patched = run(handle)
        with hooks.resume(handle, 2, seen[START] + 0.5):
            resumed = run(handle)
        results.append([*seen.values(), patched, resumed, run(handle)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not torch.equal(results[0][-1], results[0][-2]), "resuming elsewhere must be seen"
    assert {layer: vars(spread.block(layer))["forward"] for layer in own} == own, "accelerate's own came back"


@pytest.mark.parametrize("editor", ["rome", "finetune-full", "lora"])
def test_solving_and_writing_give_the_same_bytes(
    plain: ModelHandle, spread: ModelHandle, editor: str
) -> None:
    """In closed form with hooks, by training a copy, and by training modules that are put into a copy."""
    assert spread.manifest() == plain.manifest() and spread.device == plain.device
    results: list[Any] = []
    for handle in (plain, spread):
        before = handle.digest()
        key = key_of(handle, TOWER, LAYER, ("",)).k_star
        delta = solved(editor, handle, steps=3)
        with rehearsed(handle, delta):
            tried = run(handle)
        with written(handle, delta):
            real, digest = run(handle), handle.digest()
        assert handle.digest() == before != digest
        results.append(([key, tried, real], encode(delta), digest))
    assert results[0][1:] == results[1][1:]
    assert all(torch.equal(one, other) for one, other in zip(results[0][0], results[1][0], strict=True))


def test_weights_that_no_device_holds_can_be_run_but_neither_digested_nor_edited(
    plain: ModelHandle, offloaded: ModelHandle
) -> None:
    """Activations are the same bits; what needs the bytes says which parameter, and what to do."""
    assert offloaded.device == torch.device("cpu") and offloaded.d_in(1) == 64
    assert torch.equal(recorded(offloaded, TOP)[TOP], recorded(plain, TOP)[TOP])
    parameter = plain.rewrite_parameter(LAYER)
    for use in (lambda: offloaded.weight(LAYER), offloaded.manifest, lambda: offloaded.upstream_digest(2)):
        with pytest.raises(BadModelError, match=r"offloaded.*device_map"):
            use()
    with pytest.raises(BadModelError, match=parameter.replace(".", r"\.")):
        EDITORS["rome"].solve(offloaded, [TOWER], settings("rome", steps=1), SolveInputs(moments()))


def test_loading_takes_a_device_map(plain: ModelHandle) -> None:
    loaded = sources.load(str(plain.folder), device_map={"": "cpu"})
    assert loaded.digest() == plain.digest() and torch.equal(run(loaded), run(plain))


def test_loading_refuses_a_device_map_that_offloads(plain: ModelHandle, tmp_path: Path) -> None:
    places = {name: "disk" if ".2" in name else "cpu" for name in parts(plain)}
    with pytest.raises(BadModelError, match=r"offload"):
        sources.load(str(plain.folder), device_map=places)
