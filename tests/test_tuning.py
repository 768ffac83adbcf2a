"""Tuning: successive halving, figures from edits that are taken back, a run that goes on, a file that plan accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from edits_helpers import LAYER, metric, moment_of
from evaluation_helpers import spoken
from pipeline_helpers import Home, home, world

from guardedit.edits.inputs import SolveInputs
from guardedit.errors import BadRequestError, StaleError
from guardedit.evaluation import tuning
from guardedit.evaluation.halving import halve, planned
from guardedit.evaluation.metrics import harmonic_mean
from guardedit.evaluation.tune_cases import TuneCase, TuneCases, known_cases, shipped_cases
from guardedit.evaluation.tune_table import Tuned
from guardedit.evaluation.tuning import TunePlan, edits_planned, start_settings, tune
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.pipeline.hparams import read_hparams, write_hparams
from guardedit.records import EditRequest

__all__ = ["home", "world"]

KIT = {"steps": 4, "learning_rate": 0.5, "contexts": ["", "It is said that. "]}
PLAN = TunePlan(layers=(0, 1, 2), grid={"learning_rate": (0.25,)}, facts=3, first=1)


@pytest.fixture
def cases(tiny_llama: ModelHandle) -> TuneCases:
    """Three facts that the tiny model says by itself, and one that it does not."""
    prompt, said = spoken(tiny_llama)
    words = prompt.split()
    rows = [(word, " ".join([*words[:at], "{}", *words[at + 1 :]])) for at, word in enumerate(words[:3])]
    made = [
        TuneCase(
            str(at),
            EditRequest(subject=subject, prompt=stem, target_new="Lisbon", target_true=said),
            (f"It is so that {prompt}",),
            ("The capital of Italy is", "Berlin is the capital of"),
        )
        for at, (subject, stem) in enumerate(rows)
    ]
    unknown = made[0].request.model_copy(update={"target_true": "never said"})
    return TuneCases("by hand", "sha256:" + "1" * 64, (*made, TuneCase("3", unknown, ("a",), ("b",))))


def inputs() -> SolveInputs:
    return SolveInputs({key_hook(layer): moment_of(metric(), layer) for layer in range(3)})


def tuned(handle: ModelHandle, cases: TuneCases, state: Path | None = None, plan: TunePlan = PLAN) -> Tuned:
    return tune(handle, cases, plan, start_settings(handle, plan, KIT), inputs(), state=state)


def test_halving_finds_the_best_and_judges_the_worst_on_few_facts() -> None:
    asked: list[tuple[int, int]] = []

    def score(candidate: int, n: int) -> float:
        asked.append((candidate, n))
        return -abs(candidate - 5)

    assert halve(range(10), score, first=3, most=40, keep=2) == [5, 4]
    assert {n for candidate, n in asked if candidate == 9} == {3}
    assert max(n for candidate, n in asked if candidate == 5) == 12
    pairs = {(candidate, fact) for candidate, n in asked for fact in range(n)}
    assert len(pairs) == planned(10, first=3, most=40, keep=2)
    assert halve([7], lambda c, n: 0.0, first=3, most=40, keep=2) == [7]


def test_tuning_measures_every_layer_and_the_best_on_all_facts(
    tiny_llama: ModelHandle, cases: TuneCases
) -> None:
    found = tuned(tiny_llama, cases)
    assert {row.layer for row in found.rows} == {0, 1, 2}
    assert found.best.n == 3 == max(row.n for row in found.rows)
    assert found.best.score.value == max(row.score.value for row in found.rows if row.n == 3)
    for row in found.rows:
        assert row.score.value == pytest.approx(
            harmonic_mean([row.efficacy, row.paraphrase, row.neighborhood])
        )
        assert row.score.low <= row.score.value <= row.score.high
    changed = [row for row in found.rows if row.changed]
    assert changed and all(row.changed == {"learning_rate": 0.25} for row in changed)
    assert found.edits <= edits_planned(tiny_llama, PLAN, start_settings(tiny_llama, PLAN, KIT), 3)


def test_metrics_compare_the_two_targets_at_each_kind_of_prompt(
    tiny_llama: ModelHandle, cases: TuneCases
) -> None:
    for case in cases.cases[:3]:
        targets = (case.request.target_new, case.request.target_true or "")

        def new_wins(prompt: str, targets: tuple[str, str] = targets) -> float:
            new, true = (float(p.mean()) for p in tiny_llama.token_logprobs([prompt] * 2, targets))
            return float(new > true)

        found = tuning._measured(tiny_llama, case)
        # The model says the true target by itself, so before any edit the new one loses.
        assert found["efficacy"] == new_wins(case.request.filled) == 0
        assert found["paraphrase"] == new_wins(case.paraphrases[0])
        kept = [1 - new_wins(prompt) for prompt in case.neighborhood]
        assert found["neighborhood"] == pytest.approx(sum(kept) / len(kept))
        assert found["neighborhood"] != 0.5, "a draw would not tell kept from lost"


def test_an_interrupted_run_goes_on_to_the_same_figures(
    tiny_llama: ModelHandle, cases: TuneCases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state.jsonl"
    whole = tuned(tiny_llama, cases, state)
    lines = state.read_text().splitlines()
    state.write_text("\n".join(lines[:-3]) + "\n")
    made = []
    real = tuning._edited
    monkeypatch.setattr(tuning, "_edited", lambda *args: made.append(args) or real(*args))
    again = tuned(tiny_llama, cases, state)
    assert len(made) == 3 and len(state.read_text().splitlines()) == len(lines)
    for before, after in zip(whole.rows, again.rows, strict=True):
        assert before.model_copy(update={"seconds_per_edit": 0}) == after.model_copy(
            update={"seconds_per_edit": 0}
        )
    tuned(tiny_llama, cases, state, TunePlan(layers=(0, 1), grid=PLAN.grid, facts=3, first=1))
    assert len(made) == 3
    with pytest.raises(StaleError, match="seed"):
        tuned(tiny_llama, cases, state, TunePlan(layers=(0,), facts=3, first=1, seed=1))


def test_what_cannot_be_tuned_is_said(tiny_llama: ModelHandle, cases: TuneCases) -> None:
    with pytest.raises(BadRequestError, match="no setting 'clamps'"):
        start_settings(tiny_llama, TunePlan(grid={"clamps": (1.0,)}), KIT)
    with pytest.raises(BadRequestError, match="layer 9"):
        TunePlan(layers=(9,)).candidates(tiny_llama)
    with pytest.raises(BadRequestError, match="knows 0"):
        known_cases(tiny_llama, cases.cases[3:], 4, 0)
    assert TunePlan().candidates(tiny_llama) == (1,)


def test_shipped_facts_have_other_wordings_and_neighbours_of_the_same_object() -> None:
    shipped = shipped_cases()
    assert len(shipped.cases) >= 60 and len({case.case_id for case in shipped.cases}) == len(shipped.cases)
    for case in shipped.cases:
        assert case.request.target_new != case.request.target_true
        assert case.paraphrases and case.neighborhood and case.request.filled not in case.neighborhood


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_a_settings_file_is_read_as_it_was_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"hparams{suffix}"
    write_hparams(path, "rome", {"layer": 3}, {"learning_rate": 0.25, "kl_prompt": '{} is "a"'}, "two\nlines")
    assert read_hparams(path, "rome") == {"layer": 3, "learning_rate": 0.25, "kl_prompt": '{} is "a"'}
    assert read_hparams(path, "finetune") == {"layer": 3}
    assert read_hparams(None, "rome") == {}
    write_hparams(path, "rome", {"layer": 3}, {"layer": 2}, "")
    assert read_hparams(path, "rome") == {"layer": 2}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "[romeo]\nlayer = 1", "no editor"),
        ("a.toml", "layer = ", "cannot be read"),
        ("a.json", "[1]", "is a list"),
        ("a.yaml", "layer: 1", r"ends in \.toml or \.json"),
    ],
)
def test_a_settings_file_that_makes_no_sense_is_refused(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadRequestError, match=said):
        read_hparams(tmp_path / name, "rome")


def test_the_command_writes_a_file_that_plan_accepts(home: Home, tmp_path: Path) -> None:
    facts, out = tmp_path / "facts.jsonl", tmp_path / "hparams.toml"
    facts.write_text("".join(json.dumps(row) + "\n" for row in _rows(home.guard().handle)))
    words = (
        "--json",
        "tune",
        "--facts",
        facts,
        "--layers",
        str(LAYER),
        "--set",
        "learning_rate=0.25,1",
        "--first",
        "1",
    )
    ran = home.run(
        *map(str, words), "--limit", "2", "--out", str(out), "--state", str(tmp_path / "state.jsonl")
    )
    assert ran.code == 0, ran.err
    assert (
        ran.json["hparams"] == str(out)
        and ran.json["rows"][0]["n"] == 2
        and ran.err.startswith("at most")
        and "minutes for at most" in ran.err
    )
    chosen = read_hparams(out, "rome")
    assert chosen["layer"] == LAYER and chosen["learning_rate"] in (0.25, 0.5, 1)
    request = home.requests(
        {"subject": "Eiffel Tower", "prompt": "The {} is in", "target_new": "Rome", "target_true": "Oslo"}
    )
    made = home.run("--json", "plan", str(request), "--hparams", str(out))
    assert made.code in (0, 3, 4), made.err
    settings = made.json["plans"][0]["delta"]["hparams"]
    assert settings["layer"] == LAYER and settings["learning_rate"] == chosen["learning_rate"]
    out.write_text("[rome]\nclamps = 3\n")
    refused = home.run("plan", str(request), "--hparams", str(out))
    assert refused.code == 2 and "'clamps'" in refused.err and "clamp_norm_factor" in refused.err
    assert home.run("evaluate", str(facts), "--hparams", str(out)).code == 2


def _rows(handle: ModelHandle) -> list[dict[str, str]]:
    """Facts in CounterFact's short form that the tiny model says by itself."""
    prompt, said = spoken(handle)
    words = prompt.split()[:3]
    return [
        {
            "case_id": str(at), "subject": word, "prompt": prompt, "target_new": "Lisbon", "ground_truth": said,
            "rephrase_prompt": f"It is so that {prompt}", "locality_prompt": "The capital of Italy is",
        }
        for at, word in enumerate(words)
    ]  # fmt: skip
