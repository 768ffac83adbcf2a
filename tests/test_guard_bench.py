"""The guard's own benchmark: what it measures is not what the guard saw, and its figures are those of the textbooks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation_helpers import nudge, spoken
from guard_helpers import CASES, ROOT, TABLE, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_helpers import Home, home, request_of, world
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from guardedit.cli.guarding import guard_job
from guardedit.edits.deltas import Dense, EditDelta, change_of, post_images, restore, saved
from guardedit.errors import BadRequestError, StaleError
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.guard.adversarial import KINDS, adversarial
from guardedit.evaluation.guard.association import auroc_worst, figure, gain, spearman
from guardedit.evaluation.guard.command import GuardJob
from guardedit.evaluation.guard.far_sample import FarSample, looked_at
from guardedit.evaluation.guard.findings import avoided, combined_risk
from guardedit.evaluation.guard.frames import measured, read_rows, rows_digest, to_frame, write_rows
from guardedit.evaluation.guard.outcome_prompts import Neighbours, named, outcome_prompts
from guardedit.evaluation.guard.predictors import seen_by_the_guard
from guardedit.evaluation.guard.rows import Bench, one_row, run_rows
from guardedit.evaluation.guard.strata import Chosen, chosen_edits
from guardedit.evaluation.guard.together import Together, run_together
from guardedit.evaluation.protocol import Protocol
from guardedit.evaluation.rowfile import RowFile
from guardedit.models.handle import ModelHandle

__all__ = ["home", "rows", "world"]


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


# -- many edits in one model


def test_a_batch_is_a_row_that_leaves_the_model_alone_and_is_not_measured_again(
    home: Home, tmp_path: Path
) -> None:
    guard = home.guard()
    bench = Bench(guard, "emmet", Neighbours.of(CASES))
    edits = [Chosen("known", case) for case in CASES[:3]]
    before = guard.handle.digest()
    found = run_together(bench, edits, Together("emmet", Protocol(2)), tmp_path)
    assert [row["stratum"] for row in found] == ["batch of 2"]
    assert found[0]["error"] is None
    assert found[0]["outcomes"]["far/kl_nats"] > 0
    assert "hidden_cosine" not in found[0]["predictors"]
    assert guard.handle.digest() == before
    assert run_together(bench, edits, Together("emmet", Protocol(2)), tmp_path) == found


def test_a_sequence_of_edits_is_measured_as_their_sum_on_the_unedited_model(
    home: Home, tmp_path: Path
) -> None:
    guard = home.guard()
    bench = Bench(guard, "rome", Neighbours.of(CASES))
    edits = [Chosen("known", case) for case in CASES[:2]]
    before = guard.handle.digest()
    (row,) = run_together(bench, edits, Together("rome", Protocol(1, 2)), tmp_path)
    assert (row["stratum"], row["error"]) == ("sequence of 2", None)
    assert guard.handle.digest() == before
    # By hand: solve, write, solve on top, and take the difference of the weights.
    requests = tuple(bench.request(one.case) for one in edits)
    parameter = guard.handle.rewrite_parameter(bench.settings.layer)
    old = saved(guard.handle, [parameter])
    for number, request in enumerate(requests):
        delta = bench.solve((request,), requests[:number])
        restore(guard.handle, post_images(guard.handle, delta))
    moved = guard.handle.oriented(parameter).detach().double().clone()
    restore(guard.handle, old)
    total = Dense(moved - guard.handle.oriented(parameter).detach().double())
    by_hand = EditDelta((change_of(guard.handle, parameter, total),), "rome", {}, {})
    far = bench.far.moves(by_hand)
    assert row["outcomes"]["far/kl_nats"] == pytest.approx(far["kl_nats"], rel=1e-6)
    assert row["predictors"]["delta_norm_ratio"] > 0


def test_a_batch_holds_one_edit_a_subject_and_a_sequence_takes_them_as_they_come() -> None:
    names = ("France", "France", "Peru", "Chile", "Peru")
    edits = [
        Chosen("known", EvalCase(case_id=str(i), request=request_of(2, subject=who, target_true="Oslo")))
        for i, who in enumerate(names)
    ]

    def ids(protocol: Protocol) -> list[list[str]]:
        return [[one.case.case_id for one in group] for group in Together("emmet", protocol).groups(edits)]

    assert ids(Protocol(2)) == [["0", "2"], ["1", "3"]]
    assert ids(Protocol(1, 2)) == [["0", "1"], ["2", "3"]]


def test_batches_of_an_editor_of_single_facts_are_refused() -> None:
    with pytest.raises(BadRequestError, match="rome takes one fact at a time"):
        Together("rome", Protocol(10))


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


# -- the table


def test_the_table_reads_back_as_it_was_and_its_digest_knows_no_seconds_and_no_order(
    rows: pd.DataFrame, tmp_path: Path
) -> None:
    write_rows(rows, tmp_path / "a.parquet")
    again = read_rows(tmp_path / "a.parquet")
    pd.testing.assert_frame_equal(rows, again)
    assert rows_digest(again.assign(seconds=1.0)) == rows_digest(rows)
    assert rows_digest(again.assign(subject="x")) != rows_digest(rows)


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="no table"):
        read_rows(tmp_path / "none.parquet")
    (tmp_path / "odd.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(BadRequestError, match="no parquet table"):
        read_rows(tmp_path / "odd.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(BadRequestError, match="'editor'"):
        read_rows(tmp_path / "other.parquet")


# -- statistics


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), min_size=20, max_size=60))
@settings(max_examples=60, deadline=None)
def test_rank_statistics_are_those_of_the_libraries(pairs: list[tuple[int, int]]) -> None:
    x, y = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    if x.std() and y.std():
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    worst = y > np.quantile(y, 0.9)
    if worst.any() and not worst.all():
        assert auroc_worst(x, y) == pytest.approx(roc_auc_score(worst, x))


def test_an_interval_resamples_whole_groups() -> None:
    x = np.arange(40.0)
    one_group_each = figure(spearman, x, x + np.tile([0, 9], 20), np.arange(40))
    one_group = figure(spearman, x, x + np.tile([0, 9], 20), np.zeros(40))
    assert one_group_each and one_group
    assert one_group.low == one_group.high == pytest.approx(one_group.value)
    assert one_group_each.low < one_group_each.value < one_group_each.high
    same = gain(spearman, x, x, x[::-1].copy(), np.arange(40))
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_stopping_avoids_between_chance_and_the_oracle() -> None:
    damage = np.exp(np.random.default_rng(0).normal(size=50))
    assert avoided(damage, damage)[0] == 0
    assert avoided(damage, damage)[-1] == pytest.approx(1)
    some = combined_risk({"far": np.log(damage), "near": np.random.default_rng(1).normal(size=50)})
    assert (avoided(damage, damage) >= avoided(some, damage) - 1e-12).all()


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
        for name, value in made["predictors"].items():
            if value is not None:
                assert row[f"pred.{name}"] == pytest.approx(value, rel=0.02, abs=1e-6), name
        for name in ("near/kl_nats", "subject/kl_nats", "far/kl_nats/python"):
            assert row[f"out.{name}"] == pytest.approx(made["outcomes"][name], rel=0.05, abs=1e-5), name
