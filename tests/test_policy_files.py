"""A policy as a file: what it does not know it refuses by name, and every key is documented."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_helpers import EXAMPLE, HEAD, _rule, example

from guardedit.errors import PolicyError
from guardedit.gate.policy import Policy, Rule, load_policy, parse_policy

__all__ = ["example"]


def test_the_digest_is_of_the_content_not_of_the_layout(example: Policy) -> None:
    text = EXAMPLE.read_text()
    again = parse_policy("# another comment\n" + text.replace("limit = 1\n", "limit = 1.0\n"), "b.toml")
    assert again.digest == example.digest
    assert parse_policy(text.replace("limit = 1\n", "limit = 2\n"), "c.toml").digest != example.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "colour = 1\n" + _rule(), "unknown key 'colour'"),
        (HEAD + _rule(limitt="2"), "unknown key \"rule 'a'.limitt\""),
        (HEAD + '[defaults]\non_fail = "blocked"\n' + _rule(), "unknown key 'defaults.on_fail'"),
        (HEAD + '[defaults]\non_soft_fail = "pass"\n' + _rule(), "on_soft_fail"),
        (HEAD + '[defaults]\nseparate_approver = "no"\n' + _rule(), "separate_approver"),
        (HEAD + _rule(limit="nan"), "rule 'a'.limit"),
        (HEAD + _rule(limit="inf"), "rule 'a'.limit"),
        (HEAD + _rule(limit="true"), "rule 'a'.limit"),
        (HEAD + _rule(limit='"1"'), "rule 'a'.limit"),
        (HEAD + _rule(limit=""), "limit"),
        (HEAD + _rule(op='"!="'), "rule 'a'.op"),
        (HEAD + _rule(level='"off"'), "rule 'a'.level"),
        (HEAD + _rule(metric='"leakage"'), "rule 'a'.metric"),
        (HEAD + _rule(sentence='"It moves by {value!r}."'), "only {value}"),
        (HEAD + _rule(sentence='"It moves by {value.__class__}."'), "only {value}"),
        (HEAD + _rule(sentence='"It moves by {value:>999999999}."'), "only {value}"),
        (HEAD + _rule(sentence='"It moves by {."'), "sentence"),
        (HEAD + _rule(sentence='"It moves by {}."'), "only {value}"),
        (HEAD + _rule(stage='"postop"'), "does not go with"),
        (HEAD + _rule() + _rule(), "occurs twice"),
        (HEAD, "rule"),
        ("version = 2\nname = 't'\n" + _rule(), "version"),
        ("version = true\nname = 't'\n" + _rule(), "version"),
        ("name = 't'\n" + _rule(), "version"),
        (HEAD + "rule = 7\n", "rule"),
        (HEAD + "defaults = 7\n" + _rule(), "defaults"),
        (HEAD + "rule = [7]\n", "rule"),
        (HEAD + "[[rule", "not TOML"),
    ],
)
def test_what_a_policy_does_not_know_it_refuses_naming_file_and_key(text: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "mine.toml")
    assert "mine.toml" in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_metric_that_nobody_measures_is_refused_with_a_guess() -> None:
    text = HEAD + _rule(metric='"preop/leekage"')
    with pytest.raises(PolicyError, match="did you mean 'preop/leakage'"):
        parse_policy(text, "mine.toml", {"preop/leakage", "postop/far_kl"})
    assert parse_policy(text, "mine.toml").rules[0].metric == "preop/leekage"


def test_a_policy_that_cannot_be_read_is_a_policy_error(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "nowhere.toml", tmp_path, tmp_path / "binary.toml"):
        with pytest.raises(PolicyError, match=path.name):
            load_policy(path)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_any_byte_changed_in_a_policy_is_parsed_or_refused(position: int, byte: int) -> None:
    data = bytearray(EXAMPLE.read_bytes())
    data[position % len(data)] = byte
    with suppress(PolicyError):
        parse_policy(data.decode("utf-8", "surrogateescape"), "mine.toml")


DOCS = Path(__file__).parent.parent / "docs" / "policy.md"


def test_the_documented_policy_is_a_policy_and_every_key_is_documented() -> None:
    text = DOCS.read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    parse_policy(block, "docs/policy.md")
    tables = set(re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE))
    fields = (set(Policy.model_fields) - {"rules"}) | set(Rule.model_fields)
    assert tables == fields
