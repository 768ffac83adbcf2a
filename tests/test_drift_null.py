"""The bank of accepted edits: ranks, refusals, resuming, and norm-matched random edits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from drift_helpers import LAYER, PROMPTS, REQUEST, make_delta

from guardedit.drift.null import (
    RANKED,
    BankEdit,
    BankEntry,
    Kind,
    NullBank,
    accept_success,
    build_null_bank,
    load_bank,
    random_edit,
    rank,
    save_bank,
)
from guardedit.edits.deltas import Dense, EditDelta, WeightChange
from guardedit.errors import BadRequestError, IntegrityError, MissingStatisticsError
from guardedit.models.handle import ModelHandle
from guardedit.records import DriftReport, Score, digest_of

HOOKS = ("blocks.1.hook_mlp_out",)


def entry(index: int, kind: Kind = "real", accepted: bool = True) -> BankEntry:
    return BankEntry(
        name=f"{kind} {index}",
        kind=kind,
        accepted=accepted,
        statistics={name: float(index) for name in RANKED},
    )


def bank_of(*entries: BankEntry) -> NullBank:
    return NullBank(
        model_digest=digest_of(["model"]),
        layer=LAYER,
        hook_names=HOOKS,
        far_tokens=8192,
        entries=tuple(entries),
    )


def report_of(kl: float, success: float | None = 1.0) -> DriftReport:
    values = {"far_kl": kl, "target_success": success}
    scores = tuple(Score(name=n, value=v, unit="", stage="postop", scope="far") for n, v in values.items())
    return DriftReport(reference="previous", scores=scores)


def test_a_percentile_is_the_share_below_with_ties_counted_half() -> None:
    bank = bank_of(*(entry(i) for i in range(20)))
    assert [bank.percentile("far_kl", value) for value in (-1.0, 10.0, 9.5, 99.0)] == [0.0, 52.5, 50.0, 100.0]


def test_only_accepted_real_edits_are_ranked_in() -> None:
    sham = [entry(i, "sham") for i in range(3)]
    refused = [entry(100 + i, accepted=False) for i in range(50)]
    bank = bank_of(
        *(entry(i) for i in range(20)), *sham, *refused, *(entry(i + 500, "random") for i in range(30))
    )
    assert bank.percentile("far_kl", 50.0) == 100.0
    assert bank.floor("far_kl") == 2.0
    assert bank_of(entry(1)).floor("far_kl") is None


def test_a_small_bank_or_a_value_that_is_not_finite_gives_no_percentile() -> None:
    assert bank_of(*(entry(i) for i in range(19))).percentile("far_kl", 5.0) is None
    assert rank(list(range(30)), float("nan")) is None


def test_a_missing_statistic_gives_no_overall_rank_instead_of_a_low_one() -> None:
    bank = bank_of(*(entry(i) for i in range(20)))
    complete = dict.fromkeys(RANKED, 30.0)
    assert bank.overall(complete) == 100.0
    del complete["near_kl"]
    assert bank.overall(complete) is None


def test_one_edit_in_twenty_is_beyond_the_95th_percentile_of_the_bank_overall() -> None:
    """Ranking the mean rank again keeps the level; the largest of six percentiles would be over 95 far more often."""
    generator = torch.Generator().manual_seed(0)
    tables = torch.rand(400, len(RANKED), generator=generator).tolist()
    edits = [BankEntry(name=str(i), kind="real", accepted=True, statistics=dict(zip(RANKED, row, strict=True)))
             for i, row in enumerate(tables)]  # fmt: skip
    bank = bank_of(*edits[:200])
    overall = [bank.overall(edit.statistics) or 0.0 for edit in edits[200:]]
    # 0.05 and three standard errors over 200 edits and a bank of 200
    assert abs(sum(value >= 95 for value in overall) / 200 - 0.05) <= 3 * (2 * 0.05 * 0.95 / 200) ** 0.5


def test_a_bank_of_another_model_layer_hooks_or_size_is_refused_in_words() -> None:
    bank = bank_of(entry(1))
    digest = digest_of(["model"])
    assert bank.refusal(digest, LAYER, HOOKS, 8000) is None
    assert "another model" in str(bank.refusal(digest_of([]), LAYER, HOOKS, 8192))
    assert "layer 1" in str(bank.refusal(digest, 2, HOOKS, 8192))
    assert "watches" in str(bank.refusal(digest, LAYER, (), 8192))
    assert "far tokens" in str(bank.refusal(digest, LAYER, HOOKS, 60_000))


def test_a_bank_survives_the_round_trip_and_a_flipped_byte_does_not_pass(tmp_path: Path) -> None:
    path = tmp_path / "drift_bank.json"
    bank = bank_of(*(entry(i) for i in range(3)))
    save_bank(bank, path)
    assert load_bank(path) == bank
    assert [p.name for p in tmp_path.iterdir()] == ["drift_bank.json"]
    from guardedit.records import digest_of_bytes

    expected = digest_of_bytes(path.read_bytes())
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="was changed"):
        load_bank(path, expected)
    path.write_bytes(b"{")
    with pytest.raises(IntegrityError, match="cannot be read"):
        load_bank(path)
    with pytest.raises(MissingStatisticsError, match="reference_bank"):
        load_bank(tmp_path / "none.json")


def test_an_interrupted_bank_goes_on_where_it_stopped(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    solved: list[str] = []

    def edits(count: int) -> list[BankEdit]:
        def solve(name: str) -> EditDelta:
            solved.append(name)
            if len(solved) == 3:
                raise KeyboardInterrupt
            return make_delta(tiny_llama, 0.1)

        return [
            BankEdit(f"edit {i}", "real", (REQUEST,), (PROMPTS,), lambda i=i: solve(f"edit {i}"))  # type: ignore[misc]
            for i in range(count)
        ]

    def build(count: int, layer: int = LAYER) -> NullBank:
        return build_null_bank(
            tiny_llama, edits(count), lambda edit, delta: report_of(float(edit.name[-1])), state,
            layer=layer, hook_names=HOOKS, far_tokens=8192,
        )  # fmt: skip

    state = tmp_path / "state.jsonl"
    with pytest.raises(KeyboardInterrupt):
        build(4)
    with state.open("a") as file:
        file.write('{"name": "edit 2", "kin')  # the machine stopped in the middle of a line
    bank = build(4)
    assert solved == ["edit 0", "edit 1", "edit 2", "edit 2", "edit 3"]
    assert bank.values("far_kl") == (0.0, 1.0, 2.0, 3.0)
    with pytest.raises(IntegrityError, match="another model, layer"):
        build(4, layer=2)


def test_an_edit_that_did_not_take_is_kept_but_not_ranked_in() -> None:
    assert accept_success(report_of(0.1, 1.0))
    assert not accept_success(report_of(0.1, 0.0))
    assert not accept_success(report_of(0.1, None))


def test_a_random_edit_has_the_size_of_the_real_one_and_is_written_at_its_key(
    tiny_llama: ModelHandle,
) -> None:
    delta = make_delta(tiny_llama, 0.3)
    generator = torch.Generator().manual_seed(1)
    key = torch.randn(tiny_llama.d_in(LAYER), generator=generator, dtype=torch.float64)
    spread = torch.rand(len(key), generator=generator, dtype=torch.float64) + 0.5
    random = random_edit(delta, key, key / spread, seed=0)
    dense, real = random.update(LAYER).dense(), delta.update(LAYER).dense()
    assert float(dense.norm()) == pytest.approx(float(real.norm()))
    away = torch.randn(len(key), generator=generator, dtype=torch.float64)
    away -= (away @ (key / spread)) / (key @ (key / spread)) * key  # C⁻¹-orthogonal to the key: not moved
    assert float((dense @ away).norm()) < 1e-9 * float((dense @ key).norm())
    assert not torch.equal(dense, random_edit(delta, key, key / spread, seed=1).update(LAYER).dense())


def test_a_random_edit_of_two_layers_is_refused(tiny_llama: ModelHandle) -> None:
    changes = tuple(WeightChange(f"w{layer}", layer, Dense(torch.eye(3))) for layer in (0, 1))
    with pytest.raises(BadRequestError, match="has 2"):
        random_edit(EditDelta(changes, "test", {}, {}), torch.ones(3), torch.ones(3), 0)
