"""An evaluation edits, measures and takes back; it can be cut off and taken up, and cannot be mixed up with another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evaluation_helpers import CASES, LAYER, nudge, spoken

from guardedit.edits.deltas import Dense, EditDelta, WeightChange
from guardedit.errors import BadRequestError, IntegrityError, SolveError, StaleError
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.run import Job, Selection, evaluate, measure_case, select
from guardedit.evaluation.summary import markdown
from guardedit.executors import LocalExecutor, split
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest


def job(size: float = 1.0, **changes: object) -> Job:
    return Job(editor="nudge", solve=nudge(size), hparams={"size": size}, **changes)  # type: ignore[arg-type]


def test_an_edit_of_nothing_changes_no_figure(tiny: ModelHandle) -> None:
    found = evaluate(tiny, CASES, job(0.0))
    for name in (
        "efficacy",
        "paraphrase",
        "neighborhood",
        "distractor_neighborhood",
        "neighborhood_magnitude",
    ):
        assert found.metrics[name] == found.metrics[f"{name}_base"]
    assert found.metrics["neighborhood_loss"] is not None
    assert found.metrics["neighborhood_loss"].value == 0.0


def test_every_case_is_measured_on_the_unedited_model(tiny: ModelHandle) -> None:
    digest = tiny.digest()
    alone = [measure_case(tiny, one, job(2.0)) for one in CASES]
    assert tiny.digest() == digest
    backwards = [measure_case(tiny, one, job(2.0)) for one in reversed(CASES)][::-1]
    for first, second in zip(alone, backwards, strict=True):
        assert first.before == second.before
        assert first.after == second.after
        assert first.after != first.before, "an edit of this size moves the figures"


def test_the_outcome_has_the_fields_that_programs_rely_on(tiny_llama: ModelHandle) -> None:
    found = evaluate(tiny_llama, CASES, job(variants=("raw", "chat"))).as_json()
    assert found["n"] == 3 and found["seconds_per_edit"] > 0
    for name in ("efficacy", "paraphrase", "neighborhood", "neighborhood_base"):
        assert found["metrics"][name].keys() >= {"value", "low", "high"}
    assert found["metrics"] == found["variants"]["raw"] != found["variants"]["chat"]
    assert found["model_digest"] == tiny_llama.digest()
    assert found["editor"] == "nudge" and found["seed"] == 0 and found["protocol"]


def test_the_editor_sees_no_evaluation_prompt(tiny_llama: ModelHandle) -> None:
    assert measure_case(tiny_llama, CASES[0], job()).diagnostics["seen"] == ""


def test_a_run_that_was_cut_off_is_taken_up_and_gives_the_same_figures(
    tiny_llama: ModelHandle, tmp_path: Path
) -> None:
    state = tmp_path / "state" / "run.jsonl"
    solved: list[str] = []

    def stopping(handle: ModelHandle, requests: tuple[EditRequest, ...]) -> EditDelta:
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(requests[0].subject)
        return nudge(1.0)(handle, requests)

    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_llama, CASES, Job("nudge", stopping, {"size": 1.0}), state=state)
    with state.open("ab") as file:
        file.write(b'{"case_id": "2", "befo')  # what a crash in the middle of a write leaves

    resumed = evaluate(tiny_llama, CASES, job(), state=state)
    whole = evaluate(tiny_llama, CASES, job())
    assert resumed.metrics == whole.metrics
    assert len(state.read_bytes().splitlines()) == 1 + len(CASES)
    assert solved == ["Eiffel Tower", "Colosseum"]


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"size": 2.0}, {"variants": ("chat",)}, {"dataset_digest": "x"}]
)
def test_results_of_another_run_are_refused(
    tiny_llama: ModelHandle, tmp_path: Path, other: dict[str, object]
) -> None:
    evaluate(tiny_llama, CASES, job(), state=tmp_path / "run.jsonl")
    with pytest.raises(StaleError, match="another evaluation"):
        evaluate(tiny_llama, CASES, job(**other), state=tmp_path / "run.jsonl")  # type: ignore[arg-type]
    with pytest.raises(StaleError, match="cases_digest"):
        evaluate(tiny_llama, CASES[:2], job(), state=tmp_path / "run.jsonl")


def test_a_finished_line_that_was_changed_is_an_integrity_failure(
    tiny_llama: ModelHandle, tmp_path: Path
) -> None:
    state = tmp_path / "run.jsonl"
    evaluate(tiny_llama, CASES, job(), state=state)
    lines = state.read_bytes().splitlines(keepends=True)
    for at, says in ((0, "line 1"), (2, "line 3")):
        state.write_bytes(
            b"".join(line.replace(b"{", b"", 1) if i == at else line for i, line in enumerate(lines))
        )
        with pytest.raises(IntegrityError, match=says):
            evaluate(tiny_llama, CASES, job(), state=state)


def test_a_case_that_cannot_be_solved_is_recorded_and_counts_against_the_editor(
    tiny_llama: ModelHandle,
) -> None:
    def refuse(handle: ModelHandle, requests: tuple[EditRequest, ...]) -> EditDelta:
        raise SolveError("no finite update")

    found = evaluate(tiny_llama, CASES, Job("never", refuse))
    assert (found.n, found.failed) == (3, 3)
    assert found.metrics["efficacy"] is not None and found.metrics["efficacy"].value == 0.0
    assert found.metrics["neighborhood"] == found.metrics["neighborhood_base"]


def test_an_update_that_is_not_finite_is_a_failed_case_and_touches_nothing(tiny_llama: ModelHandle) -> None:
    def explode(handle: ModelHandle, requests: tuple[EditRequest, ...]) -> EditDelta:
        huge = torch.full(handle.weight(LAYER).shape, 1e300, dtype=torch.float64)
        change = WeightChange(handle.rewrite_parameter(LAYER), LAYER, Dense(huge))
        return EditDelta((change,), "explode", {}, {})

    digest = tiny_llama.digest()
    assert evaluate(tiny_llama, CASES, Job("explode", explode)).failed == 3
    assert tiny_llama.digest() == digest


def test_a_model_that_was_changed_on_the_way_gives_no_figure(tiny_llama: ModelHandle) -> None:
    weight = tiny_llama.weight(0)
    kept = weight.detach().clone()

    def careless(handle: ModelHandle, requests: tuple[EditRequest, ...]) -> EditDelta:
        with torch.no_grad():
            handle.weight(0)[0, 0] += 1
        return nudge(1.0)(handle, requests)

    try:
        with pytest.raises(IntegrityError, match="no figure"):
            evaluate(tiny_llama, CASES, Job("careless", careless))
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_only_facts_that_greedy_decoding_says_are_known(tiny_llama: ModelHandle) -> None:
    prompt, said = spoken(tiny_llama)
    subject = prompt.split()[0]

    def asking(case_id: str, target_true: str) -> EvalCase:
        stem = "{}" + prompt.removeprefix(subject)
        request = EditRequest(subject=subject, prompt=stem, target_new="Oslo", target_true=target_true)
        return EvalCase(case_id=case_id, request=request)

    cases = [asking("known", said), asking("unknown", "Warsaw" if said != "Warsaw" else "Rome")]
    found = select(tiny_llama, cases, known_only=True)
    assert [one.case_id for one in found.cases] == ["known"]
    assert found.n_seen == 2
    assert select(tiny_llama, cases).cases == tuple(cases)


def test_the_limit_ends_the_search(tiny_llama: ModelHandle) -> None:
    found = select(tiny_llama, CASES, limit=2)
    assert (found.cases, found.n_seen) == (CASES[:2], 2)


@pytest.mark.parametrize(
    ("selection", "wanted", "says"),
    [
        (Selection((), 40), {}, "no case to evaluate; 40"),
        (CASES, {"variants": ("spoken",)}, "spoken"),
        (CASES, {"variants": ()}, "choose from"),
        ((CASES[0], CASES[0]), {}, "twice"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    tiny_llama: ModelHandle, selection: Selection, wanted: dict[str, object], says: str
) -> None:
    with pytest.raises(BadRequestError, match=says):
        evaluate(tiny_llama, selection, job(**wanted))  # type: ignore[arg-type]


def test_the_table_shows_the_unedited_model_beside_each_figure(tiny_llama: ModelHandle) -> None:
    table = markdown(evaluate(tiny_llama, CASES, job(0.0)))
    row = next(line for line in table.splitlines() if line.startswith("| raw | neighborhood |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == cells[4] and cells[5] == "3"


def test_shards_come_back_in_order_and_cover_everything() -> None:
    seen: list[tuple[int, int]] = []
    shards = split(range(10), 4)
    answers = list(LocalExecutor().map(sum, shards, lambda done, total: seen.append((done, total))))
    assert answers == [6, 22, 17]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match="size of 1 or more"):
        split([1], 0)


def test_methods_may_share_the_unedited_sides(tiny: ModelHandle) -> None:
    shared: dict[str, object] = {}
    plain = [evaluate(tiny, CASES, job(size)) for size in (1.0, 2.0)]
    sharing = [evaluate(tiny, CASES, job(size, remembered=shared)) for size in (1.0, 2.0)]
    assert [one.metrics for one in sharing] == [one.metrics for one in plain]
    assert plain[0].metrics != plain[1].metrics
    assert shared.keys() == {case.case_id for case in CASES}
