"""REMEDI on activations: the direction is the map's, the subject's last token alone is pushed, undo is exact."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import SENTENCES
from edits_helpers import TOWER
from remedi_helpers import HOOK, facts, map_of
from torch import Tensor

from guardedit.editors.remedi import RemediHparams, solve_remedi
from guardedit.edits.activations import ActivationChange, Push, TokenMatch
from guardedit.edits.deltas import EditDelta, encode, written
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.pushed_rows import make_batches
from guardedit.edits.remedi_map import load_map, save_map
from guardedit.edits.remedi_rows import RowSettings, rows_of
from guardedit.edits.representations import represent
from guardedit.edits.subjects import subject_sequences
from guardedit.errors import BadRequestError, IntegrityError, MissingStatisticsError, StatisticsMismatchError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import patch, record
from guardedit.records import EditRequest

HPARAMS = RemediHparams(layer=1)
PROMPTS = (
    TOWER.filled,
    "Everybody knows the Eiffel Tower, and the Eiffel Tower is in",
    "Eiffel Tower",
    "The capital of France is",
)


def solved(handle: ModelHandle, request: EditRequest = TOWER, alpha: float = 1.0) -> EditDelta:
    inputs = SolveInputs(maps={HOOK: map_of(handle)})
    return solve_remedi(handle, [request], replace(HPARAMS, alpha=alpha), inputs)


def states(handle: ModelHandle, prompt: str, *hooks: str) -> dict[str, Tensor]:
    """Activations of one prompt, (seq, d_model) each."""
    batch = handle.encode([prompt])
    with torch.no_grad(), record(handle, hooks) as seen:
        handle.hidden(batch["input_ids"], batch["attention_mask"])
    return {name: found[0] for name, found in seen.items()}


def ends(handle: ModelHandle, prompt: str, word: str) -> list[int]:
    """Positions of the last token of every mention of the word."""
    batch = handle.encode([prompt])
    spans = batch["offsets"][0].tolist()
    stops = [at + len(word) for at in range(len(prompt)) if prompt.startswith(word, at)]
    return [max(i for i, (left, right) in enumerate(spans) if left < stop <= right) for stop in stops]


def change_of(delta: EditDelta) -> tuple[ActivationChange, Push]:
    change = delta.changes[0]
    assert isinstance(change, ActivationChange) and isinstance(change.action, Push)
    return change, change.action


# -- the direction


def test_the_direction_is_the_maps_of_both_representations(tiny: ModelHandle) -> None:
    """F([h at the subject's last token; mean h of the object's tokens]), worked out from one plain pass."""
    sentence = f"{TOWER.filled} {TOWER.target_new}"
    seen = states(tiny, sentence, HOOK)[HOOK]
    n_prompt = int(tiny.encode([TOWER.filled])["attention_mask"].sum())
    entity, attribute = seen[ends(tiny, sentence, TOWER.subject)[0]], seen[n_prompt:].mean(0)
    trained = map_of(tiny)
    expected = trained.weight @ torch.cat([entity, attribute]) + trained.bias
    direction = change_of(solved(tiny))[1].direction
    torch.testing.assert_close(direction, expected, rtol=1e-4, atol=1e-4)


def test_alpha_scales_the_direction(tiny_llama: ModelHandle) -> None:
    once, twice = (change_of(solved(tiny_llama, alpha=a))[1].direction for a in (1.0, 2.0))
    assert torch.equal(2 * once, twice)


def test_representations_do_not_depend_on_what_else_is_in_the_batch(tiny: ModelHandle) -> None:
    claims = [(request, request.target_new) for request in facts()]
    together = represent(tiny, claims, HOOK)
    for i, claim in enumerate(claims):
        alone = represent(tiny, [claim], HOOK)
        torch.testing.assert_close(together.entity[i], alone.entity[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.attribute[i], alone.attribute[0], rtol=1e-4, atol=1e-4)


# -- what it moves


@pytest.mark.parametrize("prompt", PROMPTS)
def test_only_the_subjects_last_token_is_pushed(tiny: ModelHandle, prompt: str) -> None:
    """At the hook itself every other position keeps its bits. Above it, positions before the first mention do; later
    ones attend to it and may change. A prompt without the subject keeps every bit."""
    delta, top = solved(tiny), f"blocks.{tiny.n_layers - 1}.hook_resid_post"
    before = states(tiny, prompt, HOOK, top)
    with written(tiny, delta):
        after = states(tiny, prompt, HOOK, top)
    pushed = ends(tiny, prompt, TOWER.subject)
    others = [at for at in range(len(before[HOOK])) if at not in pushed]
    assert torch.equal(after[HOOK][others], before[HOOK][others])
    direction = change_of(delta)[1].direction
    for at in pushed:
        assert torch.equal(after[HOOK][at], before[HOOK][at] + direction)
    first = min(pushed, default=len(before[top]))
    assert torch.equal(after[top][:first], before[top][:first])
    assert not pushed or not torch.equal(after[top][first:], before[top][first:])


def test_a_prompt_of_one_token_is_pushed_too(tiny_llama: ModelHandle) -> None:
    """The published code skips prompts of length 1."""
    word = next(w for w in " ".join(SENTENCES).split() if tiny_llama.encode([w])["input_ids"].shape == (1, 1))
    before = states(tiny_llama, word, HOOK)[HOOK]
    delta = solved(tiny_llama, TOWER.model_copy(update={"subject": word}))
    with written(tiny_llama, delta):
        after = states(tiny_llama, word, HOOK)[HOOK]
    assert torch.equal(after[0], before[0] + change_of(delta)[1].direction)


def test_the_subject_is_found_at_the_start_in_the_midst_and_behind_a_mark(tiny: ModelHandle) -> None:
    where = change_of(solved(tiny))[0].where
    assert isinstance(where, TokenMatch)
    for text in ("Eiffel Tower is", "See the Eiffel Tower now", '"Eiffel Tower" is', "a (Eiffel Tower)"):
        ids = tuple(tiny.encode([text])["input_ids"][0].tolist())
        at = ends(tiny, text, TOWER.subject)[0]
        assert any(ids[: at + 1][-len(one) :] == one for one in where.sequences), text
    assert subject_sequences(tiny, TOWER) == where.sequences


def test_undo_gives_back_every_bit(tiny: ModelHandle) -> None:
    digest = tiny.digest()
    before = states(tiny, TOWER.filled, HOOK)[HOOK]
    with written(tiny, solved(tiny)):
        assert tiny.digest() != digest
    assert tiny.digest() == digest
    assert torch.equal(states(tiny, TOWER.filled, HOOK)[HOOK], before)


def test_solving_twice_gives_the_same_bytes(tiny: ModelHandle) -> None:
    assert encode(solved(tiny)) == encode(solved(tiny))


# -- rows


def test_rows_from_the_subject_on_give_what_whole_rows_give(tiny: ModelHandle) -> None:
    """A batch of suffixes with its directions added equals each whole row with a patch at its subject."""
    rows = rows_of(tiny, facts(), RowSettings(("It is said that. ",), openings=1))
    directions = torch.randn(len(facts()), tiny.d_model, generator=torch.Generator().manual_seed(1))
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids) - rows[i].at, rows[i].at, i))
    ordered = iter(rows[i] for i in order)
    for batch in make_batches(tiny, rows, HOOK, 5):
        with torch.no_grad():
            found = batch.hidden(directions[batch.fact_of])
        for row in found:
            one = next(ordered)

            def push(x: Tensor, at: int = one.at, fact: int = one.fact) -> Tensor:
                moved = x.clone()
                moved[0, at] += directions[fact]
                return moved

            ids = torch.tensor([one.ids])
            with torch.no_grad(), patch(tiny, HOOK, push):
                whole = tiny.hidden(ids, torch.ones_like(ids))[0, one.at :]
            torch.testing.assert_close(row[: len(whole)], whole, rtol=2e-4, atol=2e-4)
    assert next(ordered, None) is None


def test_paraphrases_without_the_subject_give_no_row(tiny_llama: ModelHandle) -> None:
    rows = rows_of(tiny_llama, facts()[:1], RowSettings())
    assert len(rows) == 2
    assert all(row.targets and row.at < row.targets[0][0] + 1 for row in rows)


# -- files


def test_a_saved_map_comes_back_bit_for_bit(tiny_llama: ModelHandle, tmp_path) -> None:  # type: ignore[no-untyped-def]
    made = map_of(tiny_llama)
    back = save_map(tmp_path / "map", made.weight, made.bias, made.card)
    assert torch.equal(back.weight, made.weight) and torch.equal(back.bias, made.bias)
    assert (back.card, back.digest) == (made.card, made.digest)


@pytest.mark.parametrize("name", ["map.safetensors", "card.json"])
def test_every_flipped_byte_of_a_map_is_found(tiny_llama: ModelHandle, tmp_path, name: str) -> None:  # type: ignore[no-untyped-def]
    made = map_of(tiny_llama)
    save_map(tmp_path, made.weight, made.bias, made.card)
    whole = (tmp_path / name).read_bytes()
    readable = name == "card.json"
    for offset in range(0, len(whole), 3 if readable else 97):
        changed = bytearray(whole)
        changed[offset] ^= 4
        if readable and not whole[offset : offset + 1].strip():
            continue  # white space between fields says nothing
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(IntegrityError):
            load_map(tmp_path)


def test_a_map_of_other_weights_is_refused(tiny_llama: ModelHandle) -> None:
    made = map_of(tiny_llama)
    made.check(tiny_llama)
    other = replace(tiny_llama, model=copy.deepcopy(tiny_llama.model))
    with torch.no_grad():
        other.model.get_parameter(other.rewrite_parameter(3))[0, 0] += 1
    with pytest.raises(StatisticsMismatchError, match="train one for these weights"):
        made.check(other)
    made.check(other, tiny_llama.manifest())


# -- bad input


def test_what_cannot_be_solved_is_said(tiny_llama: ModelHandle) -> None:
    with pytest.raises(MissingStatisticsError, match=r"no REMEDI map for blocks\.1.*guardedit remedi train"):
        solve_remedi(tiny_llama, [TOWER], HPARAMS, SolveInputs())
    inputs = SolveInputs(maps={HOOK: map_of(tiny_llama)})
    with pytest.raises(BadRequestError, match="one fact at a time, got 2"):
        solve_remedi(tiny_llama, [TOWER, TOWER], HPARAMS, inputs)
    for wrong in ({"alpha": 0.0}, {"alpha": "1"}, {"layer": -1}):
        with pytest.raises(BadRequestError, match=next(iter(wrong))):
            replace(HPARAMS, **wrong)  # type: ignore[arg-type]
