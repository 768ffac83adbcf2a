"""A byte flipped anywhere is seen or changes nothing that a reader reads; nothing crashes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import eiffel_committed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import NAMES, Tiny, make_store, random_bytes

from guardedit.audit.ledger import Ledger
from guardedit.errors import IntegrityError
from guardedit.records import Plan, canonical, digest_of_bytes, parse_record

FLIPS = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
"""Derandomised: a red build must be red again. Positions are shares, so that every region is met."""
PLAN = canonical(eiffel_committed().plan)
place = st.floats(0, 1, exclude_max=True)
mask = st.integers(1, 255)


def _flip(path: Path, where: float, bits: int) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= bits
    path.write_bytes(bytes(data))


def _seen_or_harmless(read: Callable[[], object], expected: object) -> bool:
    """True when damage was seen; fails the test when it went unseen and mattered. Other errors pass through."""
    try:
        found = read()
    except IntegrityError:
        return True
    assert found == expected
    return False


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Three edits, one undone, one more staged."""
    tiny = make_store(tmp_path_factory.mktemp("pristine"))
    tiny.apply("e1", NAMES[1])
    tiny.apply("e2", NAMES[1], NAMES[2])
    tiny.store.roll_back("e2")
    tiny.apply("e3", NAMES[3])
    tiny.store.stage("e4", {NAMES[1]: random_bytes(4)})
    return tiny


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("story")
    ledger = Ledger(folder / "ledger.sqlite")
    for i in range(12):
        ledger.append("planned", {"plan_id": f"p{i}", "text": "x" * (i * 180), "edit_id": f"e{i}"})
    return folder


@pytest.fixture(scope="module")
def told(story: Path) -> object:
    ledger = Ledger(story / "ledger.sqlite")
    return ledger.entries(), ledger.verify()


@pytest.fixture(scope="module")
def read_before(pristine: Tiny) -> object:
    return _everything(pristine)


def _everything(tiny: Tiny) -> object:
    """All that a reader of the store can read, checked as `guardedit verify` checks it."""
    verified, lineage = tiny.store.verify(), tiny.store.lineage()
    tensors = {(v, n): tiny.store.read(n, v) for v in ("e1", "e2", "e3", "base") for n in NAMES}
    staged = tiny.store.staged("e4")
    images = {p: path.read_bytes() for p, path in staged.overrides.items()}
    return (
        verified,
        lineage.versions,
        lineage.base.model_copy(update={"folder": ""}),
        tensors,
        staged.record,
        images,
    )


def _files(tiny: Tiny) -> list[str]:
    weights = [tiny.folder / name for name in ("model.safetensors", "config.json", "tokenizer.json")]
    model = [p for p in (tiny.home / "model").rglob("*") if p.is_file()]
    return sorted(str(p.relative_to(tiny.home.parent)) for p in (*weights, *model))


@FLIPS
@given(which=place, where=place, bits=mask)
def test_a_flip_in_any_file_of_the_store_is_seen(
    pristine: Tiny, read_before: object, which: float, where: float, bits: int
) -> None:
    names = _files(pristine)
    file = names[int(which * len(names))]
    root = pristine.home.parent
    kept = (root / file).read_bytes()
    _flip(root / file, where, bits)
    try:
        seen = _seen_or_harmless(lambda: _everything(pristine), read_before)
        is_header = file.endswith("model.safetensors")
        assert seen or is_header, f"{file} was changed unseen"
    finally:
        (root / file).write_bytes(kept)


def test_every_single_byte_of_the_pointer_and_of_an_image_counts(pristine: Tiny, read_before: object) -> None:
    """Exhaustive, one bit each; the test above samples the rest."""
    root = pristine.home.parent
    for file in ("home/model/CURRENT", "home/model/staged/e4/post/layers.0.down.weight.bin"):
        for position in range((root / file).stat().st_size):
            kept = (root / file).read_bytes()
            _flip(root / file, position / len(kept), 1)
            try:
                assert _seen_or_harmless(lambda: _everything(pristine), read_before), f"{file} at {position}"
            finally:
                (root / file).write_bytes(kept)


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_an_undo_never_uses_a_damaged_image(pristine: Tiny, tmp_path: Path, kind: str) -> None:
    home = tmp_path / "home"
    shutil.copytree(pristine.home, home)
    tiny = Tiny(home, pristine.folder, pristine.manifest)
    image = next((home / "model" / "versions").glob(f"*-e3/{kind}/*.bin"))
    _flip(image, 0.5, 1)
    before = (home / "model" / "CURRENT").read_bytes()
    with pytest.raises(IntegrityError, match="was changed"):
        tiny.store.roll_back("e3")
    assert (home / "model" / "CURRENT").read_bytes() == before


@pytest.mark.parametrize("cut", [0, 1, 7, 50, 95])
def test_a_torn_image_is_seen(pristine: Tiny, tmp_path: Path, cut: int) -> None:
    home = tmp_path / "home"
    shutil.copytree(pristine.home, home)
    image = next((home / "model" / "versions").glob("*-e1/pre/*.bin"))
    image.write_bytes(image.read_bytes()[:cut])
    with pytest.raises(IntegrityError):
        Tiny(home, pristine.folder, pristine.manifest).store.verify()


@settings(FLIPS, max_examples=300)
@given(where=place, bits=mask)
def test_a_flip_anywhere_in_the_ledgers_file_is_seen_or_changes_nothing_read(
    story: Path, told: object, where: float, bits: int
) -> None:
    path = story / "ledger.sqlite"
    kept, head = path.read_bytes(), (story / "ledger.head").read_bytes()
    expected = told
    _flip(path, where, bits)
    try:
        _seen_or_harmless(lambda: (Ledger(path).entries(), Ledger(path).verify()), expected)
    finally:
        for leftover in story.glob("ledger.sqlite-*"):
            leftover.unlink()
        path.write_bytes(kept)
        (story / "ledger.head").write_bytes(head)


@settings(FLIPS, max_examples=60)
@given(data=st.binary(max_size=5000), cut=place)
def test_a_ledger_of_rubbish_or_cut_short_is_an_integrity_error(
    story: Path, tmp_path: Path, data: bytes, cut: float
) -> None:
    whole = (story / "ledger.sqlite").read_bytes()
    for content in (data, whole[: int(cut * len(whole))], whole[:4096] + data):
        shutil.copy(story / "ledger.head", tmp_path / "ledger.head")
        (tmp_path / "ledger.sqlite").write_bytes(content)
        with pytest.raises(IntegrityError):
            Ledger(tmp_path / "ledger.sqlite").verify()
        for leftover in tmp_path.glob("ledger.sqlite*"):
            leftover.unlink()


@settings(FLIPS, max_examples=60)
@given(where=place, bits=mask)
def test_appending_to_a_damaged_ledger_builds_on_what_was_recorded_or_refuses(
    story: Path, tmp_path: Path, where: float, bits: int
) -> None:
    for name in ("ledger.sqlite", "ledger.head"):
        shutil.copy(story / name, tmp_path / name)
    _flip(tmp_path / "ledger.sqlite", where, bits)
    last = Ledger(story / "ledger.sqlite").head()
    try:
        entry = Ledger(tmp_path / "ledger.sqlite").append("planned", {})
    except IntegrityError:
        return
    finally:
        for leftover in tmp_path.glob("ledger.sqlite-*"):
            leftover.unlink()
    assert last is not None and (entry.seq, entry.prev) == (last.seq + 1, last.digest)


@settings(FLIPS, max_examples=60)
@given(where=place, bits=mask)
def test_a_flip_in_the_ledgers_head_is_seen(story: Path, where: float, bits: int) -> None:
    head = story / "ledger.head"
    kept = head.read_bytes()
    _flip(head, where, bits)
    try:
        with pytest.raises(IntegrityError):
            Ledger(story / "ledger.sqlite").entries()
    finally:
        head.write_bytes(kept)


@FLIPS
@given(where=place, bits=mask)
def test_a_flip_in_a_plan_is_seen_by_its_digest(where: float, bits: int) -> None:
    data = bytearray(PLAN)
    digest = digest_of_bytes(PLAN)
    data[int(where * len(data))] ^= bits
    with pytest.raises(IntegrityError, match="was changed"):
        parse_record(Plan, bytes(data), expected=digest, what="plan.json")
