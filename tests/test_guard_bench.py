"""The guard's own benchmark: what it measures is not what the guard saw, and its figures are those of the textbooks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation_helpers import nudge, spoken
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_helpers import FACTS, ZERO, Home, World, home, request_of, world
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from guardedit.errors import BadRequestError, StaleError
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.guard.adversarial import KINDS, adversarial
from guardedit.evaluation.guard.association import auroc_worst, figure, gain, spearman
from guardedit.evaluation.guard.calibrating import calibrated
from guardedit.evaluation.guard.far_sample import FarSample, looked_at
from guardedit.evaluation.guard.features import IN_A_PLAN, SETS, Feature, columns
from guardedit.evaluation.guard.findings import avoided, combined_risk
from guardedit.evaluation.guard.fitting import (
    conformal,
    cross_validated,
    fit_line,
    fit_scope,
    natural_edits,
    unseen_lines,
)
from guardedit.evaluation.guard.frames import measured, read_rows, rows_digest, to_frame, write_rows
from guardedit.evaluation.guard.outcome_prompts import Neighbours, named, outcome_prompts
from guardedit.evaluation.guard.predictors import seen_by_the_guard
from guardedit.evaluation.guard.rows import Bench, one_row, run_rows
from guardedit.evaluation.guard.strata import Chosen, chosen_edits
from guardedit.evaluation.rowfile import RowFile
from guardedit.models.handle import ModelHandle
from guardedit.pipeline.expecting import EXPECTED, HARM
from guardedit.pipeline.kit import read_kit, write_kit
from guardedit.records import canonical
from guardedit.risk.calibration import RiskModel, ScopeModel, Term, Worth

__all__ = ["home", "world"]

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "data" / "guard_rows.parquet"
CASES = tuple(
    EvalCase(case_id=str(number), request=request_of(number, target_true="Oslo"))
    for number in range(len(FACTS))
)


def made_rows(n: int = 120, relations: int = 12, seed: int = 0) -> pd.DataFrame:
    """Edits whose damage follows one known score a scope, with noise, and other scores that say nothing."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        far, near, subject, idle = rng.normal(size=4)
        predictors = {
            "leakage_share": np.exp(far), "near_interference": np.exp(near), "rehearsed_subject_kl": np.exp(subject),
            "key_leakage": np.exp(idle), "latent_leak": np.exp(far + 0.1 * rng.normal()), "sae_view": rng.random(),
        }  # fmt: skip
        outcomes = {
            "far/kl_nats": np.exp(far - 7 + 0.3 * rng.normal()), "near/kl_nats": np.exp(near - 4 + 0.3 * rng.normal()),
            "subject/kl_nats": np.exp(subject + 0.3 * rng.normal()),
        }  # fmt: skip
        rows.append({
            "editor": "rome", "stratum": "known", "case_id": f"{number:04d}", "relation": f"r{number % relations}",
            "predictors": {k: float(v) for k, v in predictors.items()},
            "outcomes": {k: float(v) for k, v in outcomes.items()}, "seconds": float(rng.random()),
        })  # fmt: skip
    return to_frame(rows)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return made_rows()


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


# -- the model


def test_the_model_finds_what_the_damage_follows_and_gives_no_weight_the_wrong_sign(
    rows: pd.DataFrame,
) -> None:
    model = fit_scope(rows, "near", SETS["with SAE, rehearsed"])
    weights = {term.score: term.weight for term in model.terms}
    assert max(weights, key=lambda name: abs(weights[name])) == "near_interference"
    assert weights["near_interference"] == pytest.approx(1, abs=0.2)
    assert all(weights.get(name, 0) >= 0 for name in ("leakage_share", "near_interference", "key_leakage"))
    turned = rows.assign(**{"pred.near_interference": 1 / rows["pred.near_interference"]})
    assert "near_interference" not in {term.score for term in fit_scope(turned, "near", SETS["no SAE"]).terms}


def test_unseen_relations_are_covered_as_the_level_says_and_probabilities_beat_the_base_rate() -> None:
    many = made_rows(300, 30, seed=1)
    said = cross_validated(many, "far", SETS["no SAE"])
    observed = np.log(many["out.far/kl_nats"].to_numpy())
    covered = np.abs(observed - said.log_expected) <= said.half_width
    assert abs(covered.mean() - 0.95) < 2 * np.sqrt(0.95 * 0.05 / 300) + 0.01
    harmful = np.exp(observed) > said.harm_nats
    assert np.mean((said.p_harm - harmful) ** 2) < np.mean((0.1 - harmful) ** 2)


def test_no_fold_sees_its_own_relations(rows: pd.DataFrame) -> None:
    """Damage that is the relation's alone, and a flag a relation: whoever had seen the relation would know it all."""
    names = sorted(set(rows["relation"]))
    shift = dict(zip(names, np.random.default_rng(3).normal(size=len(names)), strict=True))
    flags = {f"pred.is_{name}": (rows["relation"] == name).astype(float) for name in names}
    frame = rows.assign(**flags, **{"out.far/kl_nats": np.exp(rows["relation"].map(shift))})
    features = tuple(Feature(f"is_{name}", "either", log=False) for name in names)
    log = np.log(frame["out.far/kl_nats"].to_numpy())
    alone_each = np.arange(len(frame))
    seen = unseen_lines(columns(frame, features), log, alone_each, features, 0)
    assert spearman(seen, log) > 0.9
    assert spearman(cross_validated(frame, "far", features).log_expected, log) < 0.2


def test_conformal_takes_the_rank_that_finite_samples_need() -> None:
    assert conformal(np.arange(1.0, 10.0)) == 9  # ⌈10·0.95⌉ = 10, and there are nine
    assert conformal(np.arange(1.0, 100.0)) == 95


def test_a_fitted_line_is_the_same_twice(rows: pd.DataFrame) -> None:
    raw, log = (
        rows[["pred.leakage_share", "pred.sae_view"]].to_numpy(),
        np.log(rows["out.far/kl_nats"].to_numpy()),
    )
    features = (Feature("leakage_share"), Feature("sae_view", "either", log=False))
    first, second = (fit_line(raw, log, rows["relation"].to_numpy(), features, 0) for _ in range(2))
    assert (first.weights == second.weights).all()


@pytest.fixture(scope="module")
def risk_model(rows: pd.DataFrame) -> RiskModel:
    return calibrated(rows, "tiny", "rome", (1,))[0]


def scores_of(frame: pd.DataFrame, row: int = 0) -> dict[str, float | None]:
    names = [c for c in frame.columns if c.startswith("pred.")]
    return {name.removeprefix("pred."): float(frame[name][row]) for name in names}


def test_the_file_holds_all_of_the_model(risk_model: RiskModel, rows: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "risk_model.json"
    path.write_text(json.dumps(risk_model.model_dump(mode="json")))
    again = RiskModel.load(path)
    assert again.digest == risk_model.digest
    assert again.expect(scores_of(rows)) == risk_model.expect(scores_of(rows))


def test_outside_its_support_and_without_a_score_the_model_has_no_opinion(
    risk_model: RiskModel, rows: pd.DataFrame
) -> None:
    inside = scores_of(rows)
    assert all(
        one.value is not None and one.low is not None and one.low < one.value
        for one in risk_model.expect(inside)
    )
    for change in ({"near_interference": 1e6}, {"near_interference": None}, {"near_interference": 0.0}):
        near = next(one for one in risk_model.expect(inside | change) if one.scope == "near")
        assert near.value is None and near.p_harm is None
        assert near.reason and "near_interference" in near.reason


@given(st.floats(-1.5, 1.5), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_more_of_a_score_that_means_risk_never_lowers_the_expectation(value: float, more: float) -> None:
    term = Term(score="x", transform="log", centre=0.2, scale=1.3, weight=0.7, low=-3, high=3)
    assert term.part(float(np.exp(value + more))) >= term.part(float(np.exp(value)))


def test_too_few_edits_fit_no_model(rows: pd.DataFrame) -> None:
    with pytest.raises(BadRequestError, match="39 edits of rome"):
        calibrated(rows.head(39), "tiny", "rome", (1,))


# -- the command line


def test_the_command_says_what_it_needs(home: Home) -> None:
    ran = home.run("evaluate", "guard")
    assert ran.code == 2 and "--facts" in ran.err
    ran = home.run("evaluate", "guard", "--facts", "x", "--out", "y", "--far", "novels")
    assert ran.code == 2 and "DOMAIN=FILE" in ran.err
    ran = home.run("calibrate", "none.parquet", "--out", "m.json")
    assert ran.code == 2 and "none.parquet" in ran.err


def test_calibrate_writes_a_model_that_reads_back(home: Home, rows: pd.DataFrame, tmp_path: Path) -> None:
    write_rows(rows, tmp_path / "rows.parquet")
    ran = home.run("--json", "calibrate", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "m.json"))
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["digest"] == RiskModel.load(tmp_path / "m.json").digest


# -- in a plan


@pytest.fixture
def calibrated_home(home: Home, rows: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home whose kit has a risk model that supports every edit of the tiny model, on two scores."""
    cache = tmp_path / "cache"
    shutil.copytree(home.world.cache, cache)
    monkeypatch.setenv("GUARDEDIT_CACHE", str(cache))
    world = World(home.world.model, cache)
    terms = tuple(
        Term(score=name, transform="log", centre=0, scale=1, weight=0.5, low=-60, high=60)
        for name in ("leakage_share", "rehearsed_subject_kl")
    )
    scopes = tuple(
        ScopeModel(
            scope=scope, outcome=f"{scope}/kl_nats", terms=terms, intercept=-1, half_width=1, level=0.9, harm_nats=1e-3,
            slope=1, offset=0, n=50,
        )
        for scope in ("far", "near", "subject")
    )  # fmt: skip
    made = RiskModel(
        model="tiny",
        editor="rome",
        layers=(1,),
        protocol="by hand",
        seed=0,
        scopes=scopes,
        rows_digest=ZERO,
        worth=(Worth(score="leakage", scope="far", spearman=0.8, low=0.7, high=0.9, n=50),),
    )
    (world.kit / "risk_models").mkdir()
    (world.kit / "risk_models" / "rome.json").write_bytes(canonical(made))
    write_kit(world.kit, layer=1, hparams=read_kit(world.kit / "kit.json")["hparams"])
    return Home(world, home.folder)


def test_a_plan_says_what_such_edits_did_and_a_policy_may_limit_it(calibrated_home: Home) -> None:
    plan = calibrated_home.guard().plan(request_of(), editor="rome")
    scores = {name: plan.risk.score(name) for name in (*EXPECTED.values(), HARM)}
    share, subject = (plan.risk.score(name) for name in ("leakage_share", "rehearsed_subject_kl"))
    assert share and subject and share.value and subject.value
    by_hand = float(np.exp(-1 + 0.5 * np.log(share.value) + 0.5 * np.log(subject.value)))
    for name in EXPECTED.values():
        one = scores[name]
        assert one is not None and one.value == pytest.approx(by_hand)
        assert one.low == pytest.approx(by_hand / np.e) and one.high == pytest.approx(by_hand * np.e)
    harm = scores[HARM]
    assert harm is not None and harm.value == pytest.approx(1 / (1 + 1 / by_hand))
    model = calibrated_home.guard().kit.risk_models["rome"]
    assert plan.risk.inputs["risk_model"] == model.digest
    assert plan.risk.evidence == {
        "leakage": "ordered far damage by rank correlation 0.80 (0.70 to 0.90), n 50"
    }
    strict = calibrated_home.guard({f"preop/{HARM}": ("<=", 0.0, "hard")})
    assert strict.plan(request_of(2), editor="rome").judgement.outcome == "blocked"


@pytest.mark.parametrize("editor", ["finetune", "emmet"])
def test_where_the_model_has_no_opinion_a_limit_on_it_is_inconclusive(
    calibrated_home: Home, editor: str
) -> None:
    guard = calibrated_home.guard({f"preop/{HARM}": ("<=", 1.0, "soft")})
    plan = guard.plan(request_of(), editor=editor)
    score = plan.risk.score(HARM)
    assert score is not None and score.value is None and "no risk model of" in str(score.reason)
    assert plan.judgement.outcome == "needs-approval"


def test_a_changed_risk_model_is_an_integrity_failure(calibrated_home: Home) -> None:
    path = calibrated_home.world.kit / "risk_models" / "rome.json"
    path.write_bytes(path.read_bytes().replace(b'"intercept":-1', b'"intercept":-9'))
    ran = calibrated_home.run("plan", str(calibrated_home.requests(request_of().model_dump(mode="json"))))
    assert ran.code == 6 and "rome.json" in ran.err


def test_a_kit_without_a_risk_model_plans_as_before(home: Home) -> None:
    plan = home.guard().plan(request_of(), editor="rome")
    assert plan.risk.score(HARM) is None and "risk_model" not in plan.risk.inputs


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


def test_the_shipped_model_is_what_calibrate_makes_of_the_committed_rows() -> None:
    shipped = RiskModel.load(ROOT / "guardedit" / "assets" / "smollm2-135m" / "risk_models" / "rome.json")
    natural = natural_edits(read_rows(TABLE), "rome")
    assert shipped.rows_digest == rows_digest(natural)
    far = fit_scope(natural, "far", IN_A_PLAN, shipped.seed)
    kept = next(one for one in shipped.scopes if one.scope == "far")
    assert {t.score: pytest.approx(t.weight, rel=1e-3) for t in kept.terms} == {
        t.score: t.weight for t in far.terms
    }
    assert far.half_width == pytest.approx(kept.half_width, rel=1e-3)


def test_safer_than_any_edit_fitted_on_counts_as_the_safest_of_those_and_riskier_as_unknown() -> None:
    more = Term(score="x", transform="identity", centre=0, scale=1, weight=0.7, low=1, high=3)
    less = more.model_copy(update={"weight": -0.7})
    assert more.supports(-50) and more.part(-50) == more.part(1) < more.part(2)
    assert less.supports(50) and less.part(50) == less.part(3) < less.part(2)
    assert not more.supports(3.2) and not less.supports(0.8)
