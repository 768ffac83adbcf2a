"""Batches and sequences: who is measured when, against what, and that a cut-off run ends as if it had not been."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from evaluation_helpers import CASES, LAYER, case, nudge

from guardedit.edits.deltas import EditDelta, LowRank, WeightChange
from guardedit.errors import IntegrityError, SolveError
from guardedit.evaluation.cases import EvalCase, Question
from guardedit.evaluation.methods import Solve
from guardedit.evaluation.protocol import Protocol
from guardedit.evaluation.run import Job, evaluate, measure_case
from guardedit.evaluation.state import CaseResult, StateFile
from guardedit.evaluation.summary import Evaluation, markdown
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

MANY = tuple(
    case(f"{i:02d}", f"{who} {i}") for i, who in enumerate(("Tower", "Hall", "Bridge", "Gate", "Dome") * 2)
)
Requests = tuple[EditRequest, ...]


def seeded(handle: ModelHandle, requests: Requests) -> EditDelta:
    """A joint stand-in: a change that depends on all requests and, as a real one, on the weights it is solved on."""
    names = "|".join(request.subject for request in requests)
    noise = torch.Generator().manual_seed(sum(map(ord, names)))
    d_out, d_in = handle.weight(LAYER).shape
    left = torch.randn(d_out, 1, generator=noise, dtype=torch.float64) * (
        0.4 + float(handle.weight(LAYER)[0, 0].detach()) / 10
    )
    right = torch.randn(1, d_in, generator=noise, dtype=torch.float64)
    change = WeightChange(handle.rewrite_parameter(LAYER), LAYER, LowRank(left, right))
    return EditDelta((change,), "seeded", {}, {"solved_for": names})


def job(solve: Solve = seeded, *, joint: bool = True, batch: int = 1, sequence: int = 1) -> Job:
    return Job("seeded", solve, joint=joint, protocol=Protocol(batch, sequence))


def stored(path: Path) -> list[CaseResult]:
    return [CaseResult.model_validate_json(line) for line in path.read_bytes().splitlines()[1:]]


@pytest.mark.parametrize(
    ("n", "marks"), [(1, (1,)), (4, (1, 2, 4)), (10, (1, 2, 5, 10)), (30, (1, 2, 5, 10, 20, 30))]
)
def test_checkpoints_are_few_and_end_with_the_last_step(n: int, marks: tuple[int, ...]) -> None:
    assert Protocol(sequence=n).checkpoints(n) == marks


def test_cases_are_cut_into_groups_and_steps() -> None:
    assert Protocol().groups([1, 2]) == [[[1]], [[2]]]
    assert Protocol(batch=2).groups([1, 2, 3]) == [[[1, 2]], [[3]]]
    assert Protocol(sequence=2).groups([1, 2, 3]) == [[[1], [2]], [[3]]]
    assert Protocol(batch=2, sequence=4).groups([1, 2, 3, 4, 5]) == [[[1, 2], [3, 4]], [[5]]]


def test_a_batch_is_one_solve_that_every_case_of_it_is_measured_under(
    tiny: ModelHandle, tmp_path: Path
) -> None:
    asked: list[list[str]] = []

    def solve(handle: ModelHandle, requests: Requests) -> EditDelta:
        asked.append([request.subject for request in requests])
        return seeded(handle, requests)

    digest = tiny.digest()
    evaluate(tiny, MANY[:5], job(solve, batch=2), state=tmp_path / "run.jsonl")
    assert tiny.digest() == digest
    assert asked == [["Tower 0", "Hall 1"], ["Bridge 2", "Gate 3"], ["Dome 4"]]
    found = stored(tmp_path / "run.jsonl")
    assert [(r.case_id, r.group, r.edits) for r in found] == [
        ("00", 0, 2), ("01", 0, 2), ("02", 1, 2), ("03", 1, 2), ("04", 2, 1),
    ]  # fmt: skip
    assert found[0].diagnostics["solved_for"] == "Tower 0|Hall 1"
    # The last batch holds one case: it is what a single edit of that case gives.
    assert found[4].after == measure_case(tiny, MANY[4], job()).after


def test_a_sequence_is_measured_against_the_unedited_model(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    digest = tiny_llama.digest()
    evaluate(tiny_llama, MANY[:4], job(sequence=4), state=tmp_path / "run.jsonl")
    assert tiny_llama.digest() == digest
    found = stored(tmp_path / "run.jsonl")
    alone = {one.case_id: measure_case(tiny_llama, one, job()) for one in MANY[:4]}
    assert all(result.before == alone[result.case_id].before for result in found)
    first = found[0]
    assert (first.case_id, first.edits) == ("00", 1) and first.after == alone["00"].after
    # Steps 1, 2 and 4 are checkpoints: all cases so far. Step 3: its own case only.
    assert [(r.case_id, r.edits, r.checkpoint) for r in found] == [
        ("00", 1, True), ("00", 2, True), ("01", 2, True), ("02", 3, False),
        ("00", 4, True), ("01", 4, True), ("02", 4, True), ("03", 4, True),
    ]  # fmt: skip
    last = next(r for r in found if (r.case_id, r.edits) == ("00", 4))
    assert last.after != first.after, "later edits move the figures of earlier ones"


def test_a_sequence_does_not_hold_the_edits_that_are_in_the_model_already(tiny: ModelHandle) -> None:
    held: list[weakref.ref[EditDelta]] = []

    def solve(handle: ModelHandle, requests: Requests) -> EditDelta:
        gc.collect()
        # The one before may still be a local of the loop.
        assert [ref() is None for ref in held[:-1]] == [True] * len(held[:-1])
        made = seeded(handle, requests)
        held.append(weakref.ref(made))
        return made

    evaluate(tiny, MANY[:4], job(solve, sequence=4))
    assert len(held) == 4


def test_batches_on_top_of_each_other(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    digest = tiny_llama.digest()
    found = evaluate(tiny_llama, MANY[:4], job(batch=2, sequence=4), state=tmp_path / "run.jsonl")
    assert tiny_llama.digest() == digest
    assert [(r.case_id, r.edits) for r in stored(tmp_path / "run.jsonl")] == [
        ("00", 2), ("01", 2), ("00", 4), ("01", 4), ("02", 4), ("03", 4),
    ]  # fmt: skip
    assert [point.edits for point in found.curve] == [0, 2, 4]
    assert found.about["protocol"].startswith("4 edits in batches of 2")


def test_the_editor_is_told_of_the_facts_before(tiny_llama: ModelHandle) -> None:
    told: list[list[str]] = []

    def after(earlier: Requests) -> Solve:
        told.append([request.subject for request in earlier])
        return seeded

    evaluate(tiny_llama, MANY[:3], Job("x", seeded, solve_after=after, protocol=Protocol(sequence=3)))
    assert told == [["Tower 0"], ["Tower 0", "Hall 1"]]


class CutOffError(Exception):
    """Stands for a power cut."""


@pytest.mark.parametrize("stop_at", [1, 3, 6, 8])
def test_a_sequence_that_was_cut_off_ends_as_if_it_had_not_been(
    tiny_llama: ModelHandle, tmp_path: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, whole_run = tiny_llama.digest(), evaluate(tiny_llama, MANY[:5], job(sequence=5))
    solved: list[str] = []

    def solve(handle: ModelHandle, requests: Requests) -> EditDelta:
        solved.append(requests[0].subject)
        return seeded(handle, requests)

    real, written = StateFile.append, 0

    def failing(self: StateFile, result: CaseResult) -> None:
        nonlocal written
        written += 1
        if written > stop_at:
            raise CutOffError
        real(self, result)

    state = tmp_path / "run.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(StateFile, "append", failing)
        with pytest.raises(CutOffError):
            evaluate(tiny_llama, MANY[:5], job(solve, sequence=5), state=state)
    assert tiny_llama.digest() == digest, "a cut in the middle of a sequence leaves no edit behind"
    resumed = evaluate(tiny_llama, MANY[:5], job(solve, sequence=5), state=state)
    assert resumed.variants == whole_run.variants and resumed.curve == whole_run.curve
    assert sorted(solved) == sorted({request.subject for one in MANY[:5] for request in one.requests}), (
        "no edit is solved twice"
    )


def test_stored_deltas_of_another_run_or_changed_ones_are_not_used(
    tiny_llama: ModelHandle, tmp_path: Path
) -> None:
    state = tmp_path / "run.jsonl"
    evaluate(tiny_llama, MANY[:3], job(sequence=3), state=state)
    shelf = tmp_path / "run.jsonl.deltas"
    assert len(list(shelf.glob("*.safetensors"))) == 3
    state.unlink()
    first = sorted(shelf.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="changed"):
        evaluate(tiny_llama, MANY[:3], job(sequence=3), state=state)
    state.unlink(missing_ok=True)
    other = Job("other", seeded, joint=True, protocol=Protocol(sequence=3))
    assert evaluate(tiny_llama, MANY[:3], other, state=state).n == 3, "another editor's are solved anew"


def test_an_edit_of_a_sequence_that_cannot_be_solved_counts_as_failed_and_the_others_go_on(
    tiny_llama: ModelHandle, tmp_path: Path
) -> None:
    def picky(handle: ModelHandle, requests: Requests) -> EditDelta:
        if requests[0].subject == "Hall 1":
            raise SolveError("no finite update")
        return seeded(handle, requests)

    state = tmp_path / "run.jsonl"
    found = evaluate(tiny_llama, MANY[:3], job(picky, sequence=3), state=state)
    assert (found.n, found.failed) == (3, 1)
    failed = next(r for r in stored(state) if r.case_id == "01" and r.edits == 3)
    assert failed.error == "no finite update"
    assert failed.after is not None, "the other edits have moved its neighbours"
    shown = found.metrics["efficacy_magnitude"]
    assert shown is not None and shown.n == 3
    again = evaluate(tiny_llama, MANY[:3], job(picky, sequence=3), state=state)
    assert again.variants == found.variants


def results(*rows: tuple[str, int, float, float]) -> list[CaseResult]:
    """(case, edits, P(new), P(true)) as measurements of a sequence; unedited P(new) is 0.1 and P(true) 0.9."""
    import math

    from guardedit.evaluation.metrics import CaseScores, PromptScore
    from guardedit.evaluation.scoring import TargetScore

    def side(new: float, true: float) -> dict[str, CaseScores]:
        scores = [
            TargetScore(logprob=math.log(p), greedy=p > 0.5, matched=float(p > 0.5)) for p in (new, true)
        ]
        return {"raw": CaseScores(rewrite=(PromptScore(new=scores[0], true=scores[1]),))}

    return [
        CaseResult(case_id=c, before=side(0.1, 0.9), after=side(new, true), seconds=1.0, edits=edits)
        for c, edits, new, true in rows
    ]


def figures(rows: list[CaseResult]) -> Evaluation:
    from guardedit.evaluation.summary import summarise

    return summarise(rows, about={}, n_seen=2, seconds=1.0, seed=0)


def test_retention_is_of_the_edits_that_had_worked_and_the_headline_is_the_end() -> None:
    found = figures(
        results(
            ("a", 1, 0.8, 0.1),
            ("a", 2, 0.2, 0.7),
            ("a", 4, 0.2, 0.7),  # worked, then lost
            ("b", 2, 0.9, 0.1),
            ("b", 4, 0.9, 0.1),  # worked and kept
            ("c", 3, 0.2, 0.8),
            ("c", 4, 0.9, 0.1),  # never worked by itself
            ("d", 4, 0.9, 0.1),
        )
    )
    values = {name: figure.value for name, figure in found.metrics.items() if figure is not None}
    assert values["efficacy"] == 3 / 4, "a lost, b, c and d say the new object at the end"
    assert values["efficacy_when_written"] == 3 / 4, "a, b and d did right after their own edit"
    assert values["retention"] == pytest.approx(2 / 3), "of these three, b and d still do"
    assert found.metrics["retention"].n == 3  # type: ignore[union-attr]
    points = {point.edits: point.metrics["efficacy"].value for point in found.curve}  # type: ignore[union-attr]
    assert points[0] == 0.0 and points[4] == 3 / 4 and points[2] == 1 / 2
    assert found.n == 4


def test_the_order_of_measurements_does_not_matter() -> None:
    rows = results(("a", 1, 0.8, 0.1), ("b", 2, 0.9, 0.1), ("a", 2, 0.2, 0.7))
    assert figures(rows).model_dump() == figures(rows[::-1]).model_dump()


def test_the_table_has_a_row_for_every_number_of_edits(tiny_llama: ModelHandle) -> None:
    table = markdown(evaluate(tiny_llama, MANY[:4], job(sequence=4)))
    head = next(line for line in table.splitlines() if line.startswith("| edits |"))
    rows = table[table.index(head) :].splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["0", "1", "2", "4"]
    assert "efficacy" in head and "neighborhood" in head


def test_a_case_of_several_edits_is_solved_as_one_or_in_turn_and_measured_on_all(
    tiny_llama: ModelHandle,
) -> None:
    two = CASES[0].model_copy(
        update={
            "more": (CASES[1].request,),
            "questions": tuple(
                Question(group="multi_hop", prompt=text, answers=("Rome",))
                for text in ("Where is it?", "Which city?")
            ),
        }
    )

    def counting(sizes: list[int]) -> Callable[[ModelHandle, Requests], EditDelta]:
        def solve(handle: ModelHandle, requests: Requests) -> EditDelta:
            sizes.append(len(requests))
            return nudge(0.5)(handle, requests)

        return solve

    digest = tiny_llama.digest()
    for joint, expected in ((True, [2]), (False, [1, 1])):
        sizes: list[int] = []
        result = measure_case(tiny_llama, two, job(counting(sizes), joint=joint))
        assert sizes == expected
        assert result.after is not None
        assert len(result.after["raw"].rewrite) == 2 and len(result.after["raw"].questions) == 2
        assert tiny_llama.digest() == digest


def test_the_state_of_a_sequence_names_its_protocol(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    cases: tuple[EvalCase, ...] = MANY[:2]
    evaluate(tiny_llama, cases, job(sequence=2), state=tmp_path / "run.jsonl")
    header = json.loads((tmp_path / "run.jsonl").read_bytes().splitlines()[0])
    assert header["edits"] == {"batch": 1, "sequence": 2}
