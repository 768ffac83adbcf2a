"""The monitor's probes: which prompts and which text it reads, and what of them a person is shown."""

from __future__ import annotations

from drift_helpers import CITIES, FAR, PROMPTS, REQUEST, make_delta, make_probes
from monitor_helpers import Sides, measured, sides

from guardedit.drift.probes import build_probes
from guardedit.models.handle import ModelHandle
from guardedit.records import ProbePrompts

__all__ = ["sides"]


def test_prompts_are_read_once_and_targets_are_no_bystanders(tiny_llama: ModelHandle) -> None:
    doubled = ProbePrompts(near=(REQUEST.filled, "The capital of France is", "The capital of France is"))
    probes = build_probes(tiny_llama, [REQUEST], [doubled], far_tokens=500, far_texts=FAR)
    assert probes.prompts["near"].texts == ("The capital of France is",)
    assert set(probes.prompts) == {"target", "near", "distractor"}
    (sentence,) = probes.prompts["distractor"].texts
    assert sentence == "The Eiffel Tower is located in the city of Rome. The capital of France is"
    assert probes.plain_near == ("The capital of France is",)


def test_the_models_own_answer_stands_in_for_a_missing_old_target(tiny_llama: ModelHandle) -> None:
    request = REQUEST.model_copy(update={"target_true": None})
    probes = build_probes(tiny_llama, [request], [ProbePrompts()], far_tokens=500, far_texts=FAR)
    assert probes.targets[0].old.strip()


def test_control_text_keeps_its_size_by_domain_and_says_what_is_short(tiny_llama: ModelHandle) -> None:
    probes = make_probes(tiny_llama, far_tokens=1000)
    tokens = dict.fromkeys(FAR, 0)
    row = 0
    for _, mask in probes.far.batches:
        for n in mask.sum(1).tolist():
            tokens[probes.far.domains[row]] += n
            row += 1
    assert all(450 <= n <= 500 for n in tokens.values())
    short = build_probes(tiny_llama, [REQUEST], [PROMPTS], far_tokens=10**6, far_texts=FAR)
    assert any("were asked for" in note for note in short.notes)
    assert make_probes(tiny_llama).digest == make_probes(tiny_llama).digest


def test_probe_changes_show_tokens_a_person_can_check(tiny_llama: ModelHandle, sides: Sides) -> None:
    report = measured(tiny_llama, sides, make_delta(tiny_llama, 2.0))
    shown = [change for change in report.probes if change.scope == "near"]
    assert {change.prompt for change in shown} == set(PROMPTS.near)
    assert any(change.before != change.after for change in shown)
    assert all(0 <= change.p_after <= 1 for change in shown)
    assert len(CITIES) * 2 == len(shown)
