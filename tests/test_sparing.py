"""Sparing namesakes: the same constraint met in another metric, which moves them less and everything else more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from closed_form_helpers import constrained
from edits_helpers import CONTEXTS, LAYER, TOWER, metric, moment_of, moments

from guardedit.editors import EDITORS
from guardedit.editors.contextual import ContextualHparams
from guardedit.editors.emmet import EmmetHparams, solve_emmet
from guardedit.editors.memit import MemitHparams, solve_memit
from guardedit.editors.rome import RomeHparams, solve_rome
from guardedit.edits.deltas import EditDelta, encode
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.keys import key_of, keys_at_subject
from guardedit.edits.namesakes import SPARED, namesakes
from guardedit.edits.sparing import spared
from guardedit.edits.value_shelf import ValueShelf
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle
from guardedit.pipeline import open as open_guard
from guardedit.records import EditRequest
from guardedit.risk.compare import compare
from guardedit.risk.neighbours import generated_probes

HPARAMS = RomeHparams(layer=LAYER, contexts=CONTEXTS, steps=4, clamp_norm_factor=20.0)
ITALY = EditRequest(subject="Italy", prompt="The capital of {} is", target_new="Milan")
CURIE = EditRequest(subject="Marie Curie", prompt="{} was born in", target_new="London")


def solved(handle: ModelHandle, weight: float, request: EditRequest = TOWER) -> EditDelta:
    return solve_rome(handle, [request], replace(HPARAMS, spare=weight), SolveInputs(moments()))


def sparing(handle: ModelHandle, weight: float, request: EditRequest = TOWER) -> torch.Tensor:
    return spared(handle, [request], CONTEXTS, moment_of(metric()), LAYER, weight).matrix


def namesake_keys(handle: ModelHandle) -> torch.Tensor:
    others = namesakes(TOWER.subject, SPARED)
    prompts = [TOWER.prompt.replace("{}", one) for one in others]
    return keys_at_subject(handle, prompts, others, LAYER).double()


def test_weight_zero_and_subjects_of_one_word_leave_the_published_update(tiny_llama: ModelHandle) -> None:
    moment = moment_of(metric())
    assert spared(tiny_llama, [TOWER], CONTEXTS, moment, LAYER, 0.0) is moment
    assert spared(tiny_llama, [ITALY], CONTEXTS, moment, LAYER, 1.0) is moment
    plain, spares = solved(tiny_llama, 0.0, ITALY), solved(tiny_llama, 1.0, ITALY)
    torch.testing.assert_close(plain.update(LAYER).dense(), spares.update(LAYER).dense(), rtol=0, atol=0)


def test_deltas_from_before_there_was_sparing_keep_their_bytes(tiny_llama: ModelHandle) -> None:
    assert b'"spare"' not in encode(solved(tiny_llama, 0.0))
    assert solved(tiny_llama, 0.5).hparams["spare"] == 0.5


def test_the_energy_is_that_of_the_namesakes_and_of_the_subjects_own_keys_around_their_mean(
    tiny_llama: ModelHandle,
) -> None:
    theirs = namesake_keys(tiny_llama)
    added = spared(tiny_llama, [TOWER], CONTEXTS, moment_of(metric()), LAYER, 2.0, steady=0.0).matrix
    torch.testing.assert_close(
        added, moment_of(metric()).matrix + 2.0 * theirs.T @ theirs / len(theirs), rtol=0, atol=1e-4
    )
    steadied = sparing(tiny_llama, 2.0) - added
    assert float(torch.linalg.eigvalsh(steadied).min()) > -1e-9 and float(steadied.trace()) > 0


def test_the_update_is_the_constrained_optimum_in_the_new_metric(tiny_llama: ModelHandle) -> None:
    """Against an independent solution of the KKT system."""
    key = key_of(tiny_llama, TOWER, LAYER, CONTEXTS).k_star
    update = solved(tiny_llama, 0.5).update(LAYER).dense()
    residual = update @ key
    independent = constrained(key[:, None], residual[:, None], sparing(tiny_llama, 0.5))
    torch.testing.assert_close(update, torch.from_numpy(independent), rtol=1e-6, atol=1e-9)


def test_the_more_namesakes_weigh_the_less_they_and_the_more_text_is_moved(tiny_llama: ModelHandle) -> None:
    """Of the minimum of f + w·g, g falls and f rises with w; f is what ordinary text, g what the rest is moved by."""
    c, extra = moment_of(metric()).matrix, sparing(tiny_llama, 1.0) - moment_of(metric()).matrix
    text, rest = [], []
    for weight in (0.0, 0.01, 0.1, 1.0, 10.0):
        update = solved(tiny_llama, weight).update(LAYER).dense()
        text.append(float(torch.trace(update @ c @ update.T)))
        rest.append(float(torch.trace(update @ extra @ update.T)))
    assert text == sorted(text) and rest == sorted(rest, reverse=True) and rest[-1] < 0.5 * rest[0]


def test_batches_take_the_weight_too(tiny_llama: ModelHandle) -> None:
    facts = [TOWER, ITALY, CURIE]
    keys = torch.stack([key_of(tiny_llama, fact, LAYER, CONTEXTS).k_star for fact in facts], 1)
    shared = {"layer": LAYER, "contexts": CONTEXTS, "steps": 4, "clamp_norm_factor": 20.0}
    inputs, theirs = SolveInputs(moments()), namesake_keys(tiny_llama)
    met = [
        solve_emmet(tiny_llama, facts, EmmetHparams(**shared, spare=w), inputs).update(LAYER).dense()
        for w in (0.0, 1.0)
    ]
    torch.testing.assert_close(met[0] @ keys, met[1] @ keys, rtol=1e-4, atol=1e-6)
    ridged = [
        solve_memit(tiny_llama, facts, MemitHparams(**shared, ridge=1e-4, spare=w), inputs)
        .update(LAYER)
        .dense()
        for w in (0.0, 1.0)
    ]
    for plain, spares in (met, ridged):
        assert float((spares @ theirs.T).norm()) < float((plain @ theirs.T).norm())


@pytest.mark.slow
def test_on_the_default_model_namesakes_that_nobody_spared_by_name_stay_too(
    default_handle: ModelHandle, tmp_path: Path
) -> None:
    """Glaciers that are judged are others than those that are spared; the edit holds either way."""
    asked = EditRequest(
        subject="Hood Glacier", prompt="{} is located in the continent of", target_new="Europe"
    )
    guard = open_guard(home=tmp_path)
    prompts = generated_probes(default_handle, asked).namesake
    inputs = SolveInputs(guard.kit.second_moments, values=ValueShelf(tmp_path / "values"))
    lost = []
    for weight in (0.0, 0.03):
        settings = guard.kit.settings("rome", {"spare": weight, "n_prefixes": 4})
        delta = solve_rome(default_handle, [asked], settings, inputs)
        (own, *others) = compare(default_handle, delta, [asked.filled, *prompts], ["near"] * 13)
        assert str(default_handle.tokenizer.decode([own.top_after])).strip() == "Europe"
        lost.append(sum(one.kl_nats for one in others) / len(others))
    assert lost[1] < 0.5 * lost[0]


@pytest.mark.parametrize("name", ["rome", "guarded", "emmet", "memit"])
def test_a_negative_weight_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadRequestError, match="spare"):
        EDITORS[name].hparams(spare=-1.0)


def test_an_edit_behind_a_gate_has_nothing_to_spare() -> None:
    with pytest.raises(BadRequestError, match="spare"):
        ContextualHparams(spare=0.1)
