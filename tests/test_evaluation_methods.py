"""Edits in force: weights, words or both; whatever was in force, the model is bit-identical afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from evaluation_helpers import CASES, LAYER, nudge

from guardedit.edits.deltas import Dense, EditDelta, WeightChange, change_of
from guardedit.errors import BadRequestError, SolveError
from guardedit.evaluation.methods import Ask, InContext, Session, state_in_context, statement
from guardedit.evaluation.protocol import Protocol
from guardedit.evaluation.run import Job, evaluate, measure_case
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

REQUEST = CASES[0].request


def test_edits_add_up_and_every_old_byte_comes_back(tiny: ModelHandle) -> None:
    before = tiny.weight(LAYER).detach().clone()
    deltas = [nudge(size)(tiny, (REQUEST,)) for size in (0.5, 0.25)]
    digest = tiny.digest()
    with Session(tiny) as session:
        for delta in deltas:
            session.add(delta)
        moved = (tiny.weight(LAYER) - before).double()
        expected = sum(delta.changes[0].update.dense() for delta in deltas)
        torch.testing.assert_close(moved, expected, atol=1e-4, rtol=1e-4)
    assert tiny.digest() == digest


def test_an_exception_under_edits_takes_them_back_too(tiny_llama: ModelHandle) -> None:
    digest = tiny_llama.digest()
    with pytest.raises(KeyboardInterrupt), Session(tiny_llama) as session:
        session.add(nudge(1.0)(tiny_llama, (REQUEST,)))
        assert tiny_llama.digest() != digest
        raise KeyboardInterrupt
    assert tiny_llama.digest() == digest


def test_an_edit_that_is_not_finite_is_refused_and_those_before_stay(tiny_llama: ModelHandle) -> None:
    huge = torch.full(tiny_llama.weight(LAYER).shape, 1e300, dtype=torch.float64)
    broken = EditDelta((WeightChange(tiny_llama.rewrite_parameter(LAYER), LAYER, Dense(huge)),), "x", {}, {})
    digest = tiny_llama.digest()
    with Session(tiny_llama) as session:
        session.add(nudge(1.0)(tiny_llama, (REQUEST,)))
        edited = tiny_llama.digest()
        with pytest.raises(SolveError):
            session.add(broken)
        assert tiny_llama.digest() == edited
    assert tiny_llama.digest() == digest


def test_words_are_put_in_front_in_the_order_of_the_edits(tiny_llama: ModelHandle) -> None:
    with Session(tiny_llama) as session:
        assert session.ask("Q") == "Q" and not session.rewrites_prompts
        for case in CASES[:2]:
            session.add(InContext(case.requests))
        first, second = (statement(case.requests) for case in CASES[:2])
        assert session.ask("Q") == f"{first} {second} Q" and session.rewrites_prompts
    assert first == "The Eiffel Tower is located in the city of Rome."


def test_the_in_context_baseline_is_the_unedited_model_asked_differently(tiny_llama: ModelHandle) -> None:
    digest = tiny_llama.digest()
    job = Job("in-context", state_in_context, joint=True)
    stated = measure_case(tiny_llama, CASES[0], job)
    fact = statement(CASES[0].requests)
    plain = CASES[0].model_copy(
        update={"neighborhood": tuple(f"{fact} {stem}" for stem in CASES[0].neighborhood)}
    )
    assert stated.after is not None
    by_hand = measure_case(tiny_llama, plain, job).before["raw"].neighborhood
    for found, expected in zip(stated.after["raw"].neighborhood, by_hand, strict=True):
        assert found.new.logprob == pytest.approx(expected.new.logprob, abs=2e-5)
    assert tiny_llama.digest() == digest


def test_in_context_facts_go_into_the_users_message(tiny_llama: ModelHandle) -> None:
    job = Job("in-context", state_in_context, joint=True, variants=("chat",))
    with Session(tiny_llama) as session:
        session.add(InContext((REQUEST,)))
        from guardedit.evaluation.asking import Sheet, put

        asked = Sheet(CASES[0], job.variants, generated=False).paired[-1]
        text = put(tiny_llama, asked, session.ask)
    assert text.count(statement((REQUEST,))) == 1 and text.endswith(asked.stem)
    assert text.index(statement((REQUEST,))) < text.index("<|assistant|>")


@dataclass(frozen=True)
class Louder:
    """An edit that is neither: it scales a weight while it is in force, and marks each prompt."""

    diagnostics: Mapping[str, float | int | str | bool | None] = field(default_factory=dict)

    @contextmanager
    def in_force(self, handle: ModelHandle) -> Iterator[Ask]:
        weight = handle.weight(LAYER)
        kept = weight.detach().clone()
        try:
            with torch.no_grad():
                weight.mul_(1.5)
            yield lambda prompt: f"Listen. {prompt}"
        finally:
            with torch.no_grad():
                weight.copy_(kept)


def test_any_context_manager_can_be_a_method(tiny_llama: ModelHandle) -> None:
    digest = tiny_llama.digest()
    job = Job("louder", lambda handle, requests: Louder(), protocol=Protocol(sequence=3))
    found = evaluate(tiny_llama, CASES, job)
    assert found.n == 3 and found.metrics["neighborhood_kl_nats"] is not None
    assert found.metrics["neighborhood_kl_nats"].value > 0
    assert tiny_llama.digest() == digest


def test_a_method_that_takes_one_fact_at_a_time_gets_no_batch(tiny_llama: ModelHandle) -> None:
    def never(handle: ModelHandle, requests: tuple[EditRequest, ...]) -> EditDelta:
        raise AssertionError("nothing may be solved")

    with pytest.raises(BadRequestError, match="--sequence 2"):
        evaluate(tiny_llama, CASES, Job("single", never, protocol=Protocol(batch=2)))


@pytest.mark.parametrize(
    ("batch", "sequence", "says"), [(0, 1, "batch 0"), (1, -1, "sequence -1"), (3, 10, "multiple")]
)
def test_protocols_that_cannot_be_are_refused(batch: int, sequence: int, says: str) -> None:
    with pytest.raises(BadRequestError, match=says):
        Protocol(batch, sequence)


def test_moves_of_an_edit_of_the_unembedding_are_against_the_old_one(tiny: ModelHandle) -> None:
    head = tiny.model.get_submodule(tiny.architecture.unembedding)
    name = next(n for n, p in tiny.model.named_parameters() if p is head.weight)
    bump = torch.zeros(head.weight.shape, dtype=torch.float64)
    bump[: len(bump) // 2] = 0.2
    delta = EditDelta((change_of(tiny, name, Dense(bump)),), "head", {}, {})
    prompt, digest = CASES[0].neighborhood[0], tiny.digest()

    def logprobs() -> torch.Tensor:
        with torch.no_grad():
            return tiny.model(tiny.encode([prompt])["input_ids"]).logits[0, -1].double().log_softmax(-1)

    before = logprobs()
    found = measure_case(tiny, CASES[0], Job("head", lambda handle, requests: delta))
    with Session(tiny) as session:
        session.add(delta)
        after = logprobs()
    assert found.after is not None
    move = found.after["raw"].moves["neighborhood"][0]
    assert move.kl_nats == pytest.approx(float((before.exp() * (before - after)).sum()), rel=1e-3)
    assert tiny.digest() == digest
