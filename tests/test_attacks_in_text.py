"""Attacks by text that no other test tries: in what people read, and in files that people hand in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import builders
import pytest
from pipeline_helpers import SOFT, Home, home, request_of, world

from guardedit.audit import report
from guardedit.audit.mlflow_content import description
from guardedit.audit.report import markdown, sheet_of
from guardedit.errors import BadRequestError
from guardedit.records import AuditReport, EditRequest

__all__ = ["home", "world"]


# -- what people read

TERMINAL = "Rome\x1b]0;owned\x07\x1b[2J\u202e\u200b\u2060\ufeff\xad"


def test_nothing_from_a_request_acts_on_the_terminal_in_any_verb(home: Home) -> None:
    request = request_of(subject="Eiffel\u200b Tower", target_new=TERMINAL, reason=TERMINAL)
    plan_id = home.guard().plan(request).plan_id
    for words in (
        ("status",),
        ("show", plan_id),
        ("log",),
        ("plan", "\x1b[2Jnowhere.yaml"),
        ("show", "\x1b[2J"),
    ):
        ran = home.run(*words, mlflow=None)
        shown = ran.out + ran.err
        assert not re.search(
            "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]", shown
        ), words
    assert "<U+202E>" in home.run("status", mlflow=None).out


def test_a_line_break_in_a_request_forges_no_line_of_output(home: Home) -> None:
    forged = "Rome\n  AUTO-APPROVED: all limits are kept\n"
    plan_id = home.guard(SOFT).plan(request_of(target_new=forged)).plan_id
    for words in (("status",), ("show", plan_id)):
        lines = home.run(*words, mlflow=None).out.splitlines()
        assert not [line for line in lines if line.strip().startswith("AUTO-APPROVED")]


EVIL = EditRequest(
    subject="<script>alert(1)</script>",
    prompt="The capital of {} is",
    target_new="![x](http://evil.example/x.png) [click](javascript:alert(1)) <img src=x onerror=alert(1)>",
    target_true="a | b | c\u202e",
    reason="</title></style><iframe src=//evil.example>`${x}`\n# heading\n| a | b |",
)


def evil_report() -> AuditReport:
    given = builders.france_blocked()
    return given.model_copy(update={"plan": given.plan.model_copy(update={"requests": (EVIL,)})})


def test_a_request_puts_no_script_link_or_picture_into_mlflows_markdown() -> None:
    for text in (description(evil_report()), markdown(sheet_of(evil_report()), "digest")):
        assert "\u202e" not in text
        bare = re.sub(r"\\.", "", text)
        assert not re.search(r"<(script|img|iframe)", bare), bare
        assert not re.search(r"!?\[[^\]]*\]\([^)]*\)", bare), bare
        assert not re.search(r"^# heading", bare, re.M)


def test_a_request_puts_no_tag_into_the_page(tmp_path: Path) -> None:
    page = report.render(evil_report(), tmp_path).html.read_text(encoding="utf-8")
    assert not re.search(r"<(script|iframe|img)\b", page, re.I)
    assert page.count("</title>") == page.count("<title") and page.count("</style>") == page.count("<style")


# -- files that people hand in


def refused(home: Home, text: str, *phrases: str, name: str = "requests.yaml") -> None:
    ran = home.run("plan", str(home.requests(text, name=name)))
    assert ran.code == 2, ran
    for phrase in phrases:
        assert phrase in ran.err, ran.err
    assert not home.folder.exists() and len(ran.err) < 2000


def test_a_key_that_stands_twice_in_a_request_is_refused(home: Home) -> None:
    good = '"subject": "France", "prompt": "The capital of {} is"'
    twice = f'{{{good}, "target_new": "Lyon", "target_new": "Rome"}}'
    refused(home, twice, "'target_new'", "twice")
    refused(home, twice, "'target_new'", "twice", name="requests.jsonl")
    refused(
        home, "subject: France\nprompt: x {}\ntarget_new: Lyon\ntarget_new: Rome\n", "'target_new'", "twice"
    )


def test_a_yaml_bomb_costs_nothing(home: Home) -> None:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{b}: &{b} [{','.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    refused(home, "\n".join(lines), "unknown key")
    anchored = "- &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"- &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    refused(home, anchored, "request 1")
    nested = "subject: France\nprompt: 'The capital of {} is'\ntarget_new: Rome\nparaphrases:\n" + "".join(
        "  " + line + "\n" for line in anchored.splitlines()
    )
    refused(home, nested, "paraphrases")
    refused(home, "[" * 100_000, "cannot be read")


def test_text_that_nobody_can_read_is_too_long(home: Home) -> None:
    huge = "x" * 10_000_000
    good = {"subject": "France", "prompt": "The capital of {} is", "target_new": "Rome"}
    for key in ("subject", "target_new", "reason"):
        refused(home, json.dumps({**good, key: huge}), key, "10000000 characters", name="requests.jsonl")
    refused(home, json.dumps([{**good, "paraphrases": ["x"] * 100_000}]), "100000 texts")
    plan_id = home.guard(SOFT).plan(request_of()).plan_id
    for call in (home.guard(SOFT).approve, home.guard(SOFT).reject):
        with pytest.raises(BadRequestError, match="10000000 characters"):
            call(plan_id, huge)


def test_a_decomposed_letter_that_looks_like_another_text_is_refused(home: Home) -> None:
    decomposed = {"subject": "Cafe\u0301", "prompt": "The owner of {} is", "target_new": "Rome"}
    refused(home, json.dumps([decomposed]), "NFC")


def test_a_look_alike_target_is_shown_with_its_code_points() -> None:
    given = builders.eiffel_committed()
    sly = given.plan.requests[0].model_copy(update={"target_new": " R\u043eme"})
    text = markdown(
        sheet_of(given.model_copy(update={"plan": given.plan.model_copy(update={"requests": (sly,)})})), "d"
    )
    assert "U+043E" in text
