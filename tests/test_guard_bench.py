"""The guard's own benchmark: what it measures is not what the guard saw, and a run that was cut off goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import nudge, spoken
from guard_helpers import CASES, ROOT, TABLE
from pipeline_helpers import Home, home, request_of, world

from guardedit.cli.guarding import guard_job
from guardedit.errors import BadRequestError, StaleError
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.guard.adversarial import KINDS, adversarial
from guardedit.evaluation.guard.command import GuardJob
from guardedit.evaluation.guard.far_sample import FarSample, looked_at
from guardedit.evaluation.guard.frames import measured, read_rows, to_frame
from guardedit.evaluation.guard.outcome_prompts import Neighbours, named, outcome_prompts
from guardedit.evaluation.guard.predictors import seen_by_the_guard
from guardedit.evaluation.guard.rows import Bench, one_row, run_rows
from guardedit.evaluation.guard.strata import Chosen, chosen_edits
from guardedit.evaluation.protocol import Protocol
from guardedit.evaluation.rowfile import RowFile
from guardedit.models.handle import ModelHandle

__all__ = ["home", "world"]


# -- far text


def test_no_change_moves_no_far_text(tiny_llama: ModelHandle) -> None:
    sample = FarSample.of(tiny_llama, 1, n_tokens=64)
    moved = sample.moves(nudge(0.0)(tiny_llama, (request_of(),)))
    assert all(value == 0 for name, value in moved.items() if "lost" in name)
    assert all(abs(value) < 1e-6 for value in moved.values())


def test_far_damage_is_that_of_two_whole_forward_passes(tiny_llama: ModelHandle) -> None:
    from guardedit.edits.deltas import rehearsed

    delta = nudge(0.05)(tiny_llama, (request_of(),))
    sample = FarSample.of(
        tiny_llama, 2, n_tokens=64, more={"own": ["Paris is in France and Rome in Italy. " * 8]}
    )
    kls: dict[str, list[float]] = {}
    for batch in sample.batches:
        chosen = looked_at(batch.mask)
        with torch.no_grad():
            before = (
                tiny_llama.logits_at(tiny_llama.hidden(batch.ids, batch.mask), chosen)
                .double()
                .log_softmax(-1)
            )
            with rehearsed(tiny_llama, delta):
                after = (
                    tiny_llama.logits_at(tiny_llama.hidden(batch.ids, batch.mask), chosen)
                    .double()
                    .log_softmax(-1)
                )
        for domain, kl in zip(batch.domains, (before.exp() * (before - after)).sum(-1).tolist(), strict=True):
            kls.setdefault(domain, []).append(kl)
    moved = sample.moves(delta)
    assert moved["kl_nats/own"] == pytest.approx(np.mean(kls["own"]), rel=1e-3)
    assert moved["kl_nats"] == pytest.approx(np.mean([np.mean(one) for one in kls.values()]), rel=1e-3)


def test_looked_at_positions_are_followed_by_a_real_token() -> None:
    mask = torch.tensor([[1] * 7 + [0] * 3, [1] * 10])
    assert looked_at(mask).nonzero().tolist() == [[0, 2], [0, 5], [1, 2], [1, 5], [1, 8]]


# -- prompts


def test_outcome_prompts_and_neighbours_are_none_that_the_guard_saw(home: Home) -> None:
    guard = home.guard()
    far_away = [
        EvalCase(case_id=who, request=request_of(2, subject=who, target_true="Oslo"))
        for who in ("Zembla", "Ruritania", "Freedonia", "Sylvania")
    ]
    pool = Neighbours.of([*CASES, *far_away])
    bench = Bench(guard, "rome", pool)
    request = named(CASES[2].request, pool, 2, 0)
    assert len(request.neighborhood) == 2
    from guardedit.risk.key_view import views_of
    from guardedit.risk.rehearsal import RehearsalView

    context = bench.contexts[bench.layers[0]]
    view = RehearsalView(context, views_of(context, [request]), nudge(0.01)(guard.handle, (request,)))
    seen, about = seen_by_the_guard(view)
    found = outcome_prompts(guard.handle, request, pool, seen, about, 0)
    rehearsed_texts = {one.prompt for own in view.compared for one in own}
    assert rehearsed_texts <= set(seen)
    prompts, groups = found.flat()
    assert not set(prompts) & set(seen)
    assert set(groups) >= {"subject", "near"}
    assert not any(who in prompt for prompt in found.groups["near"] for who in ("France", *about) if who)


def test_neighbours_are_others_of_the_relation_those_with_the_old_object_first() -> None:
    cases = [
        EvalCase(case_id=str(i), request=request_of(2, subject=who, target_true=what))
        for i, (who, what) in enumerate(
            (
                ("France", "Oslo"),
                ("Norway", "Oslo"),
                ("Peru", "Lima"),
                ("New France", "Oslo"),
                ("Chile", "Lima"),
            )
        )
    ]
    found = Neighbours.of(cases).around(cases[0].request, 0)
    assert found[0] == "Norway"
    assert sorted(found[1:]) == ["Chile", "Peru"]
    assert "New France" not in found


def test_every_kind_of_adversarial_edit_has_a_dozen_with_one_blank_and_is_in_every_prefix() -> None:
    assert all(
        len(rows) == 12 and all(prompt.count("{}") == 1 for prompt, _, _ in rows) for rows in KINDS.values()
    )
    first = [one.stratum for one in chosen_edits(None, None, "adversarial", len(KINDS))]  # type: ignore[arg-type]
    assert sorted(first) == sorted(KINDS)
    assert len({case.case_id for _, case in adversarial()}) == 12 * len(KINDS)


# -- rows


def test_a_run_that_was_cut_off_goes_on_and_measures_nothing_twice(home: Home, tmp_path: Path) -> None:
    guard = home.guard()
    bench = Bench(guard, "rome", Neighbours.of(CASES), deltas=tmp_path / "deltas")
    edits = [Chosen("known", case) for case in CASES[:2]]
    before = guard.handle.digest()
    path = tmp_path / "rows.jsonl"
    first = run_rows(bench, edits[:1], RowFile(path, bench.header()))
    both = run_rows(bench, edits, RowFile(path, bench.header()))
    assert both[0] == first[0]
    assert [row["case_id"] for row in both] == ["0", "1"]
    assert guard.handle.digest() == before
    assert {"leakage", "hidden_cosine"} <= both[1]["predictors"].keys()
    assert {"subject/kl_nats", "far/kl_nats", "far/kl_nats/python"} <= both[1]["outcomes"].keys()
    assert len(list((tmp_path / "deltas").iterdir())) == 2
    with pytest.raises(StaleError, match="differs in"):
        run_rows(bench, edits, RowFile(path, bench.header() | {"seed": 1}))


def test_the_command_line_s_job_holds_every_option(tmp_path: Path) -> None:
    far = tmp_path / "novels.jsonl"
    job = guard_job(
        tmp_path / "facts",
        tmp_path / "out",
        "memit",
        ["known"],
        7,
        3,
        "train",
        [f"fiction={far}"],
        [10, 1],
        5,
    )
    assert job == GuardJob(
        facts=tmp_path / "facts",
        out=tmp_path / "out",
        editors=("memit",),
        strata=("known",),
        limit=7,
        split="train",
        seed=3,
        hparams=None,
        far={"fiction": far},
        together=(Protocol(10), Protocol(1, 5)),
    )


def test_settings_over_the_kits_are_used_and_bind_the_rows(home: Home) -> None:
    guard = home.guard()
    plain = Bench(guard, "rome", Neighbours.of(CASES))
    own = Bench(guard, "rome", Neighbours.of(CASES), hparams={"learning_rate": 0.125})
    assert own.settings.learning_rate == 0.125 != plain.settings.learning_rate
    assert own.header() == plain.header() | {"hparams": {"learning_rate": 0.125}}
    with pytest.raises(BadRequestError, match="no setting 'haste'"):
        _ = Bench(guard, "rome", Neighbours.of(CASES), hparams={"haste": 1}).settings


def test_an_edit_that_cannot_be_solved_is_a_row_that_says_so(home: Home, tmp_path: Path) -> None:
    guard = home.guard()
    prompt, word = spoken(guard.handle)
    subject = prompt.split()[0]
    said_already = request_of(
        subject=subject, prompt=prompt.replace(subject, "{}", 1), target_new=word, target_true=None
    )
    bench = Bench(guard, "rome", Neighbours.of(CASES))
    odd = EvalCase(case_id="odd", request=said_already)
    (row,) = run_rows(bench, [Chosen("known", odd)], RowFile(tmp_path / "rows.jsonl", bench.header()))
    assert "already answers" in row["error"] and "predictors" not in row
    assert measured(to_frame([row]), "rome", ("known",)).empty


def test_rows_outlive_another_policy_or_risk_model_but_not_other_statistics(home: Home) -> None:
    named = Bench(home.guard(), "rome", Neighbours.of(CASES)).header()["statistics"]
    assert named and all(name.startswith(("second_moments/", "sae/")) for name in named)


# -- the command line


def test_the_command_says_what_it_needs(home: Home) -> None:
    ran = home.run("evaluate", "guard")
    assert ran.code == 2 and "--facts" in ran.err
    ran = home.run("evaluate", "guard", "--facts", "x", "--out", "y", "--far", "novels")
    assert ran.code == 2 and "DOMAIN=FILE" in ran.err
    ran = home.run("calibrate", "none.parquet", "--out", "m.json")
    assert ran.code == 2 and "none.parquet" in ran.err


@pytest.mark.slow
def test_the_committed_rows_are_what_a_rerun_gives(tmp_path: Path) -> None:
    """One committed row a kind of fact, made again from its facts alone."""
    facts = ROOT / ".." / "shared" / "data" / "counterfact" / "counterfact_edit_format.jsonl.xz"
    if not (facts.is_file() and TABLE.is_file()):
        pytest.skip("needs ../shared/data and docs/data/guard_rows.parquet")
    from guardedit.evaluation.readers import read_cases
    from guardedit.pipeline import open as open_guard

    case_set = read_cases(facts, "train")
    by_id = {case.case_id: case for case in case_set.cases}
    bench = Bench(open_guard(home=tmp_path / "home"), "rome", Neighbours.of(case_set.cases))
    kept = measured(read_rows(TABLE), "rome", ("known", "unknown"))
    for _, row in kept.groupby("stratum").head(1).iterrows():
        made = one_row(bench, Chosen(str(row["stratum"]), by_id[str(row["case_id"])]))
        later = {
            name
            for name, value in made["predictors"].items()
            if value is not None and np.isnan(row.get(f"pred.{name}", np.nan))
        }
        assert later <= {"rehearsed_namesake_kl", "rehearsed_namesake_lost_top1"}, (
            "scores that came after the rows"
        )
        for name, value in made["predictors"].items():
            if value is not None and name not in later:
                assert row[f"pred.{name}"] == pytest.approx(value, rel=0.02, abs=1e-6), name
        for name in ("near/kl_nats", "subject/kl_nats", "far/kl_nats/python"):
            assert row[f"out.{name}"] == pytest.approx(made["outcomes"][name], rel=0.05, abs=1e-5), name
