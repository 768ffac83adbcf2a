"""Key banks: what is in them, what they are bound to, and what a broken cache file does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guardedit.edits.deltas import written
from guardedit.edits.keys import keys_at_subject
from guardedit.models.control import load_facts
from guardedit.models.handle import ModelHandle
from guardedit.risk import banks
from guardedit.risk.banks import BANK_DOMAINS, control_bank, protected_bank
from tests.risk_helpers import LAYER, WIDTH, delta_of, rank_one, some_keys


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GUARDEDIT_CACHE", str(tmp_path))
    return tmp_path


def files(cache: Path) -> list[Path]:
    return sorted((cache / "banks").glob("*.safetensors"))


def test_a_control_bank_has_the_same_share_of_every_domain_and_words_for_every_key(tiny: ModelHandle) -> None:
    bank = control_bank(tiny, LAYER, n_tokens=200)
    assert bank.keys.shape == (200, WIDTH) and bank.keys.dtype == torch.float32
    assert {name: len(bank.of_domain(name)) for name in BANK_DOMAINS} == dict.fromkeys(BANK_DOMAINS, 50)
    for words in (bank.tokens, bank.contexts, bank.domains, bank.subjects):
        assert len(words) == 200
    assert all(
        token in context for token, context in zip(bank.tokens, bank.contexts, strict=True) if token.isascii()
    )


def test_protected_facts_are_kept_at_subject_and_last_token(tiny_llama: ModelHandle) -> None:
    bank = protected_bank(tiny_llama, LAYER, n_tokens=100)
    facts = load_facts()
    kept = bank.of_domain("facts")
    assert len(kept) == 2 * len(facts)
    expected = keys_at_subject(tiny_llama, [facts[5].filled], [facts[5].subject], LAYER)[0]
    # Other rows pad the batch otherwise, which moves sums by rounding.
    torch.testing.assert_close(kept[5], expected, rtol=1e-4, atol=1e-5)
    without = bank.of_domain("facts", without=[facts[5].subject.upper()])
    assert len(without) == len(kept) - sum(name == facts[5].subject for name in bank.subjects)


def test_a_model_that_knows_none_of_its_facts_has_a_protected_bank_without_them(
    tiny_llama: ModelHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(banks, "load_facts", lambda handle: ())
    bank = protected_bank(tiny_llama, LAYER, n_tokens=100)
    assert set(bank.domains) == {"python", "prose"}
    assert bank.of_domain("facts").shape == (0, WIDTH)


def test_a_bank_is_read_from_the_cache_bit_for_bit(tiny_llama: ModelHandle, own_cache: Path) -> None:
    first = control_bank(tiny_llama, LAYER, n_tokens=80)
    (path,) = files(own_cache)
    stamp = path.stat().st_mtime_ns
    again = control_bank(tiny_llama, LAYER, n_tokens=80)
    assert torch.equal(first.keys, again.keys) and path.stat().st_mtime_ns == stamp
    assert (first.tokens, first.contexts, first.domains, first.digest) == (
        again.tokens, again.contexts, again.domains, again.digest,
    )  # fmt: skip


@pytest.mark.parametrize("place", [20, 0.5, -3])
def test_a_broken_cache_file_is_made_anew(tiny_llama: ModelHandle, own_cache: Path, place: float) -> None:
    first = control_bank(tiny_llama, LAYER, n_tokens=80)
    (path,) = files(own_cache)
    data = bytearray(path.read_bytes())
    data[int(place * len(data)) if isinstance(place, float) else place] ^= 0x55
    path.write_bytes(bytes(data))
    assert torch.equal(control_bank(tiny_llama, LAYER, n_tokens=80).keys, first.keys)
    assert path.read_bytes() != bytes(data)


def test_an_edit_of_the_layer_keeps_its_bank_and_one_below_does_not(
    tiny_llama: ModelHandle, own_cache: Path
) -> None:
    update = rank_one(some_keys(1)[0], torch.ones(32))
    before = control_bank(tiny_llama, LAYER, n_tokens=80).digest
    with written(tiny_llama, delta_of(tiny_llama, update)):
        assert control_bank(tiny_llama, LAYER, n_tokens=80).digest == before
    with written(tiny_llama, delta_of(tiny_llama, update, layer=LAYER - 1)):
        assert control_bank(tiny_llama, LAYER, n_tokens=80).digest != before
    assert len(files(own_cache)) == 2
