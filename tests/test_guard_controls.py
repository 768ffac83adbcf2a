"""Controls of the SAE scores: what is drawn anew and what stays, and that the same SAE gives the same scores again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from guard_helpers import CASES
from pipeline_helpers import Home, home, world

from benchmarks.guard_controls import controlled, random_decoder, score, shuffled_energies, table
from benchmarks.solve_again import delta_file, solve
from guardedit.evaluation.guard.outcome_prompts import Neighbours
from guardedit.evaluation.guard.predictors import SAE_SCORES
from guardedit.evaluation.guard.rows import Bench
from guardedit.evaluation.guard.strata import Chosen
from guardedit.evaluation.rowfile import RowFile
from guardedit.pipeline.measuring import risk_context
from guardedit.risk.measure import measure
from guardedit.saes.checkpoints import Sae

__all__ = ["home", "world"]


def sae_of(home: Home) -> Sae:
    found = risk_context(home.guard()).key_sae
    assert found is not None
    return found


def test_a_control_changes_what_it_says_and_nothing_else(home: Home) -> None:
    sae = sae_of(home)
    sae = replace(sae, energy=torch.arange(sae.d_sae).float() + 1)
    drawn, dealt = random_decoder(sae), shuffled_energies(sae)
    torch.testing.assert_close(drawn.W_dec.norm(dim=1), sae.W_dec.norm(dim=1))
    assert not torch.allclose(drawn.W_dec, sae.W_dec)
    assert not torch.equal(dealt.energy, sae.energy)
    assert torch.equal(dealt.energy.sort().values, sae.energy)
    for name in ("W_enc", "b_enc", "b_dec", "threshold"):
        assert torch.equal(getattr(drawn, name), getattr(sae, name))
        assert torch.equal(getattr(dealt, name), getattr(sae, name))
    assert torch.equal(drawn.energy, sae.energy) and torch.equal(dealt.W_dec, sae.W_dec)


def test_the_same_sae_gives_the_scores_of_the_report_again(home: Home) -> None:
    guard = home.guard()
    bench = Bench(guard, "rome", Neighbours.of(CASES))
    request, context = bench.request(CASES[0]), risk_context(guard)
    delta = bench.solve((request,))
    told = {s.name: s.value for s in measure(context, [request], delta).scores}
    other = replace(context, key_sae=random_decoder(sae_of(home)))
    found = controlled({"again": context, "random": other}, request, delta)
    measured = [name for name in SAE_SCORES if told.get(name) is not None]
    assert len(measured) > 3
    for name in measured:
        assert found[f"pred.{name}@again"] == pytest.approx(told[name], rel=1e-6)
    assert found["pred.latent_leak@random"] != pytest.approx(told["latent_leak"], rel=1e-3)


def test_edits_are_solved_once_and_scored_once(home: Home, tmp_path: Path) -> None:
    bench = Bench(home.guard(), "rome", Neighbours.of(CASES), deltas=tmp_path / "rome-deltas")
    edits = [Chosen("known", case) for case in CASES[:2]]
    saes = {"shuffled": shuffled_energies(sae_of(home))}
    file = RowFile(tmp_path / "rome-controls.jsonl", {"of": "a test"})
    solve(bench, edits[:1])
    score(bench, edits, saes, file)
    first = delta_file(bench, edits[0]).stat().st_mtime_ns
    assert len(file.load()) == 1, "an edit that is not solved yet is no row"
    solve(bench, edits)
    score(bench, edits, saes, file)
    assert delta_file(bench, edits[0]).stat().st_mtime_ns == first
    frame = table(tmp_path)
    assert frame["case_id"].tolist() == ["0", "1"]
    assert {"editor", "stratum", "pred.latent_leak@shuffled"} <= set(frame.columns)
    assert json.loads((tmp_path / "rome-controls.jsonl").read_text().splitlines()[0])["of"] == "a test"
