"""`evaluate_dataset`: a file, an editor and a workspace's kit in, figures out; the workspace is as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SENTENCES
from evaluation_helpers import spoken

import guardedit
from guardedit.cli.common import Options
from guardedit.edits.inputs import SolveInputs
from guardedit.errors import BadRequestError
from guardedit.evaluation.datasets import Asking, evaluate_dataset
from guardedit.evaluation.protocol import Protocol
from guardedit.gate.policy import parse_policy
from guardedit.models.corpus import tokenise_chunks
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.models.statistics import collect
from guardedit.pipeline import Guard
from guardedit.pipeline.kit import Kit

LAYER = 1
POLICY = """
name = "tiny"
version = 1

[[rule]]
id = "leakage"
metric = "preop/leakage"
op = "<="
limit = 1.0
level = "soft"
sentence = "How much everything else would move"
"""


@pytest.fixture
def guard(tiny_llama: ModelHandle, tmp_path: Path) -> Guard:
    """A workspace on the tiny model with the least kit that an editor needs."""
    batches = tokenise_chunks(tiny_llama, SENTENCES * 6, 64)
    opened = guardedit.open(tiny_llama.name, home=tmp_path / "home")
    opened.handle = tiny_llama
    opened.kit = Kit(
        folder=tmp_path,
        model=tiny_llama.name,
        layer=LAYER,
        hparams={"rome": {"n_prefixes": 2, "steps": 4}, "finetune": {"steps": 2}},
        second_moments=collect(tiny_llama, [key_hook(LAYER)], batches),
        saes={},
        policy=parse_policy(POLICY, "the test's"),
    )
    return opened


@pytest.fixture
def data(tiny_llama: ModelHandle, tmp_path: Path) -> Path:
    """Twelve facts in CounterFact's short form, every third one known to the tiny model."""
    prompt, said = spoken(tiny_llama)
    subject = prompt.split()[0]
    rows = [
        {
            "case_id": number,
            "prompt": prompt,
            "subject": subject,
            "target_new": "Oslo",
            "ground_truth": said if number % 3 == 0 else "Warsaw",
            "rephrase_prompt": f"It is said that {prompt}",
            "locality_prompt": "Marie Curie was born in",
            "locality_ground_truth": said if number % 3 == 0 else "Warsaw",
            "split": "train" if number < 9 else "edit",
        }
        for number in range(12)
    ]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("editor", ["rome", "finetune"])
def test_known_facts_are_edited_and_the_workspace_is_left_alone(
    guard: Guard, data: Path, editor: str
) -> None:
    before = guard.handle.digest()
    found = evaluate_dataset(guard, data, editor=editor, limit=2, known_only=True, split="train").as_json()
    assert found["n"] == 2 < found["n_seen"] <= 9
    assert found["metrics"]["efficacy_base"]["value"] == 0.0
    assert (
        found["known_only"] is True and found["editor"] == editor and found["dataset"].endswith("split train")
    )
    assert found["hparams"]["layer"] == LAYER
    assert guard.handle.digest() == before
    assert not guard.home.exists(), "an evaluation is not an edit: nothing is put on record"


def test_the_same_seed_gives_the_same_figures_and_prefixes(guard: Guard, data: Path) -> None:
    once, again = (evaluate_dataset(guard, data, limit=3, seed=5) for _ in range(2))
    assert once.metrics == again.metrics
    assert once.about == again.about
    assert len(once.about["hparams"]["contexts"]) == 3, "the bare prompt and two sampled prefixes, on record"


def test_an_unknown_editor_or_setting_is_refused_before_anything_is_edited(guard: Guard, data: Path) -> None:
    with pytest.raises(BadRequestError, match="unknown editor 'magic'"):
        evaluate_dataset(guard, data, editor="magic")
    with pytest.raises(BadRequestError, match="no setting 'speed'"):
        evaluate_dataset(guard, data, hparams={"speed": 3})


def test_a_sequence_by_a_real_editor_is_told_of_the_facts_before(
    guard: Guard, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guardedit.editors import EDITORS

    rome, earlier = EDITORS["rome"], list[int]()

    def watched(handle: ModelHandle, requests: object, hparams: object, inputs: SolveInputs) -> object:
        earlier.append(len(inputs.earlier))
        return rome.solve(handle, requests, hparams, inputs)  # type: ignore[arg-type]

    monkeypatch.setitem(EDITORS, "rome", replace(rome, solve=watched))  # type: ignore[arg-type]
    digest = guard.handle.digest()
    found = evaluate_dataset(guard, data, limit=3, protocols=[Protocol(sequence=3)])
    assert earlier == [0, 1, 2]
    assert [point.edits for point in found.curve] == [0, 1, 2, 3]
    assert guard.handle.digest() == digest


def test_several_batch_sizes_are_one_curve(guard: Guard, data: Path, tmp_path: Path) -> None:
    protocols = [Protocol(batch=size) for size in (1, 3)]
    state = tmp_path / "run.jsonl"
    found = evaluate_dataset(
        guard, data, editor="in-context", limit=3, protocols=protocols, state=state, known_only=True
    )
    assert [point.edits for point in found.curve] == [0, 1, 3]
    assert found.about["edits"]["batch"] == 3 and found.about["hparams"] == {}
    assert sorted(path.name for path in tmp_path.glob("*run.jsonl")) == [
        "batch1-sequence1-run.jsonl",
        "batch3-sequence1-run.jsonl",
    ]
    with pytest.raises(BadRequestError, match="in-context has no settings"):
        evaluate_dataset(guard, data, editor="in-context", hparams={"layer": 1})


def test_a_fact_without_an_old_answer_is_evaluated_but_never_known(guard: Guard, tmp_path: Path) -> None:
    record = {
        "subject": "Marie Curie",
        "prompt": "Marie Curie was born in",
        "target_new": "Oslo",
        "portability": {"Reasoning": [{"prompt": "Her land is", "ground_truth": "Norway"}]},
    }
    path = tmp_path / "recent.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    found = evaluate_dataset(guard, path, editor="finetune").as_json()
    assert found["metrics"]["efficacy"]["n"] == 1 and found["metrics"]["reasoning"]["n"] == 1
    with pytest.raises(BadRequestError, match="no case to evaluate"):
        evaluate_dataset(guard, path, editor="finetune", known_only=True)


def test_the_command_measures_everything_and_draws(
    guard: Guard, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from guardedit.cli import app

    monkeypatch.setattr(Options, "guard", lambda self: guard)
    words = ["--json", "evaluate", str(data), "--editor", "finetune", "--limit", "2", "--sequence", "2"]
    words += ["--also", "all", "--items", "3", "--plot", str(tmp_path / "curve.svg")]
    digest = guard.handle.digest()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.exception
    metrics = json.loads(done.stdout)["metrics"]
    wanted = (
        "efficacy", "efficacy_generated", "distractor_neighborhood", "distractor_neighborhood_kl_nats", "fluency",
        "same_subject_kl_nats", "same_subject_lost_top1", "far_kl_nats", "perplexity_ratio_prose", "retention_argmax",
        "ability_arithmetic", "ability_syllogisms_base",
    )  # fmt: skip
    # Retention is of edits that worked; two steps of fine-tuning need not have made any.
    assert {name for name in wanted if name not in metrics} <= {"retention_argmax"}
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    assert guard.handle.digest() == digest
    alone = CliRunner().invoke(app, ["--json", "evaluate", "ability", "--items", "4"])
    assert alone.exit_code == 0, alone.exception
    assert json.loads(alone.stdout)["metrics"]["ability_arithmetic"]["n"] == 4


def test_what_cannot_be_measured_is_refused_before_anything_is_edited(guard: Guard, data: Path) -> None:
    with pytest.raises(BadRequestError, match="choose from distractors"):
        evaluate_dataset(guard, data, asking=Asking(extras=("charm",)))
    with pytest.raises(BadRequestError, match="takes one fact at a time"):
        evaluate_dataset(guard, data, limit=2, protocols=[Protocol(batch=2)])
    with pytest.raises(BadRequestError, match="no protocol"):
        evaluate_dataset(guard, data, limit=2, protocols=[])
