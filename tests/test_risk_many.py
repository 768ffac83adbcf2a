"""Many requests at once: each as alone, and of very many a sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from guardedit.edits.keys import key_of, keys_at_subject
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest
from guardedit.risk import banks
from guardedit.risk.key_view import KeyView, views_of
from guardedit.risk.many import SURROUNDED
from guardedit.risk.measure import measure
from guardedit.risk.neighbours import ProbeSizes
from guardedit.risk.rehearsal import RehearsalView
from tests.risk_helpers import TOWER
from tests.risk_layer_helpers import LAYERS, REQUESTS, at_layer, delta_at


def test_many_requests_looked_at_together_are_as_each_alone(tiny: ModelHandle) -> None:
    one = replace(at_layer(tiny, 1), contexts=("", "It is said that. "))
    for view in views_of(one, REQUESTS):
        alone = KeyView(one, view.request, view.n_near)
        assert {"key", "near", "near_keys"} <= set(vars(view))
        assert torch.allclose(view.key.k_star, alone.key.k_star, rtol=1e-5, atol=1e-6)
        assert view.key.position == alone.key.position
        if view.request is not TOWER:  # a relation of the table; the others' subjects are sampled
            assert view.near.probes[:2] == alone.near.probes[:2]
        vars(alone)["near"] = view.near
        assert torch.allclose(view.near_keys, alone.near_keys, rtol=1e-4, atol=1e-5)
    alone_key = key_of(tiny, TOWER, 1, one.contexts)
    (view, *_) = views_of(one, [TOWER])
    assert torch.equal(view.key.k_star, alone_key.k_star)


def test_near_keys_of_several_layers_are_taken_in_one_pass_and_are_those_of_each(
    tiny_llama: ModelHandle,
) -> None:
    from guardedit.edits.keys import keys_at_subjects

    prompts, subjects = [request.filled for request in REQUESTS], [request.subject for request in REQUESTS]
    together = keys_at_subjects(tiny_llama, prompts, subjects, (2, 0, 1))
    for layer in (0, 1, 2):
        assert torch.equal(together[layer], keys_at_subject(tiny_llama, prompts, subjects, layer))


def test_banks_of_several_layers_are_those_of_each(
    tiny_llama: ModelHandle, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("GUARDEDIT_CACHE", str(tmp_path / "together"))
    together = {**banks.control_banks(tiny_llama, LAYERS, 200)}, banks.protected_banks(tiny_llama, LAYERS, 60)
    monkeypatch.setenv("GUARDEDIT_CACHE", str(tmp_path / "apart"))
    for layer in LAYERS:
        apart = banks.control_bank(tiny_llama, layer, 200), banks.protected_bank(tiny_llama, layer, 60)
        for both, one in zip(together, apart, strict=True):
            assert torch.equal(both[layer].keys, one.keys) and both[layer].digest == one.digest
            assert both[layer].contexts == one.contexts


def many(n: int) -> list[EditRequest]:
    return [EditRequest(subject=f"Tower {i}", prompt="The {} is in", target_new="Rome", target_true="Oslo",
                        relation="location", neighborhood=("The Colosseum is in", "The Louvre is in"))
            for i in range(n)]  # fmt: skip


def test_very_many_requests_are_rehearsed_on_a_sample_and_all_of_them_on_their_own_prompt(
    tiny_llama: ModelHandle,
) -> None:
    one = replace(at_layer(tiny_llama, 1), sizes=ProbeSizes(subject=2, near=2, entailed=0, target=1))
    n = SURROUNDED + 5
    view = RehearsalView(one, tuple(KeyView(one, request, 2) for request in many(n)), delta_at(tiny_llama, 1))
    again = RehearsalView(one, view.views, view.delta)
    assert view.sampled == again.sampled and len(view.sampled) == SURROUNDED
    around = {i for i in range(n) if any(o.scope != "target" for o in view.compared[i])}
    assert around == set(view.sampled)
    assert all(view.compared[i][0].prompt == request.filled for i, request in enumerate(view.requests))
    assert len(view.probabilities) == 2 * n
    other = RehearsalView(replace(one, seed=1), view.views, view.delta)
    assert other.sampled != view.sampled
    (few, *_) = (RehearsalView(one, view.views[:3], view.delta),)
    assert few.sampled == (0, 1, 2)


def test_the_notes_say_that_a_sample_was_rehearsed(tiny_llama: ModelHandle) -> None:
    one = replace(at_layer(tiny_llama, 1), sizes=ProbeSizes(subject=1, near=2, entailed=0, target=1))
    report = measure(one, many(SURROUNDED + 1), delta_at(tiny_llama, 1))
    said = f"stand around {SURROUNDED} requests drawn with seed 0"
    assert any(said in note for note in report.notes)
    few = measure(one, many(2), delta_at(tiny_llama, 1))
    assert not any("drawn with seed" in note for note in few.notes)
