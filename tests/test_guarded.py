"""Guarded values: the edit holds by a margin, and what the model says about the subject moves less than under ROME."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edits_helpers import CONTEXTS, LAYER, TOWER, moments, p_new
from torch import Tensor

from benchmarks.editors_table import VALUES
from guardedit.editors.emmet import EmmetHparams, solve_emmet
from guardedit.editors.guarded import GuardedHparams, solve_guarded
from guardedit.editors.memit import MemitHparams
from guardedit.edits.contrast import Kept, guarded_values, make_asked, make_kept
from guardedit.edits.deltas import rehearsed
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.keys import keys_of
from guardedit.edits.objective import Fact, make_objective
from guardedit.edits.openings import OPENINGS, about
from guardedit.edits.rewordings import rewordings
from guardedit.edits.values import Value, ValueHparams, optimise_values
from guardedit.errors import BadRequestError, SolveError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.hooks import patch, rewrite_hook
from guardedit.models.tokens import tokenise
from guardedit.pipeline.kit import kit_folder, read_kit
from guardedit.records import EditRequest

REACH: dict[str, Any] = {"clamp_norm_factor": 50.0, "learning_rate": 0.3, "steps": 60}
GUARDED = ValueHparams(**REACH, keep_openings=4, keep_turns=2, hold_loss=3.0, margin=1.0)
ITALY = EditRequest(subject="Italy", prompt="The capital of {} is", target_new="Paris", target_true="Rome")
OPENING = "The price of {} is"


def fact(request: EditRequest = TOWER, words: tuple[str, ...] = ()) -> Fact:
    return Fact(request, CONTEXTS, "{} is a", rewordings=words)


def values(handle: ModelHandle, hparams: ValueHparams, *requests: EditRequest) -> list[Value]:
    keys = keys_of(handle, requests, LAYER, CONTEXTS)
    return list(optimise_values(handle, requests, keys, LAYER, CONTEXTS, hparams))


def last_logprobs(handle: ModelHandle, text: str, cut: str, residual: Tensor) -> Tensor:
    """Next-token log-probabilities of a whole forward pass, with the residual at the last token of `cut`."""
    at = len(tokenise(handle, cut).ids) - 1

    def add(output: Tensor) -> Tensor:
        where = torch.zeros(output.shape[1], 1)
        where[at] = 1.0
        return output + where * residual

    with torch.no_grad(), patch(handle, rewrite_hook(LAYER), add):
        logits: Tensor = handle.model(input_ids=torch.tensor([tokenise(handle, text).ids])).logits
    return logits[0, -1].double().log_softmax(-1)


@torch.no_grad()
def test_what_is_kept_is_the_divergence_of_whole_forward_passes(tiny: ModelHandle) -> None:
    residual = 0.5 * torch.randn(1, tiny.d_model, generator=torch.Generator().manual_seed(2))
    kept = make_kept(tiny, [fact()], (OPENING,), LAYER)
    moved, gap = kept.terms(residual)
    text, at = about(OPENING, TOWER)
    assert text == "The price of the Eiffel Tower is" and text[at:].startswith("Eiffel Tower")
    base, edited = (
        last_logprobs(tiny, text, text[: at + len(TOWER.subject)], r) for r in (0 * residual, residual)
    )
    assert float(moved[0]) == pytest.approx(float((base.exp() * (base - edited)).sum()), rel=1e-3)
    assert float(gap[0]) == pytest.approx(
        float(edited[kept.new[0]] - edited[kept.old[0]]), rel=1e-3, abs=1e-3
    )
    assert float(moved[0]) > 1e-4


@torch.no_grad()
def test_loss_and_gap_of_a_prompt_are_those_of_a_whole_forward_pass(tiny: ModelHandle) -> None:
    residual = 0.5 * torch.randn(1, tiny.d_model, generator=torch.Generator().manual_seed(3))
    nll, gap = make_asked(tiny, [Fact(ITALY, ("",), "{} is a")], LAYER).terms(residual)
    prompt, new, old = (
        tokenise(tiny, text).ids for text in (ITALY.filled, f"{ITALY.filled} Paris", f"{ITALY.filled} Rome")
    )
    start, at = len(prompt), len(tokenise(tiny, "The capital of Italy").ids) - 1
    assert new[:start] == prompt == old[:start] and len(new) > start
    where = torch.zeros(len(new), 1)
    where[at] = 1.0
    with patch(tiny, rewrite_hook(LAYER), lambda output: output + where * residual):
        logprobs = tiny.model(input_ids=torch.tensor([new])).logits[0].double().log_softmax(-1)
    chosen = [logprobs[position - 1, new[position]] for position in range(start, len(new))]
    assert float(nll[0]) == pytest.approx(-float(torch.stack(chosen).mean()), rel=1e-3)
    parting = next(i for i in range(start, len(new)) if new[i] != old[i])
    expected = logprobs[parting - 1, new[parting]] - logprobs[parting - 1, old[parting]]
    assert float(gap[0]) == pytest.approx(float(expected), rel=1e-3, abs=1e-3)


def test_without_an_old_answer_nothing_is_contrasted(tiny: ModelHandle) -> None:
    nameless = TOWER.model_copy(update={"target_true": None})
    with torch.no_grad():
        residual = torch.zeros(1, tiny.d_model)
        assert make_asked(tiny, [fact(nameless)], LAYER).terms(residual)[1].isinf().all()
        assert make_kept(tiny, [fact(nameless)], OPENINGS[:2], LAYER).terms(residual)[1].isinf().all()
    assert values(tiny, GUARDED, nameless)[0].residual.isfinite().all()


def test_a_larger_weight_keeps_more(tiny: ModelHandle) -> None:
    found = [
        values(tiny, replace(GUARDED, keep_weight=weight), TOWER)[0].kept_nats for weight in (0.0, 4.0, 40.0)
    ]
    assert found[0] > found[1] > found[2] > 0


def test_openings_that_ask_for_the_relation_itself_are_not_kept(
    tiny: ModelHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the unedited model's answer begins a target, the answer may change."""
    kept = make_kept(tiny, [fact()], (OPENING,), LAYER)
    assert kept.counts.tolist() == [1.0]
    said = str(tiny.tokenizer.decode([int(kept.base[0].argmax())]))
    word = TOWER.model_copy(update={"target_new": said.strip() or "a", "target_true": "Paris"})
    again = make_kept(tiny, [fact(word)], (OPENING,), LAYER)
    expected = 0.0 if int(again.new[0]) == int(kept.base[0].argmax()) else 1.0
    assert again.counts.tolist() == [expected]


def test_a_batch_of_guarded_values_is_each_one_s_own(tiny: ModelHandle) -> None:
    hparams = replace(GUARDED, steps=12)
    both = values(tiny, hparams, TOWER, ITALY)
    for value, request in zip(both, (TOWER, ITALY), strict=True):
        alone = values(tiny, hparams, request)[0]
        assert float((value.residual - alone.residual).norm()) < 5e-3 * float(alone.residual.norm())
        assert value.kept_nats == pytest.approx(alone.kept_nats, rel=2e-2)


def test_openings_take_turns(tiny_llama: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every opening is kept in every `keep_turns`-th step."""
    seen: list[int] = []
    terms = Kept.terms

    def noting(self: Kept, residuals: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(self.fact_of))
        return terms(self, residuals)

    monkeypatch.setattr(Kept, "terms", noting)
    hparams = replace(GUARDED, steps=4, keep_openings=5, keep_turns=2)
    with preserved(tiny_llama):
        guarded_values(tiny_llama, [fact()], LAYER, [10.0], hparams, [None], None)
    assert seen == [3, 2, 3, 2, 3, 3, 2]  # five steps, then all once more for the record


def test_a_residual_stays_inside_its_bound(tiny: ModelHandle) -> None:
    with preserved(tiny):
        found = guarded_values(tiny, [fact()], LAYER, [0.05], replace(GUARDED, steps=8), [None], None)[0]
    assert float(found.residual.norm()) <= 0.05 * (1 + 1e-5) and found.clamped


def test_a_loss_that_is_no_number_stops_the_search(tiny_llama: ModelHandle) -> None:
    with preserved(tiny_llama), pytest.raises(SolveError, match="not a number"):
        guarded_values(
            tiny_llama, [fact()], LAYER, [1.0], GUARDED, [torch.full((tiny_llama.d_model,), torch.nan)], None
        )


def test_the_editor_makes_the_target_likelier_and_says_what_was_kept(tiny: ModelHandle) -> None:
    hparams = GuardedHparams(
        layer=LAYER,
        contexts=("",),
        **{**REACH, "clamp_norm_factor": 3.0},
        hold_loss=0.0,
        keep_weight=0.1,
        margin=0.5,
        reword=False,
    )
    delta, before = solve_guarded(tiny, [TOWER], hparams, SolveInputs(moments())), p_new(tiny)
    assert delta.editor == "guarded" and delta.hparams["keep_openings"] == len(OPENINGS)
    assert float(delta.diagnostics["kept_nats"] or 0) > 0 and delta.diagnostics["keep_weight"] == 0.1
    with rehearsed(tiny, delta):
        assert p_new(tiny) > before + 0.05


def test_guarded_values_go_with_other_solvers(tiny_llama: ModelHandle) -> None:
    hparams = EmmetHparams(layer=LAYER, contexts=CONTEXTS, **{**REACH, "steps": 6}, keep_openings=4)
    delta = solve_emmet(tiny_llama, [TOWER, ITALY], hparams, SolveInputs(moments()))
    assert float(delta.diagnostics["kept_nats"] or 0) > 0 and delta.diagnostics["facts"] == 2
    assert float(delta.diagnostics["missed_share"] or 0) < 1e-8


def test_openings_are_about_the_subject_and_none_begins_with_it() -> None:
    assert len(set(OPENINGS)) == len(OPENINGS) == 12
    assert all(opening.count("{}") == 1 and not opening.startswith("{}") for opening in OPENINGS)
    assert about("{} and I", ITALY) == ("Italy and I", 0)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("{} lies in the city of", ("{} the city of", "{}, of", "{} lies the of", "About {}: lies in the city of")),
        ("The capital of {} is", ("The capital of {}, is", "About {}: is")),
        ("We went to {}", ()),
        ("The {}'s owner is", ()),
    ],
)  # fmt: skip
def test_rewordings_leave_words_out_and_keep_the_blank(prompt: str, expected: tuple[str, ...]) -> None:
    found = rewordings(prompt)
    assert found == expected
    assert all(text.count("{}") == 1 and text != prompt for text in found)


def test_a_reworded_value_answers_to_the_rewordings_too(tiny: ModelHandle) -> None:
    """Mean loss over the rewordings, from the objective: lower than that of a value that never saw them."""
    keys = keys_of(tiny, [TOWER], LAYER, ("",))
    objective = make_objective(tiny, [Fact(TOWER, (), "{} is a", rewordings=rewordings(TOWER.prompt))], LAYER)
    nll = []
    for reword in (False, True):
        hparams = ValueHparams(steps=25, clamp_norm_factor=50.0, stop_loss=0.0, reword=reword)
        value = optimise_values(tiny, [TOWER], keys, LAYER, ("",), hparams)[0]
        with torch.no_grad():
            nll.append(float(objective.losses(value.residual.float()[None]).nll[0]))
    assert nll[1] < nll[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reword", "yes"),
        ("keep_openings", -1),
        ("keep_openings", 13),
        ("keep_openings", 2.5),
        ("keep_turns", 0),
        ("keep_weight", -1.0),
        ("keep_contrast", "x"),
        ("hold_loss", "x"),
        ("margin", -0.5),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(name: str, value: object) -> None:
    with pytest.raises(BadRequestError, match=name):
        replace(GuardedHparams(layer=1), **{name: value})  # type: ignore[arg-type]


def test_the_settings_file_of_the_manual_gives_memit_the_values_of_guarded() -> None:
    page = (Path(__file__).parent.parent / "docs" / "guarded.md").read_text("utf-8")
    blocks = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL)]
    named = next(block["memit"] for block in blocks if "memit" in block)
    usual = read_kit(kit_folder("smollm2-135m") / "kit.json")["hparams"]
    plain = {key: tuple(v) if isinstance(v, list) else v for key, v in {**usual["memit"], **named}.items()}
    other = {key: tuple(v) if isinstance(v, list) else v for key, v in usual["guarded"].items()}
    memit, guarded = MemitHparams(**plain), GuardedHparams(**other)
    for name in VALUES:
        assert getattr(memit, name) == getattr(guarded, name), name
    assert {"steps", "keep_openings"} <= set(VALUES)
