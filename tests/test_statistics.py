"""Second moments: streaming equals the whole, interrupted equals whole, and files that were changed are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES
from torch import Tensor

from guardedit.errors import (
    BadModelError,
    BadRequestError,
    IntegrityError,
    SolveError,
    StatisticsMismatchError,
    StorageError,
    TooFewTokensError,
)
from guardedit.models import hooks, sources
from guardedit.models.corpus import Batch, tokenise_chunks
from guardedit.models.handle import ModelHandle
from guardedit.models.statistics import OUTLIER, SecondMoment, collect

KEYS = "blocks.2.mlp.hook_post"
NAMES = [KEYS, "blocks.1.hook_mlp_out", "blocks.3.hook_resid_pre"]
TEXTS = [" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(len(SENTENCES))]


def batches_of(handle: ModelHandle, n: int | None = None) -> list[Batch]:
    return list(tokenise_chunks(handle, TEXTS, length=48, batch_size=4))[:n]


@pytest.fixture(scope="module")
def moment(tiny_llama: ModelHandle) -> SecondMoment:
    return collect(tiny_llama, [KEYS], batches_of(tiny_llama), corpus_note="ten sentences")[KEYS]


@torch.no_grad()
def rows_of(handle: ModelHandle, batch: Batch, name: str) -> Tensor:
    """All real tokens but each row's first, (n, d) float64."""
    with hooks.record(handle, [name]) as seen:
        handle.hidden(*batch)
    mask = batch[1].bool().clone()
    mask[:, 0] = False
    return seen[name][mask].double()


def test_streaming_sums_equal_the_whole_batch_einsum(tiny: ModelHandle) -> None:
    """And the counts add up: every real token either went in or was left out."""
    batches = batches_of(tiny)
    found = collect(tiny, NAMES, batches)
    for name in NAMES:
        x = torch.cat([rows_of(tiny, batch, name) for batch in batches])
        limit = OUTLIER * float(rows_of(tiny, batches[0], name).norm(dim=-1).median())
        kept = x[x.norm(dim=-1) <= limit]
        whole = torch.einsum("ni,nj->ij", kept, kept) / len(kept)
        # float64 sums of float32 activations in another order.
        torch.testing.assert_close(found[name].matrix, whole, rtol=1e-12, atol=1e-12)
        assert found[name].n_tokens == len(kept) and found[name].norm_limit == limit
        assert found[name].mean_norm == pytest.approx(float(kept.norm(dim=-1).mean()), rel=1e-12)
        assert found[name].n_tokens + found[name].n_excluded == sum(int(b[1].sum()) for b in batches)


def test_hooks_collected_together_equal_hooks_collected_alone(tiny: ModelHandle) -> None:
    batches = batches_of(tiny)
    together = collect(tiny, NAMES, batches)
    for name in NAMES:
        alone = collect(tiny, [name], batches)[name]
        assert torch.equal(alone.matrix, together[name].matrix)
        assert alone.corpus_digest == together[name].corpus_digest


def test_a_second_moment_is_symmetric_and_positive(moment: SecondMoment) -> None:
    assert torch.equal(moment.matrix, moment.matrix.T)
    assert float(torch.linalg.eigvalsh(moment.matrix).min()) > 0


class Interrupt(Exception):
    """Stands for Ctrl-C."""


def interrupted(batches: list[Batch], after: int) -> Iterator[Batch]:
    for index, batch in enumerate(batches):
        if index == after:
            raise Interrupt
        yield batch


@pytest.mark.parametrize("save_every", [1, 3])
def test_an_interrupted_collection_resumes_to_the_same_bits(
    tiny: ModelHandle, tmp_path: Path, save_every: int
) -> None:
    batches, state = batches_of(tiny), tmp_path / "state.safetensors"
    whole = collect(tiny, NAMES, batches)
    for after in (4, 7):
        with pytest.raises(Interrupt):
            collect(tiny, NAMES, interrupted(batches, after), state=state, save_every=save_every)
    resumed = collect(tiny, NAMES, batches, state=state, save_every=save_every)
    for name in NAMES:
        assert torch.equal(resumed[name].matrix, whole[name].matrix)
        mine, theirs = vars(resumed[name]), vars(whole[name])
        assert {k: v for k, v in mine.items() if k != "matrix"} == {
            k: v for k, v in theirs.items() if k != "matrix"
        }


def test_a_state_of_other_text_hooks_precision_or_weights_is_refused(
    tiny: ModelHandle, tmp_path: Path
) -> None:
    batches, state = batches_of(tiny), tmp_path / "state.safetensors"
    with pytest.raises(Interrupt):
        collect(tiny, [KEYS], interrupted(batches, 4), state=state, save_every=1)
    fresh = sources.load(str(tiny.folder))
    with torch.no_grad():
        fresh.model.get_parameter(fresh.rewrite_parameter(0)).mul_(1.01)
    for complaint, call in {
        "another text": lambda: collect(tiny, [KEYS], batches[::-1], state=state),
        "longer text": lambda: collect(tiny, [KEYS], batches[:2], state=state),
        "other weights": lambda: collect(fresh, [KEYS], batches, state=state),
        "hooks": lambda: collect(tiny, NAMES, batches, state=state),
        "precision": lambda: collect(tiny, [KEYS], batches, state=state, autocast=torch.bfloat16),
    }.items():
        with pytest.raises(StatisticsMismatchError, match=complaint):
            call()


def test_first_tokens_and_outliers_are_left_out_and_counted(tiny: ModelHandle) -> None:
    """One token of every row is blown up tenfold over the limit: the result is as if it were not there."""
    batches = batches_of(tiny)
    plain = collect(tiny, [KEYS], batches)[KEYS]

    def blow_up(activation: Tensor) -> Tensor:
        return torch.cat([activation[:, :5], activation[:, 5:6] * 1e4, activation[:, 6:]], dim=1)

    with hooks.patch(tiny, KEYS, blow_up):
        found = collect(tiny, [KEYS], batches)[KEYS]
    n_rows = sum(len(ids) for ids, _ in batches)
    assert plain.n_excluded >= n_rows and found.n_excluded == pytest.approx(plain.n_excluded + n_rows, abs=2)
    without = torch.cat([_without_token_5(tiny, batch) for batch in batches])
    kept = without[without.norm(dim=-1) <= found.norm_limit]
    torch.testing.assert_close(found.matrix, kept.T @ kept / len(kept), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def _without_token_5(handle: ModelHandle, batch: Batch) -> Tensor:
    with hooks.record(handle, [KEYS]) as seen:
        handle.hidden(*batch)
    mask = batch[1].bool().clone()
    mask[:, [0, 5]] = False
    return seen[KEYS][mask].double()


def test_activations_that_are_not_finite_stop_the_collection(tiny: ModelHandle) -> None:
    with hooks.patch(tiny, KEYS, lambda x: x * float("nan")), pytest.raises(BadModelError, match="finite"):
        collect(tiny, [KEYS], batches_of(tiny))


def test_too_little_text_is_refused_and_little_text_is_marked(tiny: ModelHandle) -> None:
    """The key space is 64 wide: under 128 tokens refused, under 640 with a warning, then without."""
    batches = batches_of(tiny)
    with pytest.raises(TooFewTokensError, match=r"128 .* 640"):
        collect(tiny, [KEYS], [(ids[:2], mask[:2]) for ids, mask in batches[:1]])
    few, many = collect(tiny, [KEYS], batches[:2])[KEYS], collect(tiny, [KEYS], batches)[KEYS]
    assert 128 <= few.n_tokens < 640 <= many.n_tokens
    assert few.warning is not None and "640" in few.warning
    assert many.warning is None


def test_collecting_stops_at_the_tokens_asked_for(tiny_llama: ModelHandle) -> None:
    told: list[int] = []
    found = collect(tiny_llama, NAMES, batches_of(tiny_llama), max_tokens=500, progress=told.append)
    assert 500 <= min(found[name].n_tokens for name in NAMES) < 500 + 4 * 48
    assert told == sorted(told) and told[-1] == min(found[name].n_tokens for name in NAMES)


def test_an_unknown_hook_is_refused_before_any_forward_pass(tiny_llama: ModelHandle) -> None:
    with pytest.raises(BadRequestError, match="unknown hook"):
        collect(tiny_llama, ["blocks.2.hook_key"], iter(()))


def test_solve_is_the_inverse_and_leverage_its_quadratic_form(moment: SecondMoment) -> None:
    keys = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # The condition number of a tiny model's C is some 1e6: ten digits of float64's sixteen remain.
    torch.testing.assert_close(moment.matrix @ moment.solve(keys), keys, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(moment.leverage(keys), (keys * moment.solve(keys)).sum(0))
    assert moment.leverage(keys[:, 0]).shape == () and moment.solve(keys[:, 0].float()).dtype == torch.float64
    torch.testing.assert_close(moment.leverage(3 * keys), 9 * moment.leverage(keys))


def test_the_mean_leverage_of_the_text_itself_is_its_width(
    tiny_llama: ModelHandle, moment: SecondMoment
) -> None:
    """E[xᵀC⁻¹x] = tr(C⁻¹E[xxᵀ]) = d over the very tokens that C is made of."""
    x = torch.cat([rows_of(tiny_llama, batch, KEYS) for batch in batches_of(tiny_llama)])
    kept = x[x.norm(dim=-1) <= moment.norm_limit]
    assert float(moment.leverage(kept.T).mean()) == pytest.approx(64, rel=1e-8)


def test_a_singular_matrix_is_refused(moment: SecondMoment) -> None:
    plain = {name: value for name, value in vars(moment).items() if name not in ("matrix", "cholesky")}
    ones = SecondMoment(matrix=torch.ones(64, 64, dtype=torch.float64), **plain)
    with pytest.raises(SolveError, match="positive definite"):
        ones.solve(torch.ones(64))


def test_saved_and_loaded_is_the_same_to_the_bit(
    tiny_llama: ModelHandle, moment: SecondMoment, tmp_path: Path
) -> None:
    path = tmp_path / "moment.safetensors"
    written, read = moment.save(path), SecondMoment.load(path, tiny_llama)
    assert torch.equal(read.matrix, moment.matrix) and read.corpus_note == "ten sentences"
    assert written.digest == read.digest and read.digest.startswith("sha256:")
    assert read.save(tmp_path / "again.safetensors").digest == read.digest
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_a_compact_file_keeps_the_leverage_to_seven_digits(moment: SecondMoment, tmp_path: Path) -> None:
    """float32 has seven digits; the factor's condition number takes up to three of them."""
    compact = moment.save(tmp_path / "compact.safetensors", compact=True)
    keys = torch.randn(64, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(compact.leverage(keys), moment.leverage(keys), rtol=1e-4, atol=0)
    whole = moment.save(tmp_path / "whole.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("compact", "whole")]
    assert sizes[0] < 0.35 * sizes[1] and compact.digest != whole.digest


def test_statistics_follow_an_edit_of_their_own_layer_but_not_of_a_lower_one(
    tiny: ModelHandle, tmp_path: Path
) -> None:
    path, fresh = tmp_path / "moment.safetensors", sources.load(str(tiny.folder))
    collect(tiny, [KEYS], batches_of(tiny))[KEYS].save(path)
    for layer, fits in ((3, True), (2, True), (1, False)):
        with torch.no_grad():
            fresh.model.get_parameter(fresh.rewrite_parameter(layer)).mul_(1.01)
        if fits:
            SecondMoment.load(path, fresh)
        else:
            with pytest.raises(StatisticsMismatchError, match="collect it again"):
                SecondMoment.load(path, fresh)


@pytest.mark.parametrize("compact", [False, True])
def test_no_flipped_bit_is_read(moment: SecondMoment, tmp_path: Path, compact: bool) -> None:
    """Over the whole file, header and numbers: refused as an integrity failure, never read as something else."""
    path = tmp_path / "moment.safetensors"
    written = moment.save(path, compact=compact)
    intact = path.read_bytes()
    # Every seventh byte of the header, then a hundred places in the tensor.
    header = 8 + int.from_bytes(intact[:8], "little")
    places = [*range(0, header, 7), *range(header, len(intact), max(1, (len(intact) - header) // 100))]
    for place in places:
        broken = bytearray(intact)
        broken[place] ^= 1 << (place % 8)
        path.write_bytes(broken)
        try:
            read = SecondMoment.load(path)
        except IntegrityError as error:
            assert error.exit_code == 6
        else:
            # Flips that leave all content as it was: a name nobody reads, or padding.
            assert torch.equal(read.matrix, written.matrix), place
            assert (read.digest, read.n_tokens) == (written.digest, written.n_tokens), place


def test_a_written_file_is_as_readable_as_any_other(moment: SecondMoment, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    moment.save(tmp_path / "moment.safetensors")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_write_that_cannot_happen_says_so_and_keeps_the_old_file(
    moment: SecondMoment, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(StorageError, match="cannot be written"):
        moment.save(blocked / "moment.safetensors")
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(StorageError):
        moment.save(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"], (
        "nothing half written is left"
    )


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "moment.safetensors"
    for content in (b"", b"{}", b"\0" * 64):
        path.write_bytes(content)
        with pytest.raises(IntegrityError):
            SecondMoment.load(path)
    with pytest.raises(IntegrityError):
        SecondMoment.load(tmp_path / "absent.safetensors")
