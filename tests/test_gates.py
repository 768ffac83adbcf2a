"""Gates: what is fitted is what fires, the limit keeps its promise, and a silent gate changes no bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drift_helpers import make_sae
from edits_helpers import CONTEXTS, LAYER, TOWER, ZERO, gaussian, moments
from gate_helpers import HOOK, D, N, made, planted
from torch import Tensor

from guardedit.editors import contextual
from guardedit.editors.contextual import (
    ContextualHparams,
    contextual_change,
    gate_hook,
    solve_contextual,
    train_gate,
)
from guardedit.editors.rome import RomeHparams, solve_rome
from guardedit.edits.activation_parts import Everywhere, KeyMatch, Move
from guardedit.edits.activations import ActivationChange, install, uninstall
from guardedit.edits.deltas import EditDelta, decode, encode, record_of, written
from guardedit.edits.gate_rows import NO_LATENT, explained
from guardedit.edits.gate_shelf import GateShelf
from guardedit.edits.gates import Pooled, fit_gate, pooled
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.updates import LowRank
from guardedit.errors import BadRequestError, IntegrityError, SolveError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import record, rewrite_hook
from guardedit.records import DeltaRecord

FICTION = TOWER.model_copy(update={"context": "fiction"})
HPARAMS = ContextualHparams(
    layer=LAYER, steps=6, openings=2, gate_examples=480, gate_depth=0.0, clamp_norm_factor=20.0
)


@pytest.mark.parametrize("kind", ["both", "activations", "latents"])
def test_a_planted_direction_is_found_and_noise_is_not(kind: str) -> None:
    sae = make_sae(HOOK, d_in=D)
    _, good = fit_gate(made(), planted(8.0), HOOK, kind, sae)  # type: ignore[arg-type]
    assert good.auroc > 0.9 and good.low > 0.85
    assert (good.n_inside, good.n_outside) == (80, 160)
    _, weak = fit_gate(made(), planted(2.0), HOOK, kind, sae)  # type: ignore[arg-type]
    assert 0.5 < weak.auroc < good.auroc
    try:
        _, none = fit_gate(made(), planted(0.0), HOOK, kind, sae)  # type: ignore[arg-type]
    except SolveError as error:
        assert "tell" in str(error)
    else:
        assert 0.3 < none.auroc < 0.7 and none.low < 0.6


@pytest.mark.parametrize("false_fire", [0.0, 0.01, 0.1])
def test_no_larger_share_of_held_out_prompts_outside_fires_than_is_allowed(false_fire: float) -> None:
    for strength in (2.0, 5.0):
        _, quality = fit_gate(made(), planted(strength), HOOK, "both", make_sae(HOOK, d_in=D), false_fire)
        assert quality.fires_outside <= false_fire


def test_a_laxer_limit_never_fires_less() -> None:
    strict, _ = fit_gate(made(), planted(4.0), HOOK, "activations", false_fire=0.0)
    lax, _ = fit_gate(made(), planted(4.0), HOOK, "activations", false_fire=0.1)
    assert lax.limit < strict.limit
    torch.testing.assert_close(lax.w_enc, strict.w_enc)


def test_a_latent_gate_carries_the_encoder_rows_of_the_latents_it_weighs_and_no_others() -> None:
    sae, means = make_sae(HOOK, d_in=D), planted(8.0)
    gate, _ = fit_gate(made(), means, HOOK, "latents", sae)
    assert 0 < len(gate.latents) < sae.d_sae
    picked = list(gate.latents)
    torch.testing.assert_close(gate.latent_acts(means.acts), sae.encode(means.acts)[:, picked].float())
    assert gate.rooted == len(gate.latents) and gate.pool == "mean"
    spread = means.latents[:, picked].sqrt().std(0, unbiased=False)  # type: ignore[index]
    order = (gate.weights * spread).abs()
    torch.testing.assert_close(order, order.sort(descending=True).values, rtol=1e-3, atol=1e-3)


def test_too_few_examples_and_no_sae_are_refused() -> None:
    with pytest.raises(BadRequestError, match="20 prompts inside and outside"):
        fit_gate(made(30), planted(4.0, 30), HOOK, "activations")
    with pytest.raises(BadRequestError, match="needs an SAE"):
        fit_gate(made(), replace(planted(4.0), latents=None), HOOK, "latents")


def test_what_an_activation_gate_looks_at_adds_up_where_latents_say_all() -> None:
    """With an SAE that reconstructs without loss the shares of all latents are the whole difference."""
    sae = make_sae(HOOK, d_in=D, d_sae=D)
    latents = gaussian(N, D, seed=3).float().abs()
    latents[torch.tensor([one.inside for one in made()]), :2] += 2.0
    means = Pooled(latents @ sae.W_dec.float(), latents)
    gate, _ = fit_gate(made(), means, HOOK, "activations")
    found = explained(gate, made(), means, sae, top=D)
    assert sum(share for _, share in found) == pytest.approx(1.0, abs=1e-3)
    assert {number for number, _ in found[:2]} == {0, 1}


def test_means_do_not_depend_on_neighbours_and_leave_the_first_token_out(tiny: ModelHandle) -> None:
    texts = ["The Eiffel Tower is in Paris", "Italy", "In the novel, the song is French. Where?", "a"]
    together = pooled(tiny, texts, HOOK).acts
    for row, text in zip(together, texts, strict=True):
        batch = tiny.encode([text])
        with record(tiny, [HOOK]) as seen:
            tiny.hidden(batch["input_ids"], batch["attention_mask"])
        tokens = seen[HOOK][0]
        alone = tokens[1:].mean(0) if len(tokens) > 1 else tokens[0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


@contextmanager
def in_force(handle: ModelHandle, change: ActivationChange) -> Iterator[None]:
    install(handle, change)
    try:
        yield
    finally:
        uninstall(handle, change.parameter)


def states(handle: ModelHandle, texts: list[str], side: str = "right") -> list[Tensor]:
    batch = handle.encode(texts, side)
    hidden = handle.hidden(batch["input_ids"], batch["attention_mask"])
    return [row[mask.bool()] for row, mask in zip(hidden, batch["attention_mask"], strict=True)]


@pytest.mark.parametrize("kind", ["both", "activations", "latents"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_gate_in_force_fires_where_its_fit_says_and_nowhere_else(
    tiny: ModelHandle, kind: str, side: str
) -> None:
    """Fitting and running share no code for the mean over a prompt: the two must agree on every text."""
    texts = [
        f"{a} {b}"
        for a in ("In the novel,", "My sister:", "Berlin", "def add")
        for b in ("Italy", "the song is")
    ]
    sae = make_sae(HOOK, d_in=D)
    means = pooled(tiny, texts, HOOK, sae)
    gate, _ = fit_gate(made(), planted(8.0), HOOK, kind, sae)  # type: ignore[arg-type]
    assert means.latents is not None
    read = [means.latents[:, list(gate.latents[: gate.rooted])], means.acts @ gate.w_enc[gate.rooted :].T]
    told = gate.logit(torch.cat(read, 1))
    middle = sorted(told.tolist())
    gate = replace(gate, limit=(middle[3] + middle[4]) / 2)
    push = LowRank(gaussian(tiny.d_model, 1, seed=5), gaussian(1, D, seed=6))
    change = ActivationChange(LAYER, Move(push), Everywhere(), gate)
    before = states(tiny, texts, side)
    with in_force(tiny, change):
        after = states(tiny, texts, side)
    for was, is_, logit in zip(before, after, told.tolist(), strict=True):
        assert torch.equal(was, is_) == (logit < gate.limit)


def test_outside_of_its_context_an_edit_changes_no_bit_and_inside_it_answers_anew(tiny: ModelHandle) -> None:
    inputs = SolveInputs(moments())
    trained = train_gate(tiny, FICTION, HPARAMS, inputs)
    delta = solve_contextual(tiny, [FICTION], HPARAMS, inputs)
    (change,) = delta.changes
    assert isinstance(change, ActivationChange) and change.gate is not None
    silent = replace(change, gate=replace(change.gate, limit=1e6))
    always = replace(change, gate=replace(change.gate, limit=-1e6))
    prompt = [TOWER.filled]
    bare = states(tiny, prompt)[0]
    with in_force(tiny, silent):
        assert torch.equal(states(tiny, prompt)[0], bare)
    with in_force(tiny, always):
        assert not torch.equal(states(tiny, prompt)[0], bare)
    assert delta.diagnostics["gate_auroc"] == pytest.approx(trained.quality.auroc)
    assert delta.diagnostics["context"] == "fiction"


def test_the_update_is_found_behind_openings_of_the_context(tiny: ModelHandle) -> None:
    delta = solve_contextual(tiny, [FICTION], HPARAMS, SolveInputs(moments()))
    contexts = str(delta.hparams["contexts"]).split("|")
    assert contexts[0] == "" and len(contexts) == 3
    assert contexts[1:] != list(CONTEXTS[1:])
    again = solve_contextual(tiny, [FICTION], HPARAMS, SolveInputs(moments()))
    assert [one.parameter for one in again.changes] == [one.parameter for one in delta.changes]


def test_a_request_without_a_context_and_many_at_once_are_refused(tiny: ModelHandle) -> None:
    with pytest.raises(BadRequestError, match="names no context"):
        solve_contextual(tiny, [TOWER], HPARAMS, SolveInputs(moments()))
    with pytest.raises(BadRequestError, match="one fact at a time"):
        solve_contextual(tiny, [FICTION, FICTION], HPARAMS, SolveInputs(moments()))


@pytest.mark.parametrize(
    "wrong",
    [{"gate": "magic"}, {"openings": 0}, {"match_least": 0.0}, {"gate_examples": 5}, {"gate_depth": 1.0}],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BadRequestError, match=next(iter(wrong))):
        ContextualHparams(**wrong)  # type: ignore[arg-type]


def test_an_edit_carries_no_sae(tiny: ModelHandle) -> None:
    """Its bytes are update, read-out and one gate direction."""
    delta = solve_contextual(tiny, [FICTION], HPARAMS, SolveInputs(moments()))
    (change,) = delta.changes
    assert isinstance(change, ActivationChange)
    floats = 8 * (tiny.d_model + 2 * D) + 4 * 2 * D
    assert len(change.data) < floats + 3000
    assert (
        contextual_change(change.action.update, HPARAMS, change.gate, "fiction").parameter == change.parameter
    )  # type: ignore[union-attr,arg-type]


def test_on_every_family_it_moves_its_own_key_s_answer_and_is_undone_bit_for_bit(
    every_family: ModelHandle,
) -> None:
    """The gate is a planted one: whether a random model's keys tell contexts apart is chance."""
    handle = every_family
    settings = RomeHparams(layer=LAYER, contexts=("",), steps=6, clamp_norm_factor=20.0)
    update = solve_rome(handle, [TOWER], settings, SolveInputs(moments())).update(LAYER)
    assert isinstance(update, LowRank)
    gate, _ = fit_gate(made(), planted(8.0), HOOK, "activations")
    hook, digest = rewrite_hook(LAYER), handle.digest()
    batch = handle.encode([TOWER.filled])

    def seen() -> tuple[Tensor, Tensor]:
        with torch.no_grad(), record(handle, [HOOK, hook]) as found:
            handle.hidden(batch["input_ids"], batch["attention_mask"])
        return found[HOOK], found[hook]

    keys, plain = seen()
    shares = keys.double() @ update.right[0]
    middle = shares.flatten().sort().values[len(batch["input_ids"][0]) // 2 - 1 :][:2]
    where = KeyMatch(update.right[0].clone(), float(middle.mean()))
    always = ActivationChange(LAYER, Move(update), where, replace(gate, limit=-1e6), "fiction")
    matched = (shares >= where.least)[..., None]
    assert 0 < int(matched.sum()) < matched.numel()
    with written(handle, EditDelta((always,), "contextual", {}, {})):
        _, moved = seen()
        assert handle.digest() != digest
    expected = torch.where(matched, plain + update.move(keys), plain)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(moved[~matched[..., 0]], plain[~matched[..., 0]])
    assert torch.equal(seen()[1], plain) and handle.digest() == digest


def test_it_is_saved_read_and_recorded_like_any_delta(tiny: ModelHandle) -> None:
    delta = solve_contextual(
        tiny, [FICTION], HPARAMS, SolveInputs(moments(), saes={HOOK: make_sae(HOOK, d_in=D)})
    )
    found = record_of(tiny, delta, model_digest=ZERO, statistics_digests={})
    assert encode(decode(encode(delta), found)) == encode(delta)
    (note,) = (change.acts for change in found.changes)
    assert note is not None and note.gate is not None and note.gate.pool == "mean"
    assert note.gate.rivals == ("plain", "hypothesis", "document")
    directions = [one.label for one in note.gate.latents if one.latent == NO_LATENT]
    assert [label.split(" for ")[1] for label in directions] == ["fiction", *note.gate.rivals]
    assert note.gate.rooted == len(note.gate.latents) - len(directions)
    assert DeltaRecord.model_validate_json(found.model_dump_json()) == found


def test_a_gate_may_read_above_its_edit_and_is_silent_bit_for_bit(tiny: ModelHandle) -> None:
    """Depth 0 is the edited layer's own keys; any other a residual stream, which may lie above the edit."""
    own, deep = (replace(HPARAMS, gate_depth=depth) for depth in (0.0, 0.9))
    assert gate_hook(tiny, own) == HOOK and gate_hook(tiny, deep) == "blocks.3.hook_resid_post"
    for settings in (own, deep):
        (change,) = solve_contextual(tiny, [FICTION], settings, SolveInputs(moments())).changes
        assert isinstance(change, ActivationChange) and change.gate is not None
        assert (change.looks_ahead is None) == (settings is own)
        assert ActivationChange.from_bytes(change.to_bytes()).looks_ahead == change.looks_ahead
        bare = states(tiny, [TOWER.filled])[0]
        with in_force(tiny, replace(change, gate=replace(change.gate, limit=1e6))):
            assert torch.equal(states(tiny, [TOWER.filled])[0], bare)
        with in_force(tiny, replace(change, gate=replace(change.gate, limit=-1e6))):
            assert not torch.equal(states(tiny, [TOWER.filled])[0], bare)


def test_a_gate_is_fitted_once_for_the_same_prompts_model_and_settings(
    tiny: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[int] = []
    reads: list[int] = []

    def counted(*args: Any, **named: Any) -> Any:
        fitted.append(1)
        return fit_gate(*args, **named)

    def read(*args: Any, **named: Any) -> Any:
        reads.append(1)
        return pooled(*args, **named)

    monkeypatch.setattr(contextual, "fit_gate", counted)
    monkeypatch.setattr(contextual, "pooled", read)
    inputs = SolveInputs(moments(), gates=GateShelf(tmp_path))
    first, again = (train_gate(tiny, FICTION, HPARAMS, inputs) for _ in range(2))
    assert len(fitted) == 1 and again.quality == first.quality and again.looks_at == first.looks_at
    for name in ("w_enc", "weights", "b_dec", "threshold", "b_enc"):
        assert torch.equal(getattr(again.gate, name), getattr(first.gate, name))
    assert (again.gate.limit, again.gate.bias) == (first.gate.limit, first.gate.bias)
    for request, settings in (
        (FICTION, replace(HPARAMS, false_fire=0.1)), (FICTION, replace(HPARAMS, gate_depth=0.5)),
        (FICTION.model_copy(update={"context": "document"}), HPARAMS),
        (FICTION.model_copy(update={"out_of_context": ("Where is it?",)}), HPARAMS),
    ):  # fmt: skip
        train_gate(tiny, request, settings, inputs)
    assert len(fitted) == 5
    assert len(reads) == 3, "another limit and another kind are fitted to what was read"
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="delete it"):
        train_gate(tiny, FICTION, HPARAMS, inputs)
    with pytest.raises(IntegrityError, match="delete the file"):
        train_gate(tiny, FICTION, replace(HPARAMS, false_fire=0.2), inputs)
