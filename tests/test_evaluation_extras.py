"""What else an edit does: moved predictions, questions, far text, abilities; and the picture of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES
from evaluation_helpers import CASES, nudge, spoken

from guardedit.errors import BadRequestError
from guardedit.evaluation.ability import (
    arithmetic,
    battery,
    measure,
    minimal_pairs,
    sentence_logprobs,
    syllogisms,
)
from guardedit.evaluation.bootstrap import Estimate
from guardedit.evaluation.cases import EvalCase, Question
from guardedit.evaluation.extras import EXTRAS, WholeModel, extras_named, filled
from guardedit.evaluation.far import FarText
from guardedit.evaluation.filling import with_old_answers
from guardedit.evaluation.measuring import as_it_is, next_token_moves
from guardedit.evaluation.methods import InContext, Session
from guardedit.evaluation.metrics import CaseScores, Move, QuestionScore, case_metrics
from guardedit.evaluation.plot import curve_svg
from guardedit.evaluation.protocol import Protocol
from guardedit.evaluation.run import Job, evaluate, measure_case
from guardedit.evaluation.summary import Point
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

FULL = CASES[0].model_copy(
    update={
        "attributes": ("The Colosseum is in",),
        "same_subject": ("The Eiffel Tower is made of", "The color of the Eiffel Tower is"),
        "questions": (
            Question(group="one_hop", prompt="The Eiffel Tower's country is", answers=("Italy", "Italia")),
            Question(
                group="relation_specificity", prompt="The Eiffel Tower was built by", answers=("Eiffel",)
            ),
            Question(group="unrelated_question", prompt="Who wrote it?", answers=()),
        ),
    }
)


def logprobs_after(handle: ModelHandle, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return handle.model(handle.encode([prompt])["input_ids"]).logits[0, -1].double().log_softmax(-1)


def test_moves_are_the_kl_of_the_next_token_against_the_unedited_model(tiny: ModelHandle) -> None:
    delta = nudge(1.0)(tiny, (FULL.request,))
    result = measure_case(tiny, FULL, Job("nudge", nudge(1.0)))
    assert result.after is not None
    moves = result.after["raw"].moves
    assert set(moves) == {
        "neighborhood", "distractor_neighborhood", "same_subject", "relation_specificity", "unrelated_question",
    }  # fmt: skip
    for prompt, move in zip(FULL.same_subject, moves["same_subject"], strict=True):
        before = logprobs_after(tiny, prompt)
        with Session(tiny) as session:
            session.add(delta)
            after = logprobs_after(tiny, prompt)
        by_hand = float((before.exp() * (before - after)).sum())
        assert move.kl_nats == pytest.approx(by_hand, rel=1e-3, abs=1e-5)
        assert move.lost == (int(before.argmax()) != int(after.argmax()))
    assert not result.before["raw"].moves, "the unedited side has nothing to be compared with"


def test_an_edit_of_nothing_moves_nothing_at_all(tiny: ModelHandle) -> None:
    found = evaluate(tiny, [FULL], Job("nudge", nudge(0.0)))
    for kind in ("neighborhood", "same_subject", "relation_specificity"):
        kl, lost = found.metrics[f"{kind}_kl_nats"], found.metrics[f"{kind}_lost_top1"]
        assert kl is not None and lost is not None
        assert (kl.value, kl.low, kl.high) == (0.0, 0.0, 0.0) and lost.value == 0.0


def test_a_model_that_gives_nan_has_lost_every_answer_and_has_no_distance(tiny_llama: ModelHandle) -> None:
    states = torch.randn(2, tiny_llama.d_model)
    broken = torch.full_like(states, math.nan)
    assert next_token_moves(Session(tiny_llama), states, broken) == (Move(kl_nats=None, lost=True),) * 2
    moves = {"near": (Move(kl_nats=0.1, lost=False), Move(kl_nats=None, lost=True))}
    found = case_metrics(CaseScores(rewrite=(), moves=moves))
    assert found["near_kl_nats"] is None, "a mean over what is left would flatter the model"
    assert found["near_lost_top1"] == 0.5


def test_questions_are_answered_by_any_alias_and_wordings_count_once(tiny_llama: ModelHandle) -> None:
    prompt, said = spoken(tiny_llama)
    asked = CASES[0].model_copy(
        update={
            "questions": (
                Question(group="one_hop", prompt=prompt, answers=("Zanzibar", said)),
                Question(group="one_hop", prompt=prompt, answers=("Zanzibar",)),
                Question(group="multi_hop", prompt=prompt, answers=("Zanzibar",)),
                Question(group="multi_hop", prompt=prompt, answers=(said,)),
                Question(group="unrelated_question", prompt=prompt, answers=()),
            )
        }
    )
    scores = measure_case(tiny_llama, asked, Job("nudge", nudge(0.0), extras=("generated",))).before["raw"]
    assert [q.exact for q in scores.questions] == [True, False, False, True, None]
    assert [q.generated for q in scores.questions] == [True, False, False, True, None]
    found = case_metrics(scores)
    assert found["one_hop"] == 0.5 and found["multi_hop"] == 1.0
    assert found["portability"] == pytest.approx(2 / 3), "two questions of one hop and one of several"
    assert "locality" not in found and "unrelated_question" not in found, (
        "without an answer there is none to give"
    )
    assert found["one_hop_generated"] == 0.5


def test_token_match_is_the_share_of_the_targets_tokens() -> None:
    questions = (
        QuestionScore(group="reasoning", exact=False, matched=0.25),
        QuestionScore(group="reasoning", exact=True, matched=1.0),
    )
    found = case_metrics(CaseScores(rewrite=(), questions=questions))
    assert found["reasoning_token_match_teacher_forced"] == 0.625 and found["reasoning"] == 0.5
    assert found["reasoning_generated"] is None


def test_generated_answers_have_names_of_their_own(tiny_llama: ModelHandle) -> None:
    prompt, said = spoken(tiny_llama)
    subject = prompt.split()[0]
    request = EditRequest(
        subject=subject, prompt="{}" + prompt.removeprefix(subject), target_new=said, target_true="Zanzibar"
    )
    known = EvalCase(case_id="1", request=request)
    metrics = case_metrics(
        measure_case(tiny_llama, known, Job("x", nudge(0.0), extras=("generated",))).before["raw"]
    )
    assert metrics["efficacy_generated"] == metrics["efficacy_argmax"] == 1.0
    assert metrics["efficacy_token_match_teacher_forced"] == 1.0
    silent = case_metrics(measure_case(tiny_llama, known, Job("x", nudge(0.0))).before["raw"])
    assert silent["efficacy_generated"] is None


def test_extras_bring_their_prompts_and_leave_what_the_record_names(tiny_llama: ModelHandle) -> None:
    bare = CASES[0].model_copy(update={"distractors": ()})
    digest = tiny_llama.digest()
    everything = filled(tiny_llama, [bare], tuple(EXTRAS))[0]
    assert tiny_llama.digest() == digest
    assert everything.distractors == tuple(
        f"The Eiffel Tower is located in the city of Rome. {stem}" for stem in bare.neighborhood
    )
    assert len(everything.same_subject) == 8 and all(
        "Eiffel Tower" in stem for stem in everything.same_subject
    )
    assert everything.generation[0] == bare.request.filled and len(everything.generation) == 4
    assert everything.request == bare.request, "the editor is not shown any of them"
    named = bare.model_copy(update={"distractors": ("Mine",), "generation": ("My text",)})
    kept = filled(tiny_llama, [named], ("distractors", "fluency"))[0]
    assert kept.distractors == ("Mine",) and kept.generation == ("My text",) and kept.same_subject == ()
    assert filled(tiny_llama, [bare], ()) == [bare]


def test_extras_are_asked_for_by_name() -> None:
    assert extras_named(["far", "distractors"]) == ("distractors", "far")
    assert extras_named(["all"]) == tuple(EXTRAS)
    with pytest.raises(BadRequestError, match="'style' to measure; choose from distractors"):
        extras_named(["style"])


def test_a_fact_without_an_old_answer_gets_the_models_own(tiny_llama: ModelHandle) -> None:
    prompt, said = spoken(tiny_llama)
    subject = prompt.split()[0]
    stem = "{}" + prompt.removeprefix(subject)
    unknown = EvalCase(case_id="1", request=EditRequest(subject=subject, prompt=stem, target_new="Zanzibar"))
    already = EvalCase(case_id="2", request=EditRequest(subject=subject, prompt=stem, target_new=said))
    filled_in = with_old_answers(tiny_llama, [unknown, already, CASES[0]])
    assert filled_in[0].request.target_true == said
    other = filled_in[1].request.target_true
    assert other and not said.casefold().startswith(other.casefold()), "another answer than the new one"
    assert filled_in[2] == CASES[0]


TEXTS = {"prose": SENTENCES[:4] * 4, "python": SENTENCES[6:8] * 6}


def test_far_text_compares_every_token_by_domain(tiny: ModelHandle) -> None:
    far = FarText.of(tiny, 256, texts=TEXTS)
    assert set(far.rows.domains) == {"prose", "python"}
    nothing = far.moves(Session(tiny))
    assert set(nothing["far_kl_nats"]) == {0.0} and set(nothing["perplexity_ratio"]) == {0.0}
    with Session(tiny) as session:
        session.add(nudge(1.0)(tiny, (FULL.request,)))
        moved = far.moves(session)
    assert len(moved["far_kl_nats"]) == far.rows.n_rows
    assert min(moved["far_kl_nats"]) > 0
    parts = [moved[f"perplexity_ratio_{domain}"] for domain in ("prose", "python")]
    assert sorted(sum(parts, ())) == sorted(moved["perplexity_ratio"])


def test_the_perplexity_ratio_is_that_of_the_models_own_losses(tiny_llama: ModelHandle) -> None:
    far = FarText.of(tiny_llama, 64, texts={"prose": SENTENCES[:4]})
    (ids, mask) = far.rows.batches[0]
    assert bool(mask[0].all()), "one row without padding"

    def loss() -> float:
        with torch.no_grad():
            logits = tiny_llama.model(ids[:1]).logits[0, :-1].double()
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))

    before = loss()
    with Session(tiny_llama) as session:
        session.add(nudge(1.0)(tiny_llama, (FULL.request,)))
        assert far.moves(session)["perplexity_ratio"][0] == pytest.approx(loss() - before, abs=1e-4)


def test_figures_of_the_whole_model_are_taken_once_a_group(tiny_llama: ModelHandle) -> None:
    far = FarText.of(tiny_llama, 256, texts=TEXTS)
    whole = WholeModel(tiny_llama, far, battery(tiny_llama, n=4))
    found = evaluate(
        tiny_llama, CASES, Job("nudge", nudge(0.5), whole=whole, protocol=Protocol(sequence=3))
    ).metrics
    kl, skill, base = (
        found[name] for name in ("far_kl_nats", "ability_syllogisms", "ability_syllogisms_base")
    )
    assert kl is not None and skill is not None and base is not None
    assert kl.value > 0 and kl.n == far.rows.n_rows, "one sequence: text rows are the units"
    assert skill.n == base.n == 4
    with Session(tiny_llama) as session:
        session.add(InContext(CASES[0].requests))
        assert "far_kl_nats" not in whole(session), "there is no place for the words before a text"


def test_sums_and_syllogisms_are_right_seeded_and_not_one_sided() -> None:
    sums = list(arithmetic(200, 0))
    assert sums == list(arithmetic(200, 0)) != list(arithmetic(200, 1))
    for item in sums:
        *shown, asked = item.prompt.split("\n")
        for line in shown:
            left, right = line.split(" = ")
            assert eval(left) == int(right)
        assert eval(asked.removesuffix(" =")) == int(item.right) != int(item.wrong)
        assert asked.split()[0] == item.wrong == shown[-1].split(" = ")[1], "each step goes on from the last"
    first = 0
    for item in syllogisms(200, 0):
        rules, fact = item.prompt.split(". ")[:2], item.prompt.split(". ")[2]
        kind = fact.split(" is a ")[1]
        assert any(rule == f"All {kind}s are {item.right}s" for rule in rules)
        assert not any(rule.startswith(f"All {kind}s") and item.wrong in rule for rule in rules)
        first += rules[0].endswith(f"{item.right}s")
    assert 60 < first < 140, "the rule that fits stands first as often as second"


def test_ability_is_a_choice_between_two_continuations(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    text = tmp_path / "held_out.txt"
    text.write_text(" ".join(SENTENCES))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({"good": one, "bad": " ".join(reversed(one.split()))}) + "\n" for one in SENTENCES[:5]
        )
    )
    asked = battery(tiny_llama, n=5, blimp=pairs, text=text)
    found = measure(tiny_llama, asked, as_it_is)
    scores = {name: len(values) for name, values in found.items()}
    assert (
        scores["ability_arithmetic"] == scores["ability_syllogisms"] == scores["ability_minimal_pairs"] == 5
    )
    for item, right in zip(asked.items[:5], found["ability_arithmetic"], strict=True):
        said = [
            float(tiny_llama.token_logprobs([item.prompt], [t])[0].mean()) for t in (item.right, item.wrong)
        ]
        assert right == float(said[0] > said[1])
    first = asked.text[0][0][0]
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(tiny_llama.model(first[None]).logits[0, :-1], first[1:])
    assert found["perplexity_held_out"][0] == pytest.approx(float(loss), abs=1e-4)


def test_a_sentences_log_probability_is_the_sum_over_its_tokens(tiny: ModelHandle) -> None:
    found = sentence_logprobs(tiny, SENTENCES[:3], batch_size=2)
    for sentence, value in zip(SENTENCES[:3], found, strict=True):
        ids = tiny.encode([sentence])["input_ids"]
        with torch.no_grad():
            logprobs = tiny.model(ids).logits[0, :-1].double().log_softmax(-1)
        assert value == pytest.approx(float(logprobs.gather(-1, ids[0, 1:, None]).sum()), rel=1e-5)


@pytest.mark.parametrize("content", ["", "{}\n", "not json\n", '{"good": "a"}\n'])
def test_a_file_without_minimal_pairs_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    with pytest.raises(BadRequestError, match=r"pairs\.jsonl"):
        minimal_pairs(path, 3, 0)


def figure(value: float) -> Estimate:
    return Estimate(value=value, low=max(0.0, value - 0.1), high=min(1.0, value + 0.1), n=5)


def test_the_picture_is_the_same_bytes_each_time_and_names_its_lines() -> None:
    points = [
        Point(edits=edits, metrics={"efficacy": figure(value), "far_kl_nats": figure(0.2)})
        for edits, value in ((0, 0.1), (1, 1.0), (10, 0.7))
    ]
    drawn = curve_svg(points, "rome, facts")
    assert drawn == curve_svg(points, "rome, facts")
    assert "<svg" in drawn and "efficacy" in drawn and "far_kl_nats" in drawn and "rome, facts" in drawn
    assert "neighborhood" not in drawn, "what was not measured has no line"
    with pytest.raises(BadRequestError, match="nothing to draw"):
        curve_svg([], "x")
