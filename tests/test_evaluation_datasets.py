"""`evaluate_dataset`: a file, an editor and a workspace's kit in, figures out; the workspace is as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SENTENCES
from evaluation_helpers import spoken

import guardedit
from guardedit.errors import BadRequestError
from guardedit.evaluation.datasets import evaluate_dataset
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
