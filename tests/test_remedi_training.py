"""A map is trained on facts: same bits whenever it was cut off, the best map and not the last, every item counted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from remedi_helpers import HOOK, facts, training

from guardedit.edits.pushed_rows import make_batches
from guardedit.edits.remedi_loss import Terms, batch_terms
from guardedit.edits.remedi_quality import ask
from guardedit.edits.remedi_rows import RowSettings, rows_of
from guardedit.edits.remedi_training import Split, Trained, split_facts, train_map
from guardedit.edits.representations import represent
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle


def split() -> Split:
    return split_facts(facts(), 0.2, 0)


def same(one: Trained, other: Trained) -> bool:
    equal = torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)
    return equal and (one.losses, one.best_epoch) == (other.losses, other.best_epoch)


def held_out_loss(handle: ModelHandle, trained: Trained) -> float:
    """The loss of a finished map, from its folded weights alone."""
    settings, held = training(), split().held_out
    found = represent(handle, [(r, r.target_new) for r in held], settings.hook_name)
    directions = found.together() @ trained.weight.T + trained.bias
    with torch.no_grad():
        batches = make_batches(handle, rows_of(handle, held, settings.rows), HOOK, 3)
        terms = [batch_terms(handle, batch, directions[batch.fact_of]) for batch in batches]
    return float(Terms.added(terms).total(settings.weights))


# -- splitting


def test_no_subject_is_on_both_sides() -> None:
    twice = (*facts(), *(f.model_copy(update={"target_new": "Athens"}) for f in facts()))
    for seed in range(5):
        found = split_facts(twice, 0.2, seed)
        subjects = [{r.subject for r in part} for part in (found.train, found.held_out)]
        assert not subjects[0] & subjects[1]
        assert len(found.train) + len(found.held_out) == len(twice)
        assert len(subjects[1]) == round(0.2 * len(facts()))


# -- the loss


def test_training_lowers_the_held_in_loss_and_leaves_the_model(tiny: ModelHandle) -> None:
    digest = tiny.digest()
    whole = Split(facts(), facts())
    trained = train_map(tiny, whole, training(epochs=6))
    assert min(trained.losses) < trained.losses[0] - 0.2
    assert tiny.digest() == digest


def test_the_kl_counts_every_row_of_a_batch(tiny: ModelHandle) -> None:
    """Whichever row alone is pushed, its divergence shows; the published code sees the batch's last row only."""
    rows = [row for row in rows_of(tiny, facts(), RowSettings()) if row.kept][:4]
    (batch,) = make_batches(tiny, rows, HOOK, 4)
    draw = 5 * torch.randn(4, tiny.d_model, generator=torch.Generator().manual_seed(2))
    alone = []
    with torch.no_grad():
        for number in range(4):
            added = torch.zeros_like(draw)
            added[number] = draw[number]
            alone.append(float(batch_terms(tiny, batch, added).kept))
        together = batch_terms(tiny, batch, draw)
    assert min(alone) > 1e-3
    assert together.n_kept == sum(len(row.kept) for row in rows)
    torch.testing.assert_close(float(together.kept), sum(alone), rtol=1e-3, atol=1e-4)


def test_an_unpushed_batch_has_no_divergence_and_the_models_own_probabilities(tiny: ModelHandle) -> None:
    requests = facts()
    rows = rows_of(tiny, requests, RowSettings())
    with torch.no_grad():
        terms = Terms.added(
            [
                batch_terms(tiny, batch, torch.zeros(batch.n_rows, tiny.d_model))
                for batch in make_batches(tiny, rows, HOOK, 4)
            ]
        )
    prompts = [text for r in requests for text in (r.filled, r.paraphrases[0])]
    pairs = [r for r in requests for _ in range(2)]
    new = [float(-x.mean()) for x in tiny.token_logprobs(prompts, [r.target_new for r in pairs])]
    first = [float(x[0].exp()) for x in tiny.token_logprobs(prompts, [str(r.target_true) for r in pairs])]
    assert abs(float(terms.kept)) < 1e-4
    assert float(terms.new) == pytest.approx(sum(new), rel=1e-4)
    # Where both targets begin with the same token, the old one's is not pressed down.
    pressed = [p for row, p in zip(rows, first, strict=True) if row.old is not None]
    assert len(rows) > terms.n_old == len(pressed)
    expected = sum(-math.log1p(-p) for p in pressed)
    assert float(terms.old) == pytest.approx(expected, rel=1e-3)


def test_batches_are_added_before_they_are_divided(tiny_llama: ModelHandle) -> None:
    """The held-out loss does not depend on how rows fall into batches."""
    directions = torch.randn(len(facts()), tiny_llama.d_model, generator=torch.Generator().manual_seed(3))
    totals = []
    for size in (1, 5, 64):
        batches = make_batches(tiny_llama, rows_of(tiny_llama, facts(), RowSettings(openings=1)), HOOK, size)
        with torch.no_grad():
            terms = [batch_terms(tiny_llama, batch, directions[batch.fact_of]) for batch in batches]
        totals.append(float(Terms.added(terms).total(training().weights)))
    assert totals == pytest.approx([totals[0]] * 3, rel=1e-4)


# -- the loop


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tiny_llama: ModelHandle) -> None:
    once, again = (train_map(tiny_llama, split(), training()) for _ in range(2))
    assert same(once, again)
    assert not same(once, train_map(tiny_llama, split(), training(seed=1)))


def test_a_training_that_was_cut_off_anywhere_ends_in_the_same_bits(
    tiny_llama: ModelHandle, tmp_path: Path
) -> None:
    whole = train_map(tiny_llama, split(), training())
    for until in (0, 1, 7, 8, 13):
        state = tmp_path / str(until)
        part = train_map(tiny_llama, split(), training(), state, until=until)
        assert not part.finished
        assert same(train_map(tiny_llama, split(), training(), state), whole)


def test_another_trainings_checkpoint_is_not_taken_up(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    train_map(tiny_llama, split(), training(learning_rate=0.1), tmp_path, until=9)
    assert same(
        train_map(tiny_llama, split(), training(), tmp_path), train_map(tiny_llama, split(), training())
    )


def test_the_best_map_is_returned_and_not_the_last(tiny_llama: ModelHandle) -> None:
    """A learning rate at which the held-out loss rises again: what comes back is the earlier map, not another name of
    the live one."""
    trained = train_map(tiny_llama, split(), training(learning_rate=0.3, epochs=6))
    best = min(trained.losses)
    assert trained.losses.index(best) == trained.best_epoch < 6
    assert trained.losses[-1] > best + 0.1
    assert held_out_loss(tiny_llama, trained) == pytest.approx(best, rel=1e-3)


def test_patience_ends_training(tiny_llama: ModelHandle) -> None:
    trained = train_map(tiny_llama, split(), training(learning_rate=0.3, epochs=30, patience=2))
    assert len(trained.losses) - 1 == trained.best_epoch + 2 < 30


# -- figures


def test_figures_of_a_card_are_those_of_the_edit_in_force(tiny: ModelHandle) -> None:
    """P(new) and whether it leads, against a plain scoring of each prompt with the push made by a hook."""
    from guardedit.models.hooks import patch

    requests = facts()[:3]
    directions = torch.randn(3, tiny.d_model, generator=torch.Generator().manual_seed(4))
    for number, found in enumerate(ask(tiny, requests, directions, HOOK)):
        request = requests[number]
        start = request.prompt.index("{}") + len(request.subject)
        offsets = tiny.encode([request.filled])["offsets"][0].tolist()
        at = max(i for i, (left, right) in enumerate(offsets) if left < start <= right)

        def push(x: torch.Tensor, at: int = at, number: int = number) -> torch.Tensor:
            moved = x.clone()
            moved[:, at] += directions[number]
            return moved

        with patch(tiny, HOOK, push):
            new, old = (
                tiny.token_logprobs([request.filled], [str(target)])[0].mean()
                for target in (request.target_new, request.target_true)
            )
        assert found.p_new == pytest.approx(float(new.exp()), rel=1e-3)
        assert found.holds == bool(new > old)
        assert len(found.paraphrased) == 1


# -- bad input


def test_what_cannot_be_trained_is_said(tiny_llama: ModelHandle) -> None:
    with pytest.raises(BadRequestError, match="L from 0 to 2"):
        train_map(tiny_llama, split(), training(layer=3))
    with pytest.raises(BadRequestError, match="cannot be split"):
        split_facts(facts()[:1], 0.1, 0)
    with pytest.raises(BadRequestError, match="names no old target"):
        rows_of(tiny_llama, [facts()[0].model_copy(update={"target_true": None})], RowSettings())
    for name, value in (("epochs", 0), ("held_out", 1.0), ("learning_rate", 0.0), ("layer", 1.5)):
        with pytest.raises(BadRequestError, match=name):
            training(**{name: value})
