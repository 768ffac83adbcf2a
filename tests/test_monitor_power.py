"""The monitor's own benchmark: leaks come to the size that is asked for, and the tables count what they say."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from guard_helpers import made_rows

from benchmarks.monitor_findings import (
    CHOSEN_ON,
    LOOKED_AT,
    SCOPES,
    TELLING,
    alarms,
    detections,
    mild,
    told_apart,
)
from benchmarks.monitor_power import LITTLE, did_little, did_much, kept
from benchmarks.planted_leaks import NARROW, RIDGE, apart, bisected, both, domain_of
from guardedit.drift.null import BankEntry, NullBank
from guardedit.edits.deltas import EditDelta, LowRank, WeightChange
from guardedit.evaluation.guard.fitting import OUTCOMES
from guardedit.evaluation.rowfile import RowFile
from guardedit.gate.rules import load_policy
from guardedit.pipeline.kit import kit_folder
from guardedit.pipeline.levels import POLICY

BANK = NullBank(
    model_digest="sha256:" + "0" * 64, layer=0, hook_names=("blocks.0.hook_mlp_out",), far_tokens=64,
    entries=tuple(
        BankEntry(
            name=str(i), kind="real", accepted=True, statistics=dict.fromkeys(SCOPES.values(), 0.001 * (i + 1))
        )
        for i in range(20)
    ),
)  # fmt: skip


def _row(
    scope: str = "", share: float = 0.0, broken: str = "", kind: str = "mild", **kl: float
) -> dict[str, object]:
    scores = {f"score.{name}": kl.get(where, 0.001) for where, name in SCOPES.items()}
    outcome = "rolled-back" if broken else "committed"
    return {
        "kind": kind,
        "case_id": "1",
        "scope": scope,
        "share": share,
        "came_to": share,
        "outcome": outcome,
        "broken": broken,
    } | {"score.perplexity_ratio": 1.0, "score.sae_validity": 1.0, "score.subject_lost_top1": 0.1, **scores}


def _delta(size: float) -> EditDelta:
    update = LowRank(torch.full((3, 1), size, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
    return EditDelta((WeightChange("w", 0, update),), "planted", {"size": size}, {})


@pytest.mark.parametrize("share", (0.01, 0.05, 0.5))
def test_a_leak_comes_to_the_share_that_is_asked_for(share: float) -> None:
    made, came = bisected(lambda size: (_delta(size), min(1.0, size / 10)), share)
    assert came == pytest.approx(share, rel=0.12)
    assert made.hparams["size"] == pytest.approx(10 * share, rel=0.12)


def test_carrier_and_leak_are_one_update_that_is_their_sum() -> None:
    (change,) = both(_delta(2.0), _delta(3.0)).changes
    assert isinstance(change, WeightChange) and isinstance(change.update, LowRank)
    assert torch.equal(change.update.left @ change.update.right, torch.full((3, 2), 5.0, dtype=torch.float64))


def test_what_the_carrier_breaks_by_itself_is_no_detection_and_the_subjects_own_rules_are_none() -> None:
    table = pd.DataFrame(
        [
            _row(broken="perplexity-ratio"),
            _row("python", 0.01, "perplexity-ratio subject-lost-top1"),
            _row("python", 0.02, "perplexity-ratio far-kl", python=0.5, chat=0.0005),
        ]
    )
    small, large = detections(table, BANK).splitlines()[2:]
    assert small.split("|")[6:8] == [" 0 of 1 ", " 0 of 1 "]
    assert large.split("|")[4:9] == [" 0.0010 → 0.5000 ", " 0.0000 ", *[" 1 of 1 "] * 3]


def test_a_leak_that_changes_no_prediction_is_not_counted() -> None:
    table = pd.DataFrame([_row(), _row("relation", 0.01) | {"came_to": 0.0}, _row("relation", 0.05)])
    assert [line.split("|")[2:4] for line in detections(table, BANK).splitlines()[2:]] == [[" 0.05 ", " 1 "]]


def test_a_leak_that_moves_another_domain_more_is_not_named() -> None:
    table = pd.DataFrame([_row(), _row("python", 0.02, "far-kl", python=0.5, chat=0.6)])
    assert detections(table, BANK).splitlines()[2].split("|")[8] == " 0 of 1 "


def test_alarms_are_counted_apart_for_real_edits_and_shams() -> None:
    calm = [_row(), _row(broken="far-kl"), _row(python=0.03), _row(broken="subject-kl"), _row(kind="sham")]
    # Rises that earlier limits did not allow, and a limit that there was not.
    calm[0]["score.perplexity_ratio"] = 1.012
    calm[2]["score.subject_lost_top1"] = 0.55
    real, sham = alarms(pd.DataFrame(calm), BANK).splitlines()[2:]
    assert [cell.strip().split(" ")[0] for cell in real.split("|")[2:7]] == [
        "4",
        "0.50",
        "0.50",
        "0.75",
        "0.25",
    ]
    assert "`far-kl`, `subject-kl`" in real and "0.00" in sham
    assert real.endswith("| – |")
    calm[2]["score.namesake_kl"] = 4.0
    assert alarms(pd.DataFrame(calm), BANK).splitlines()[2].endswith("| 4 (n 1) |")


def test_what_limits_were_chosen_on_is_told_apart() -> None:
    edits = [_row(), _row() | {"case_id": CHOSEN_ON[0]}, _row(kind="harmful") | {"case_id": LOOKED_AT[0]}]
    names = [line.split("|")[1].strip() for line in alarms(pd.DataFrame(edits), BANK).splitlines()[2:]]
    assert names == [
        "real edits that did little elsewhere", "the same, those that limits were chosen on",
        "the same, looked at before limits were chosen",
    ]  # fmt: skip


def test_a_score_that_orders_the_damage_tells_the_worst_tenth_from_the_rest() -> None:
    rows = made_rows(60)
    named = [name for names in TELLING.values() for name in names if name != "namesake_kl"]
    scores = {f"score.{name}": rows["pred.sae_view"] for name in named}
    damage = rows["out.near/kl_nats"]
    monitored = pd.DataFrame({"kind": "mild", "case_id": rows["case_id"], "scope": "", **scores})
    lines = told_apart(monitored.assign(**{"score.near_kl": damage}), rows).splitlines()
    (near,) = [line for line in lines if line.startswith("| near | `near_kl` |")]
    assert near.split("|")[3:5] == [" 60 ", " 6 "] and near.count("1.00 (1.00 to 1.00)") == 2
    (named,) = [line for line in lines if "`namesake_kl`" in line]
    assert named.split("|")[3:5] == [" 0 ", " 0 "]


def test_the_direction_that_sets_keys_apart_is_the_best_of_many() -> None:
    noise = torch.Generator().manual_seed(0)
    others = torch.randn(400, 6, generator=noise, dtype=torch.float64)
    own = torch.randn(80, 6, generator=noise, dtype=torch.float64)
    own[:, 2] *= 5.0
    found, ratio = apart(own, others)
    ridge = RIDGE * (others.T @ others / len(others)).diagonal().mean()

    def energy_ratio(u: torch.Tensor) -> float:
        return float((own @ u).pow(2).mean() / ((others @ u).pow(2).mean() + ridge * u @ u))

    assert ratio == pytest.approx(energy_ratio(found), rel=1e-9)
    drawn = torch.randn(500, 6, generator=noise, dtype=torch.float64)
    assert all(energy_ratio(u) < ratio for u in drawn)
    assert int(found.abs().argmax()) == 2


@pytest.mark.parametrize(("scope", "domain"), ((f"python{NARROW}", "python"), ("python", "python")))
def test_a_narrow_leak_is_counted_as_one_into_its_domain(scope: str, domain: str) -> None:
    assert domain_of(scope) == domain
    table = pd.DataFrame([_row(), _row(scope, 0.02, "far-kl", python=0.5, chat=0.0005)])
    (line,) = detections(table, BANK).splitlines()[2:]
    assert line.split("|")[1].strip() == scope
    assert line.split("|")[4:9] == [" 0.0010 → 0.5000 ", " 0.0000 ", *[" 1 of 1 "] * 3]


def _rows(**outcomes: float) -> pd.DataFrame:
    calm = {f"out.{name}": 0.0 for name in (*LITTLE, *OUTCOMES.values())}
    rows = [calm | {"case_id": str(i), **{f"out.{k}": v * i for k, v in outcomes.items()}} for i in range(20)]
    return pd.DataFrame(rows)


def test_mild_edits_keep_every_bound_and_harmful_ones_are_the_worst_tenth_of_some_scope() -> None:
    rows = _rows(**{"near/lost_top1": 0.03, "far/kl_nats": 0.0001})
    assert rows[did_little(rows)]["case_id"].tolist() == ["0", "1", "2", "3"]
    assert rows[did_much(rows)]["case_id"].tolist() == ["18", "19"]


def test_rows_of_earlier_runs_stay_and_what_was_monitored_again_is_the_later_row(tmp_path: Path) -> None:
    policy = load_policy(kit_folder("smollm2-135m") / POLICY)
    written = RowFile(tmp_path / "monitor" / "power.jsonl", {"model": "m"})
    named = {"kind": "mild", "scope": "", "share": 0.0, "came_to": 0.0, "outcome": "committed", "broken": []}
    for case_id, far in (("2", 0.5), ("3", 0.001)):
        written.append({**named, "case_id": case_id, "scores": {"far_kl": far}})
    first = {"kind": "mild", "scope": "", "share": 0.0, "came_to": 0.0, "outcome": "committed", "broken": ""}
    earlier = pd.DataFrame([{**first, "case_id": one, "score.far_kl": 0.002} for one in ("1", "2")])
    table = kept(tmp_path, policy, earlier)
    assert table["case_id"].tolist() == ["1", "2", "3"]
    assert table["score.far_kl"].tolist() == [0.002, 0.5, 0.001]
    assert table["broken"].tolist() == ["", "far-kl lineage-far-kl", ""]


def test_what_mild_edits_break_is_told_apart_by_whose_answers_it_is_about() -> None:
    known = _rows(**{"subject/kl_nats": 0.1}).assign(editor="rome", stratum="known", error=None)
    calm = [("1", ""), ("2", "far-kl"), ("18", "subject-lost-top1"), ("19", "")]
    table = pd.DataFrame([_row(broken=broken) | {"case_id": case_id} for case_id, broken in calm])
    told = mild(table, known)
    assert told.startswith("Of all 4 that did little, a limit outside the subject is broken by 0.25 (")
    assert "2 are in the worst tenth of a scope, of the 2 that break a limit 1." in told
