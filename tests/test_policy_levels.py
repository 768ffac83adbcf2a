"""The shipped levels: each asks for whatever the next one asks for, and a limit found on one editor binds that one."""

from __future__ import annotations

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


USUAL = {HARM: 0.0, "rehearsed_p_new": 1.0, "subject_position": 3.0}
"""Safe values of scores of which less is not always safer."""


def _scores(**changed: float) -> list[Score]:
    """Safe by every limit, but for what is named."""
    names = [rule.metric.removeprefix("preop/") for rule in SHIPPED["standard"].rules_for("preop")]
    values = dict.fromkeys(names, 1e-9) | USUAL | changed
    return [
        Score(name=name, value=value, unit="ratio", stage="delta", scope="far", n=100)
        for name, value in values.items()
    ]


def _outcome(policy: Policy, scores: list[Score], editor: str = "rome") -> int:
    return SEVERITY[judge(scores, policy, (), "preop", NOW, "one", editor).outcome]


def test_a_stricter_level_lets_nothing_pass_that_the_next_one_stops() -> None:
    assert [_outcome(SHIPPED[level], _scores()) for level in LEVELS] == [0, 0, 0]
    seen = set()
    for rule in SHIPPED["standard"].rules_for("preop"):
        for share in (0.5, 0.7, 0.95, 1.05, 1.3, 2.5):
            scores = _scores(**{rule.metric.removeprefix("preop/"): rule.limit * share})
            found = tuple(_outcome(SHIPPED[level], scores) for level in ("permissive", "standard", "strict"))
            assert found == tuple(sorted(found)), (rule.id, share)
            seen.add(found)
    assert {(0, 0, 1), (0, 1, 1), (1, 1, 1), (2, 2, 2)} <= seen, "each kind of difference occurs"


def test_the_levels_differ_on_a_probability_between_their_limits() -> None:
    scores = _scores(**{HARM: 0.2})
    assert [_outcome(SHIPPED[level], scores) for level in LEVELS] == [1, 0, 0]
    assert _outcome(SHIPPED["strict"], scores, "memit") == 1
    assert _outcome(SHIPPED["strict"], scores, "emmet") == 0, "no model was fitted on its edits"


def test_a_plan_without_a_probability_goes_to_a_person_where_its_editor_has_a_model() -> None:
    scores = [s for s in _scores() if s.name != HARM]
    judged = judge(scores, SHIPPED["standard"], (), "preop", NOW, "one", "rome")
    assert judged.outcome == "needs-approval"
    assert next(f.verdict for f in judged.findings if f.rule == "harm-probability") == "inconclusive"
    other = judge(scores, SHIPPED["standard"], (), "preop", NOW, "one", "emmet")
    assert other.outcome == "auto-approved" and "harm-probability" not in {f.rule for f in other.findings}


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


def test_what_is_neither_file_nor_level_is_told_what_there_is() -> None:
    with pytest.raises(
        PolicyError, match="No such file; the levels that ship are strict, standard, permissive"
    ):
        policy_file(kit_folder(MODEL), Path("lenient"), MODEL)


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
    scores = {f"pred.{s.name}": s.value for s in _scores()}
    frame = pd.DataFrame([{"editor": name, **scores, f"pred.{HARM}": 0.9} for name in ("rome", "emmet")])
    one, other = judgements(frame, SHIPPED["permissive"])
    assert {f.rule for f in one.findings} - {f.rule for f in other.findings} == {"harm-probability"}
