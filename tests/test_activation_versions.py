"""The store and activation edits: bytes that the base does not have come, are checked, and go without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import NAMES, Tiny, make_store, random_bytes

from guardedit.audit.export import export
from guardedit.audit.versions import VersionStore
from guardedit.errors import BadRequestError, IntegrityError, NotFoundError, OutOfOrderError
from guardedit.records import ABSENT, digest_of, digest_of_bytes

ONE, TWO = "activation.1.00112233aabbccdd", "activation.2.ffeeddcc44556677"
WEIGHT = NAMES[1]


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return make_store(tmp_path)


def commit(tiny: Tiny, edit_id: str, images: dict[str, bytes]) -> str:
    tiny.store.stage(edit_id, images, expected={name: digest_of_bytes(data) for name, data in images.items()})
    return tiny.store.commit(edit_id).digest


def test_what_the_base_does_not_have_is_read_as_no_bytes(tiny: Tiny) -> None:
    raw = tiny.store.read(ONE)
    assert (raw.data, raw.dtype, raw.shape, raw.digest) == (b"", "U8", (0,), ABSENT)
    with pytest.raises(NotFoundError):
        tiny.store.read("no.such.weight")


def test_an_edit_comes_into_the_manifest_and_its_undo_takes_it_out(tiny: Tiny) -> None:
    before, data = tiny.store.digest(), random_bytes(5, 333)
    after = commit(tiny, "e1", {ONE: data})
    assert after == tiny.store.digest() == digest_of(tiny.manifest | {ONE: digest_of_bytes(data)})
    assert tiny.store.read(ONE).data == data and tiny.store.read(ONE, "base").data == b""
    assert set(tiny.store.live_overrides()) == {ONE} and tiny.store.lineage().holder(ONE) == "000001-e1"
    undone = tiny.store.roll_back("e1")
    assert undone.digest == tiny.store.digest() == before and undone.manifest == tiny.manifest
    assert not tiny.store.live_overrides() and tiny.store.lineage().holder(ONE) == "base"
    assert tiny.store.verify().digest == before
    assert tiny.store.read(ONE, "e1").data == data, "history keeps it"


def test_a_weight_and_an_activation_edit_in_one_version_go_and_come_together(tiny: Tiny) -> None:
    before = tiny.store.digest()
    commit(tiny, "e1", {WEIGHT: random_bytes(1), ONE: random_bytes(2, 50)})
    assert set(tiny.store.live_overrides()) == {WEIGHT, ONE}
    tiny.store.roll_back("e1")
    assert tiny.store.digest() == before and not tiny.store.live_overrides()


def test_activation_edits_never_stand_in_each_others_way(tiny: Tiny) -> None:
    """Undone in any order; edits of one weight still must go last in, first out."""
    digests = [tiny.store.digest()]
    for number, name in enumerate((ONE, TWO)):
        digests.append(commit(tiny, f"a{number}", {name: random_bytes(number, 40 + number)}))
    tiny.apply("w1", WEIGHT)
    tiny.apply("w2", WEIGHT)
    with pytest.raises(OutOfOrderError, match="w2"):
        tiny.store.roll_back("w1")
    tiny.store.roll_back("a0")
    assert ONE not in tiny.store.manifest() and TWO in tiny.store.manifest()
    for edit_id in ("w2", "w1", "a1"):
        tiny.store.roll_back(edit_id)
    assert tiny.store.digest() == digests[0] and tiny.store.verify().n_versions == 8


def test_the_same_edit_may_come_again_after_its_undo(tiny: Tiny) -> None:
    data = random_bytes(3, 77)
    first = commit(tiny, "e1", {ONE: data})
    tiny.store.roll_back("e1")
    assert commit(tiny, "e2", {ONE: data}) == first
    assert tiny.store.roll_back("e2").digest == digest_of(tiny.manifest)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tale_of_edits_and_undos_ends_where_its_edits_say(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tiny = make_store(tmp_path_factory.mktemp("tale"))
    live: dict[str, tuple[str, bytes]] = {}
    for number in range(data.draw(st.integers(1, 7))):
        if live and data.draw(st.booleans()):
            edit_id = data.draw(st.sampled_from(sorted(live)))
            tiny.store.roll_back(edit_id)
            del live[edit_id]
        else:
            name, body = f"activation.{number % 3}.{number:016x}", random_bytes(number, 20 + number)
            commit(tiny, f"e{number}", {name: body})
            live[f"e{number}"] = (name, body)
    expected = tiny.manifest | {name: digest_of_bytes(body) for name, body in live.values()}
    assert tiny.store.manifest() == expected and tiny.store.verify().digest == digest_of(expected)
    assert {name: path.read_bytes() for name, path in tiny.store.live_overrides().items()} == dict(
        live.values()
    )


@pytest.mark.parametrize("kind", ["post", "pre"])
def test_a_flipped_byte_and_a_dropped_file_are_found(tiny: Tiny, kind: str) -> None:
    commit(tiny, "e1", {ONE: random_bytes(5, 60)})
    path = tiny.home / "model" / "versions" / "000001-e1" / kind / f"{ONE}.bin"
    whole = path.read_bytes()
    flipped = bytes([whole[0] ^ 1, *whole[1:]]) if whole else b"x"
    for break_ in (lambda: path.write_bytes(flipped), path.unlink):
        break_()
        for use in (tiny.store.verify, lambda: tiny.store.roll_back("e1")):
            with pytest.raises(IntegrityError, match=f"{ONE}"):
                use()
        if kind == "post":
            with pytest.raises(IntegrityError, match=f"{ONE}"):
                tiny.store.read(ONE)
        path.write_bytes(whole)
    assert tiny.store.verify().n_versions == 1


def test_a_manifest_that_keeps_or_forgets_an_edit_is_found(tiny: Tiny) -> None:
    """Every version's manifest is worked out again from its parent's."""
    commit(tiny, "e1", {ONE: random_bytes(5, 60)})
    record = tiny.store.lineage().versions[0]
    kept = dict(record.manifest) | {TWO: ABSENT}
    lost = {name: digest for name, digest in record.manifest.items() if name != ONE}
    for manifest in (kept, lost):
        forged = record.model_copy(update={"manifest": manifest, "digest": digest_of(manifest)}).sealed()
        with pytest.raises(IntegrityError, match="manifest"):
            tiny.store.lineage().upto("base").followed_by(forged)


def test_bytes_that_were_not_planned_are_not_staged(tiny: Tiny) -> None:
    with pytest.raises(IntegrityError, match="not the tensor that was planned"):
        tiny.store.stage("e1", {ONE: random_bytes(1)}, expected={ONE: digest_of_bytes(random_bytes(2))})
    assert tiny.store.staged_ids() == ()


def test_a_plain_folder_cannot_hold_them_and_says_which_and_what_to_do(tiny: Tiny, tmp_path: Path) -> None:
    commit(tiny, "before", {WEIGHT: random_bytes(1)})
    commit(tiny, "capital", {ONE: random_bytes(2, 30)})
    with pytest.raises(BadRequestError, match=f"capital.*{ONE}.*guardedit.load.*roll"):
        export(tiny.store, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(tiny.store, tmp_path / "older", "before") == tiny.store.digest("before")
    tiny.store.roll_back("capital")
    assert export(tiny.store, tmp_path / "out") == tiny.store.digest()


def test_a_model_with_edits_put_in_by_hand_is_no_base(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="take them out"):
        VersionStore(tmp_path / "other").import_base(tiny.manifest | {ONE: ABSENT}, tiny.folder, "tiny")
