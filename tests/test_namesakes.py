"""Subjects that end in the same word: made by rule, rehearsed before the write, read by the monitor after it."""

from __future__ import annotations

from drift_helpers import FAR, REQUEST, make_delta, make_saes
from drift_helpers import LAYER as MONITORED

from guardedit.cli.words import disturbed_lines
from guardedit.drift.measure import base_side, measure_drift
from guardedit.drift.probes import build_probes
from guardedit.edits.namesakes import SPARED, WATCHED, namesakes
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest, ProbePrompts, RiskReport, canonical
from guardedit.risk.neighbours import ProbeSizes, generated_probes
from guardedit.risk.rehearsal import rehearse
from tests.risk_helpers import TOWER, context

GLACIER = EditRequest(subject="Hood Glacier", prompt="The height of {} is", target_new="low")


def test_namesakes_end_in_the_subjects_last_word_and_are_others() -> None:
    found = namesakes("Mount Hudson Glacier")
    assert len(found) == len(WATCHED) - 1 == len(set(found))
    assert all(one.endswith(" Glacier") and "Hudson" not in one for one in found)
    assert namesakes("Italy") == () == namesakes("")


def test_what_an_editor_spares_is_not_what_it_is_judged_by() -> None:
    assert not {word for one in WATCHED for word in one.split()} & {w for one in SPARED for w in one.split()}


def test_prompts_from_before_there_were_namesakes_keep_their_bytes() -> None:
    assert b"namesake" not in canonical(ProbePrompts(near=("The capital of France is",)))


def test_generated_prompts_ask_the_requests_question_about_each(tiny_llama: ModelHandle) -> None:
    prompts = generated_probes(tiny_llama, GLACIER, ProbeSizes(namesake=3))
    assert prompts.namesake == tuple(f"The height of {first} Glacier is" for first in WATCHED[:3])
    assert "namesakes: 3" in prompts.note


def test_a_subject_of_one_word_has_none_and_no_score(tiny_llama: ModelHandle) -> None:
    one = TOWER.model_copy(update={"subject": "Italy"})
    risk = rehearse(context(tiny_llama), [one], make_delta(tiny_llama, 0.5))
    score = next(score for score in risk.scores if score.name == "rehearsed_namesake_kl")
    assert score.value is None and "no prompts" in (score.reason or "") and risk.prompts[0].namesake == ()


def test_the_monitor_reads_them_and_says_what_they_lost(tiny_llama: ModelHandle) -> None:
    prompts = generated_probes(tiny_llama, REQUEST, ProbeSizes(subject=2, near=2, entailed=0, target=1))
    probes = build_probes(tiny_llama, [REQUEST], [prompts], far_tokens=500, far_texts=FAR)
    assert set(prompts.namesake) == set(probes.prompts["namesake"].texts)
    saes = make_saes()
    side = base_side(tiny_llama, probes, MONITORED, tuple(saes))
    still = measure_drift(tiny_llama, side, probes, saes)
    moved = measure_drift(tiny_llama, side, probes, saes, change=make_delta(tiny_llama, 0.5))
    before, after = still.score("namesake_kl"), moved.score("namesake_kl")
    assert before is not None and after is not None and before.value == 0.0 and (after.value or 0.0) > 0
    assert after.n == len(prompts.namesake)
    lost = moved.score("namesake_lost_top1")
    assert lost is not None and lost.value is not None
    assert {probe.scope for probe in moved.probes} >= {"near", "namesake"}


def test_a_terminal_says_in_one_line_what_the_bearers_of_the_name_lose(tiny_llama: ModelHandle) -> None:
    risk = rehearse(context(tiny_llama), [TOWER], make_delta(tiny_llama, 0.5))
    report = RiskReport(scores=risk.scores, probes=risk.probes)
    lines = [line for line in disturbed_lines(report) if "others of the name" in line]
    assert len(lines) == 1 and f" of {len(WATCHED)}, as The " in lines[0]
    assert not any(
        first in line for first in WATCHED for line in disturbed_lines(report) if line not in lines
    )
