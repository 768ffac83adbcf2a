"""What every editor owes, whichever it is: a new entry of EDITORS is tested here without a line of its own.

Editors that keep a fact to a context take other requests and promise that nothing changes outside: test_gates.py.
Those that need a trained map: test_remedi.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from edits_helpers import LAYER, TOWER, ZERO, moments, p_new, twin

from guardedit.editors import EDITORS
from guardedit.edits.deltas import EditDelta, decode, encode, record_of, rehearsed, written
from guardedit.edits.inputs import SolveInputs
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.records import DeltaRecord

EVERYWHERE = sorted(name for name, one in EDITORS.items() if not (one.in_context or one.needs_map))
pytestmark = pytest.mark.parametrize("editor", EVERYWHERE)
SMALL = {"contexts": ("",), "steps": 20}
"""The bare prompt alone: a random model does not treat one subject behind two prefixes as one key."""


@pytest.fixture(params=("gpt2", "llama"))
def tiny(request: pytest.FixtureRequest, tiny_handles: dict[str, ModelHandle]) -> ModelHandle:
    """The two plain families: test_families.py holds every editor to its contract on all the others."""
    return tiny_handles[request.param]


class Interrupted(Exception):
    """Somebody pressed Ctrl-C."""


HOLDING: dict[str, Any] = {"hold_loss": 0.0, "margin": 0.5, "keep_weight": 0.1, "reword": False,
    "learning_rate": 0.5, "clamp_norm_factor": 3.0}  # fmt: skip
"""A random model's answers are all nearly as unlikely: a margin over one of them says nothing about likelihood, and a
residual that is too long moves the prompt's other tokens."""


def settings(editor: str, **named: Any) -> Any:
    """The editor's own defaults at the tiny models' layer, made quicker where it has the setting."""
    kind = EDITORS[editor].hparams
    usual = {"layer": LAYER, **SMALL, **(HOLDING if editor == "guarded" else {})}
    quick = {name: value for name, value in usual.items() if name in kind.__dataclass_fields__}
    return kind(**{**quick, **named})


def at_layer(editor: str, layer: Any) -> dict[str, Any]:
    """The setting that says where to write; skips editors that write everywhere."""
    known = EDITORS[editor].hparams.__dataclass_fields__
    if not {"layer", "layers"} & set(known):
        pytest.skip(f"{editor} chooses no layer")
    return {"layer": layer} if "layer" in known else {"layers": (layer,)}


def solved(editor: str, handle: ModelHandle, progress: Any = None, **named: Any) -> EditDelta:
    layer = named.get("layer", *named.get("layers", (LAYER,)))
    return EDITORS[editor].solve(
        handle, [TOWER], settings(editor, **named), SolveInputs(moments(layer), progress=progress)
    )


def test_the_edit_makes_the_new_target_more_likely(editor: str, tiny: ModelHandle) -> None:
    delta, before = solved(editor, tiny), p_new(tiny)
    with rehearsed(tiny, delta):
        tried = p_new(tiny)
    with written(tiny, delta):
        real = p_new(tiny)
    assert real > before + 0.05
    # (W + ΔW)x against Wx + ΔWx in float32.
    assert tried == pytest.approx(real, abs=1e-3)


def test_only_the_parameters_that_the_delta_names_are_written(editor: str, tiny: ModelHandle) -> None:
    delta, before = solved(editor, tiny), tiny.manifest()
    with written(tiny, delta):
        after = tiny.manifest()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == set(delta.parameters) != set()
    assert {tiny.rewrite_parameter(layer) for layer in delta.layers} <= changed
    assert tiny.manifest() == before


@pytest.mark.parametrize("layer", [0, 2])
def test_any_layer_below_the_last_can_be_edited(editor: str, layer: int, tiny: ModelHandle) -> None:
    delta, before = solved(editor, tiny, **at_layer(editor, layer)), p_new(tiny)
    assert layer in delta.layers and delta.lowest_layer == layer
    with written(tiny, delta):
        assert p_new(tiny) > before


@pytest.mark.parametrize("raising", [False, True])
def test_solving_leaves_weights_modes_flags_and_random_state_alone(
    editor: str, raising: bool, tiny: ModelHandle
) -> None:
    own = twin(tiny)
    own.model.train()
    next(own.model.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in own.model.parameters()]
    before, state = own.digest(), torch.get_rng_state()

    def progress(_: str, share: float) -> None:
        if raising and share > 0:
            raise Interrupted

    try:
        solved(editor, own, progress)
        assert not raising
    except Interrupted:
        assert raising
    assert own.digest() == before and torch.equal(torch.get_rng_state(), state)
    assert [parameter.requires_grad for parameter in own.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in own.model.parameters())
    assert all(module.training for module in own.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in own.model.modules())


def test_the_same_request_and_seed_give_the_same_bytes(editor: str, tiny: ModelHandle) -> None:
    first = solved(editor, tiny)
    torch.manual_seed(1234)
    second = solved(editor, tiny)
    assert encode(first) == encode(second)
    assert (first.hparams, first.diagnostics) == (second.hparams, second.diagnostics)


def test_dropout_in_a_model_left_in_train_mode_changes_nothing(editor: str, tiny_gpt2: ModelHandle) -> None:
    """The tiny GPT-2 has a dropout of 0.1; solving is done in eval mode all the same."""
    own = twin(tiny_gpt2)
    own.model.train()
    assert encode(solved(editor, own)) == encode(solved(editor, tiny_gpt2))


def test_settings_and_diagnostics_fit_a_record_and_say_how_it_went(editor: str, tiny: ModelHandle) -> None:
    delta = solved(editor, tiny)
    found = record_of(tiny, delta, model_digest=ZERO, statistics_digests={})
    again = DeltaRecord.model_validate_json(found.model_dump_json())
    assert again == found and found.editor == editor
    assert again.hparams["seed"] == 0 and again.hparams.get("layer", LAYER) == LAYER
    assert {"steps", "loss_first_nats", "loss_last_nats", "p_new_at_solution"} <= again.diagnostics.keys()
    assert all(not isinstance(v, float) or math.isfinite(v) for v in again.diagnostics.values())
    assert float(again.diagnostics["loss_last_nats"] or 0) < float(again.diagnostics["loss_first_nats"] or 0)
    assert encode(decode(encode(delta), again)) == encode(delta)


def test_progress_ends_at_one_and_never_goes_back(editor: str, tiny_llama: ModelHandle) -> None:
    shares: list[float] = []
    solved(editor, tiny_llama, lambda _, share: shares.append(share))
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] == 1.0


def test_no_steps_at_all_change_nothing_and_crash_nothing(editor: str, tiny_llama: ModelHandle) -> None:
    delta, before = solved(editor, tiny_llama, lambda *_: None, steps=0), tiny_llama.digest()
    assert all(float(change.update.dense().abs().max()) == 0.0 for change in delta.changes)
    with written(tiny_llama, delta):
        assert tiny_llama.digest() == before


def test_no_requests_are_a_bad_request(editor: str, tiny_llama: ModelHandle) -> None:
    with pytest.raises(BadRequestError):
        EDITORS[editor].solve(tiny_llama, [], settings(editor), SolveInputs(moments()))


def test_a_layer_that_does_not_exist_is_a_bad_request(editor: str, tiny_llama: ModelHandle) -> None:
    with pytest.raises(BadRequestError, match="layers 0 to 3"):
        solved(editor, tiny_llama, **at_layer(editor, 4))


@pytest.mark.parametrize("layer", [-1, "5", 1.0, None])
def test_a_layer_that_is_no_number_is_a_bad_request(editor: str, layer: Any) -> None:
    with pytest.raises(BadRequestError, match="layer"):
        settings(editor, **at_layer(editor, layer))


@pytest.mark.parametrize("contexts", [("Berlin. ",), ("Berlin. ", ""), "Berlin", (1,)])
def test_contexts_must_start_with_the_bare_prompt(editor: str, contexts: Any) -> None:
    with pytest.raises(BadRequestError, match="contexts"):
        settings(editor, contexts=contexts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_small_types_are_edited_too(editor: str, dtype: torch.dtype, tiny: ModelHandle) -> None:
    own = twin(tiny, dtype)
    delta, before, digest = solved(editor, own), p_new(own), own.digest()
    with written(own, delta):
        assert own.dtype == dtype
        assert p_new(own) > before + 0.05
    assert own.digest() == digest
