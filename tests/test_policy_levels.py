"""The shipped levels: each asks for whatever the next one asks for, and a limit found on one editor binds that one."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from guardedit.cli import app
from guardedit.errors import PolicyError
from guardedit.evaluation.guard.operating import judgements
from guardedit.gate.policy import Policy, judge, parse_policy
from guardedit.pipeline.expecting import HARM
from guardedit.pipeline.kit import kit_folder
from guardedit.pipeline.levels import LEVELS, policy_file, policy_of
from guardedit.records import Score

NOW = datetime(2030, 1, 1, tzinfo=UTC)
MODEL = "smollm2-135m"
SHIPPED = {name: policy_of(policy_file(kit_folder(MODEL), Path(name), MODEL)) for name in LEVELS}
SEVERITY = {"auto-approved": 0, "needs-approval": 1, "blocked": 2}
RULE = """
version = 1
name = "t"
[[rule]]
id = "a"
metric = "preop/leakage"
op = "<="
limit = 1.0
level = "soft"
sentence = "It moves by {value}; {limit} is allowed."
"""
"""Without its last line the rule goes on."""


def _scores(rng: random.Random) -> list[Score]:
    """A value near each limit, on either side of it."""
    rules = SHIPPED["standard"].rules_for("preop")
    limits = {rule.metric.removeprefix("preop/"): rule.limit for rule in rules}
    return [
        Score(name=name, value=limit * rng.uniform(0.5, 1.1), unit="ratio", stage="delta", scope="far", n=100)
        for name, limit in limits.items()
    ]


def _outcome(policy: Policy, scores: list[Score], editor: str = "rome") -> int:
    return SEVERITY[judge(scores, policy, (), "preop", NOW, "one", editor).outcome]


@pytest.mark.parametrize("seed", range(40))
def test_a_stricter_level_lets_nothing_pass_that_the_next_one_stops(seed: int) -> None:
    scores = _scores(random.Random(seed))
    found = [_outcome(SHIPPED[level], scores) for level in ("permissive", "standard", "strict")]
    assert found == sorted(found)


def test_the_levels_differ_on_a_probability_between_their_limits() -> None:
    usual = {HARM: 0.2, "rehearsed_p_new": 1.0, "subject_position": 3.0}
    scores = [
        one.model_copy(update={"value": usual.get(one.name, (one.value or 0.0) * 0.01)})
        for one in _scores(random.Random(0))
    ]
    assert [_outcome(SHIPPED[level], scores) for level in LEVELS] == [1, 0, 0]
    assert _outcome(SHIPPED["strict"], scores, "memit") == 0, "the model was fitted on ROME's edits"


def test_a_plan_without_a_probability_goes_to_a_person_where_its_editor_has_a_model() -> None:
    scores = [s for s in _scores(random.Random(0)) if s.name != HARM]
    judged = judge(scores, SHIPPED["standard"], (), "preop", NOW, "one", "rome")
    assert next(f.verdict for f in judged.findings if f.rule == "harm-probability") == "inconclusive"
    named = {f.rule for f in judge(scores, SHIPPED["standard"], (), "preop", NOW, "one", "emmet").findings}
    assert "harm-probability" not in named


def test_a_rule_for_editors_binds_those_and_whoever_is_not_named() -> None:
    policy = parse_policy(RULE + 'editors = ["rome", "memit"]\n', "t.toml")
    bound = {e: bool(policy.rules_for("preop", editor=e)) for e in ("rome", "memit", "emmet", None)}
    assert bound == {"rome": True, "memit": True, "emmet": False, None: True}


def test_policies_from_before_keep_their_digest() -> None:
    assert parse_policy(RULE, "t.toml").digest == (
        "sha256:87cf0a0d5758f0b07abb985a189d058b1bd00ec9eddbb3e1faca8591c121bf67"
    )


@pytest.mark.parametrize("editors", ("[]", '"rome"', "[1]"))
def test_editors_are_a_list_of_names(editors: str) -> None:
    with pytest.raises(PolicyError, match="editors"):
        parse_policy(RULE + f"editors = {editors}\n", "t.toml")


def test_a_rule_that_screens_requests_cannot_be_for_one_editor() -> None:
    with pytest.raises(PolicyError, match="leave `editors` out"):
        parse_policy(RULE + 'stage = "key"\neditors = ["rome"]\n', "t.toml")


def test_an_editor_that_does_not_exist_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(RULE + 'editors = ["rom"]\n')
    with pytest.raises(PolicyError, match=r"unknown editor 'rom'; there are .*rome"):
        policy_of(path)


def test_a_file_comes_before_a_level_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = kit_folder(MODEL)
    assert policy_file(folder, Path("strict"), MODEL) == folder / "policies" / "strict.toml"
    Path("strict").write_text(RULE)
    assert policy_file(folder, Path("strict"), MODEL) == Path("strict")
    Path("strict").unlink()
    with pytest.raises(PolicyError, match="no policy 'strict'"):
        policy_file(tmp_path, Path("strict"), MODEL)


def test_what_is_printed_is_what_would_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    for level in LEVELS:
        told = runner.invoke(app, ["policy", "show", level])
        assert told.exit_code == 0
        assert parse_policy(told.stdout, "printed").digest == SHIPPED[level].digest
    listed = runner.invoke(app, ["policy", "show"])
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(LEVELS)


def test_tried_edits_are_judged_as_their_editor() -> None:
    scores = {f"pred.{s.name}": s.value for s in _scores(random.Random(0))}
    frame = pd.DataFrame([{"editor": name, **scores, f"pred.{HARM}": 0.9} for name in ("rome", "memit")])
    one, other = judgements(frame, SHIPPED["permissive"])
    assert {f.rule for f in one.findings} - {f.rule for f in other.findings} == {"harm-probability"}
