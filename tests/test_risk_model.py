"""The risk model: fitted on measured edits, said of edits that it has not seen, read in a plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from guard_helpers import ROOT, TABLE, made_rows, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_helpers import ZERO, Home, World, home, request_of, world

from guardedit.errors import BadRequestError
from guardedit.evaluation.guard.association import spearman
from guardedit.evaluation.guard.calibrating import calibrated, harms_of
from guardedit.evaluation.guard.features import MEANT, SETS, SUPPORT, Feature, columns
from guardedit.evaluation.guard.findings import fitted
from guardedit.evaluation.guard.fitting import (
    conformal,
    cross_validated,
    fit_line,
    fit_scope,
    natural_edits,
    unseen_lines,
)
from guardedit.evaluation.guard.frames import read_rows, rows_digest, write_rows
from guardedit.pipeline.expecting import EXPECTED, HARM
from guardedit.pipeline.kit import read_kit, write_kit
from guardedit.records import Scope, canonical
from guardedit.risk.calibration import RiskModel, ScopeModel, Term, Worth

__all__ = ["home", "rows", "world"]


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


def test_a_score_that_the_sum_does_without_still_bounds_the_support() -> None:
    idle = Term(score="x", transform="identity", centre=0, scale=1, weight=0.0, low=1, high=3)
    assert idle.part(2) == 0 and idle.supports(-50) and idle.supports(3) and not idle.supports(3.2)


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


SHIPPED = ROOT / "guardedit" / "assets" / "smollm2-135m" / "risk_models"


def _same_scope(
    model: RiskModel, natural: pd.DataFrame, scope: Scope, harm_nats: float | None = None
) -> None:
    """The model's scope is what is fitted on these rows now."""
    again = fit_scope(natural, scope, MEANT[scope], model.seed, SUPPORT, harm_nats)
    kept = next(one for one in model.scopes if one.scope == scope)
    assert {t.score: t.weight for t in again.terms} == {
        t.score: pytest.approx(t.weight, rel=1e-3) for t in kept.terms
    }
    for name in ("intercept", "half_width", "harm_nats", "slope", "offset"):
        assert getattr(again, name) == pytest.approx(getattr(kept, name), rel=1e-3), name


def test_the_shipped_model_is_what_calibrate_makes_of_all_natural_rows() -> None:
    shipped, natural = RiskModel.load(SHIPPED / "rome.json"), natural_edits(read_rows(TABLE), "rome")
    assert shipped.rows_digest == rows_digest(natural)
    _same_scope(shipped, natural, "far")


@pytest.mark.parametrize("editor", ["memit", "finetune"])
def test_other_editors_models_are_fitted_on_all_their_rows_and_call_harm_what_romes_does(editor: str) -> None:
    rome, shipped = (RiskModel.load(SHIPPED / f"{name}.json") for name in ("rome", editor))
    natural = natural_edits(read_rows(TABLE), editor)
    assert shipped.rows_digest == rows_digest(natural)
    assert harms_of(shipped) == pytest.approx(harms_of(rome))
    _same_scope(shipped, natural, "near", harms_of(rome)["near"])


def test_what_is_harm_may_come_from_another_editors_model(rows: pd.DataFrame, risk_model: RiskModel) -> None:
    """Where every edit does ten times the damage, most do harm by the other's measure, a tenth by the editor's own."""
    outcomes = [name for name in rows.columns if name.startswith("out.")]
    worse = rows.assign(editor="memit", **{name: rows[name] * 10 for name in outcomes})
    own, _ = calibrated(worse, "tiny", "memit", (1,))
    there, figures = calibrated(worse, "tiny", "memit", (1,), harm_as=risk_model)
    assert harms_of(there) == pytest.approx(harms_of(risk_model))
    assert harms_of(own) == pytest.approx({s: 10 * nats for s, nats in harms_of(risk_model).items()})
    middle = scores_of(rows, int(rows["out.far/kl_nats"].argsort().iloc[len(rows) // 2]))
    by_own, by_other = ({e.scope: e.p_harm for e in one.expect(middle)} for one in (own, there))
    assert (
        by_own["far"] is not None
        and by_other["far"] is not None
        and by_own["far"] < 0.2 < 0.8 < by_other["far"]
    )
    assert "harm as the worst tenth by rome" in there.protocol and figures["far"]["n"] == len(rows)


def test_calibrate_takes_the_measure_of_harm_from_a_file_and_refuses_what_is_none(
    home: Home, rows: pd.DataFrame, tmp_path: Path
) -> None:
    write_rows(rows, tmp_path / "rows.parquet")
    first = ("calibrate", str(tmp_path / "rows.parquet"), "--out")
    assert home.run(*first, str(tmp_path / "one.json")).code == 0
    assert home.run(*first, str(tmp_path / "two.json"), "--harm-as", str(tmp_path / "one.json")).code == 0
    one, two = (RiskModel.load(tmp_path / name) for name in ("one.json", "two.json"))
    assert harms_of(one) == pytest.approx(harms_of(two))
    (tmp_path / "none.json").write_text("{}")
    ran = home.run(*first, str(tmp_path / "three.json"), "--harm-as", str(tmp_path / "none.json"))
    assert ran.code == 6 and "none.json" in ran.err and not (tmp_path / "three.json").exists()


def test_without_any_harm_there_is_no_skill_to_speak_of(rows: pd.DataFrame) -> None:
    assert fitted(rows, "far", MEANT["far"], harm_nats=1e6)["brier_skill"] is None
    some = fitted(rows, "far", MEANT["far"])["brier_skill"]
    assert some is not None and some["value"] > 0.2


def test_safer_than_any_edit_fitted_on_counts_as_the_safest_of_those_and_riskier_as_unknown() -> None:
    more = Term(score="x", transform="identity", centre=0, scale=1, weight=0.7, low=1, high=3)
    less = more.model_copy(update={"weight": -0.7})
    assert more.supports(-50) and more.part(-50) == more.part(1) < more.part(2)
    assert less.supports(50) and less.part(50) == less.part(3) < less.part(2)
    assert not more.supports(3.2) and not less.supports(0.8)
