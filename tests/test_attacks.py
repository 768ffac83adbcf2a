"""Attacks on files and names that no other test tries. docs/attacks.md lists all attacks, with what became of each."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import builders
import pytest
from attack_helpers import planned
from pipeline_helpers import SOFT, Home, flipped, home, request_of, world
from test_signed_pipeline import REASON

from guardedit.errors import BadRequestError, GuardeditError, IntegrityError, NotFoundError, StaleError
from guardedit.gate.keys import load_key, new_key
from guardedit.pipeline.anchoring import checkpoint
from guardedit.records import Plan, RiskReport, canonical, parse_record

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


def test_an_unknown_plan_is_no_way_to_read_a_file(home: Home) -> None:
    planned(home)
    for name in ("0001-none", "..", "plans"):
        with pytest.raises(NotFoundError):
            home.guard().read_plan(name)
