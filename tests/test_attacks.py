"""Attacks that no other test tries. docs/attacks.md lists all of them, with what became of each."""

from __future__ import annotations

import json
import os
import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import builders
import pytest
from pipeline_helpers import SOFT, Home, flipped, home, request_of, world
from test_signed_pipeline import REASON, Team

from guardedit.audit import report
from guardedit.audit.chain import MAX_ENTRY, encode_entry
from guardedit.audit.checkpoints import read_checkpoint
from guardedit.audit.ledger import Ledger
from guardedit.audit.mlflow_content import description
from guardedit.audit.report import markdown, sheet_of
from guardedit.errors import BadRequestError, GuardeditError, IntegrityError, NotFoundError, StaleError
from guardedit.gate.keys import load_key, new_key
from guardedit.pipeline.anchoring import checkpoint
from guardedit.records import AuditReport, EditRequest, Plan, RiskReport, canonical, parse_record

__all__ = ["home", "world"]

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "attacks.md"


def rows() -> list[list[str]]:
    """The cells of the page's table."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_every_attack_on_the_page_names_a_test_that_is_there() -> None:
    there = {
        name
        for path in TESTS.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    found = rows()
    assert len(found) >= 45
    assert len({row[0] for row in found}) == len(found), "an attack is listed twice"
    for attack, outcome, *tests in found:
        named = re.findall(r"`(test_\w+)`", " ".join(tests))
        assert outcome and named, attack
        assert set(named) <= there, f"{attack}: {set(named) - there}"


# -- files of a plan, a kit and a model


def planned(home: Home) -> str:
    return home.guard().plan(request_of()).plan_id


@pytest.mark.parametrize("file", ["plan.json", "delta.safetensors"])
@pytest.mark.parametrize("how", ["a byte", "cut", "another plan's", "a link to another plan's", "gone"])
def test_a_plans_files_are_those_on_record_or_nothing_is_staged(home: Home, file: str, how: str) -> None:
    plan_id = planned(home)
    other = home.guard().plan(request_of(1)).plan_id
    path, another = (home.folder / "plans" / name / file for name in (plan_id, other))
    data = path.read_bytes()
    path.unlink()
    if how == "a byte":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "another plan's":
        shutil.copyfile(another, path)
    elif how == "a link to another plan's":
        path.symlink_to(another)
    with pytest.raises(IntegrityError):
        home.guard().apply(plan_id)
    assert not home.guard().store.staged_ids()
    assert home.run("verify", mlflow=None).code == 6


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_score_that_is_no_number_is_not_read_back(value: str) -> None:
    plan = builders.eiffel_committed().plan
    name = plan.risk.scores[0].name
    text = canonical(plan).decode()
    spoilt = re.sub(r'("name":"' + name + r'"[^}]*"value":)[-0-9.e]+', rf"\g<1>{value}", text, count=1)
    assert spoilt != text
    with pytest.raises(IntegrityError):
        parse_record(Plan, spoilt.encode(), expected=None, what="plan")
    with pytest.raises(ValueError):
        RiskReport.model_validate(json.loads(spoilt)["risk"])


def _swap(folder: Path, seed: int) -> None:
    """Every tensor of a safetensors file replaced by others of the same shape; the file stays a good one."""
    import torch
    from safetensors.torch import load_file, save_file

    (path,) = folder.glob("*.safetensors") if folder.is_dir() else [folder]
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    made = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.rand(t.shape, generator=made).to(t.dtype) if t.is_floating_point() else t
        for name, t in load_file(path).items()
    }
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("what", ["sae", "second moment"])
def test_statistics_swapped_for_others_of_equal_shape_stop_the_plan(home: Home, what: str) -> None:
    plan_id = planned(home)
    path = (
        home.world.moment
        if what == "second moment"
        else next(home.world.saes[1].glob("sae_weights.safetensors"))
    )
    kept = path.read_bytes()
    try:
        _swap(path, 7)
        with pytest.raises((IntegrityError, StaleError)):
            home.guard().apply(plan_id)
    finally:
        path.write_bytes(kept)
    assert not home.guard().store.staged_ids()


def test_a_kits_file_that_was_changed_stops_the_plan_by_name(home: Home) -> None:
    plan_id = planned(home)
    with flipped(home.world.moment, 2000), pytest.raises((IntegrityError, StaleError)) as caught:
        home.guard().apply(plan_id)
    assert "second_moments" in str(caught.value) or home.world.moment.name in str(caught.value)


def test_a_policy_file_that_was_changed_makes_the_plan_stale(home: Home) -> None:
    policy = home.policy(SOFT)
    plan = home.guard(policy=policy).plan(request_of())
    home.guard(policy=policy).approve(plan.plan_id, REASON)
    policy.write_text(policy.read_text().replace("limit = 100.0", "limit = 1e9"))
    with pytest.raises(StaleError, match="the policy"):
        home.guard(policy=policy).apply(plan.plan_id)


HEADERS: dict[str, bytes] = {
    "a length beyond the file": (2**40).to_bytes(8, "little") + b"{}",
    "offsets beyond the file": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "offsets that overlap": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "a shape that does not fit": b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4]}}',
    "a negative offset": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}',
    "no JSON": b"{" * 64,
}


@pytest.mark.parametrize("lie", HEADERS)
def test_a_header_that_lies_about_its_tensors_is_refused(tmp_path: Path, lie: str) -> None:
    from guardedit.audit.safetensors_bytes import read_header
    from guardedit.edits.deltas import decode
    from guardedit.records import digest_of_bytes

    raw = HEADERS[lie]
    data = raw if lie == "a length beyond the file" else len(raw).to_bytes(8, "little") + raw + b"\0" * 4
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    if lie != "offsets that overlap":  # each tensor's bytes have a digest of their own
        with pytest.raises(GuardeditError):
            read_header(path)
    record = builders.eiffel_committed().plan.delta.model_copy(update={"file_digest": digest_of_bytes(data)})
    with pytest.raises(IntegrityError):
        decode(data, record)


# -- names that lead elsewhere, links, modes


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "a\x00b", "A", "é", "x" * 65, ""])
def test_a_name_never_becomes_a_path(home: Home, tmp_path: Path, name: str) -> None:
    guard = home.guard()
    for verb in (guard.read_plan, guard.rollback, guard.apply):
        with pytest.raises(GuardeditError):
            verb(name)
    for call in (new_key, load_key):
        with pytest.raises(BadRequestError, match="key's name"):
            call(tmp_path / "k", name)
    assert not (tmp_path / "k").exists() and not home.folder.exists()


def test_a_subject_that_is_a_path_makes_a_plain_plan_name(home: Home) -> None:
    plan = home.guard().plan(request_of(target_new="../../../etc/passwd"))
    assert re.fullmatch(r"[a-z0-9-]+", plan.plan_id)
    assert (home.folder / "plans" / plan.plan_id / "plan.json").is_file()


def test_a_linked_key_or_one_that_others_may_read_does_not_sign(tmp_path: Path) -> None:
    new_key(tmp_path / "mine", "ana")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "ana.pem").symlink_to(tmp_path / "mine" / "ana.pem")
    with pytest.raises(BadRequestError, match="link"):
        load_key(tmp_path / "keys", "ana")
    for mode in (0o640, 0o604, 0o660):
        (tmp_path / "mine" / "ana.pem").chmod(mode)
        with pytest.raises(BadRequestError, match="others"):
            load_key(tmp_path / "mine", "ana")
    os.mkfifo(tmp_path / "keys" / "eva.pem", 0o600)
    with pytest.raises(BadRequestError, match="plain file"):
        load_key(tmp_path / "keys", "eva")


def test_a_link_laid_where_a_key_or_checkpoint_goes_leads_nothing_astray(home: Home, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "k").mkdir()
    for name in ("ana.pub", "eva.pem"):
        (tmp_path / "k" / name).symlink_to(precious)
        with pytest.raises(BadRequestError, match="already"):
            new_key(tmp_path / "k", Path(name).stem)
    planned(home)
    out = tmp_path / "kept.json"
    out.symlink_to(precious)
    checkpoint(home.guard(), out)
    assert precious.read_text() == "mine" and not out.is_symlink()


def test_a_home_behind_a_link_is_the_same_home_and_keys_in_it_are_refused(home: Home, tmp_path: Path) -> None:
    planned(home)
    link = tmp_path / "link"
    link.symlink_to(home.folder)
    moved = Home(home.world, link)
    assert moved.guard().verify()["plans"] == 1
    ran = home.run("keys", "new", "ana", "--keys", str(link / "keys"), mlflow=None)
    assert ran.code == 2 and "elsewhere" in ran.err


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


# -- the ledger, the clock, checkpoints


def test_an_entry_that_no_reader_could_hold_is_not_written(home: Home) -> None:
    with pytest.raises(BadRequestError, match="bytes"):
        encode_entry(1, "now", "planned", {"text": "x" * MAX_ENTRY}, "sha256:" + "0" * 64)
    with pytest.raises(BadRequestError):
        Ledger(home.folder / "ledger.sqlite").append("planned", {"text": "x" * MAX_ENTRY})
    assert not (home.folder / "ledger.sqlite").exists()


def test_an_expired_approval_is_not_revived_by_a_clock_that_goes_back(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guardedit.pipeline.workspace import Workspace

    policy = home.policy(SOFT)
    guard = home.guard(policy=policy)
    plan, other = guard.plan(request_of()), guard.plan(request_of(1))
    for one in (plan, other):
        guard.approve(one.plan_id, REASON)
    later = datetime.now(UTC) + timedelta(hours=80)
    monkeypatch.setattr(Workspace, "now", lambda _: later)
    with pytest.raises(StaleError, match="expired"):
        home.guard(policy=policy).apply(plan.plan_id)
    Ledger(home.folder / "ledger.sqlite").append("untracked", {"reason": "something later"}, later)
    monkeypatch.undo()
    monkeypatch.setenv("GUARDEDIT_CACHE", str(home.world.cache))
    # One word's end is on record; the other's was never noticed, so the clock itself is held against the ledger.
    for one, why in ((plan, "expired"), (other, "went back")):
        with pytest.raises(StaleError, match=why):
            home.guard(policy=policy).apply(one.plan_id)


def test_a_checkpoint_in_which_a_key_stands_twice_is_none(home: Home, tmp_path: Path) -> None:
    planned(home)
    kept = tmp_path / "kept.json"
    checkpoint(home.guard(), kept)
    whole = kept.read_text()
    kept.write_text(whole.replace('{"checkpoint":', '{"checkpoint":{"seq":1},"checkpoint":', 1))
    with pytest.raises(IntegrityError, match="not a checkpoint"):
        read_checkpoint(kept)
    kept.write_text("[" * 100_000)
    with pytest.raises(IntegrityError):
        read_checkpoint(kept)


def test_a_ledger_cut_before_its_checkpoint_is_seen_although_its_head_fits(
    home: Home, tmp_path: Path
) -> None:
    guard = home.guard()
    guard.plan(request_of())
    guard.plan(request_of(1))
    checkpoint(guard, tmp_path / "kept.json")
    rows_ = Ledger(home.folder / "ledger.sqlite").rows()[:1]
    for name in ("ledger.sqlite", "ledger.head", "ledger.sqlite-wal", "ledger.sqlite-shm"):
        (home.folder / name).unlink(missing_ok=True)
    Ledger(home.folder / "ledger.sqlite").adopt(rows_)
    with pytest.raises(IntegrityError, match="ends at entry 1"):
        home.guard().verify(tmp_path / "kept.json")


def test_a_revoked_owner_cannot_name_keys_with_an_old_statement(home: Home) -> None:
    from guardedit.pipeline.signing import revoke_key, trust_key

    team = Team(home, SOFT)
    for name in ("olga", "pia"):
        new_key(team.keys, name)
    trust_key(home.guard(), team.keys / "olga.pub", "policy-owner")
    trust_key(team.by("olga"), team.keys / "pia.pub", "policy-owner")
    old = home.guard().ledger.entries("key-trusted")[-1].body
    revoke_key(team.by("pia"), "olga", "left the house")
    forged = Ledger(home.folder / "ledger.sqlite").append("key-trusted", old)
    ran = home.run("verify", mlflow=None)
    assert ran.code == 6 and f"entry {forged.seq}" in ran.err


def test_an_unknown_plan_is_no_way_to_read_a_file(home: Home) -> None:
    planned(home)
    for name in ("0001-none", "..", "plans"):
        with pytest.raises(NotFoundError):
            home.guard().read_plan(name)


def test_an_edit_is_not_staged_while_its_author_signed_another_plan(home: Home) -> None:
    team = Team(home, SOFT)
    plan, other = (team.by("ben").plan(request_of(n)) for n in (0, 1))
    ledger = Ledger(home.folder / "ledger.sqlite")
    entry = ledger.entries("planned", plan_id=other.plan_id)[0]
    stolen: dict[str, Any] = {
        **ledger.entries("planned", plan_id=plan.plan_id)[0].body,
        "proposal": entry.body["proposal"],
    }
    ledger.append("planned", stolen)
    with pytest.raises(GuardeditError):
        team.by("ana").approve(plan.plan_id, REASON)
    assert home.run("verify", mlflow=None).code == 6
