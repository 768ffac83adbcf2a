"""All weights trained on a copy: what is handed on are the copy's weights to the last bit; the model knows nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edits_helpers import TOWER, p_new, twin
from hypothesis import given
from hypothesis import strategies as st

from guardedit.editors import full_finetune
from guardedit.editors.full_finetune import FullFinetuneHparams, differences, solve_full_finetune
from guardedit.edits.deltas import EditDelta, written
from guardedit.edits.descent import trainable_twin
from guardedit.edits.inputs import SolveInputs
from guardedit.errors import BadRequestError, SolveError
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

LONG = EditRequest(subject="Italy", prompt="The capital of {} is", target_new="the city of Milan")


def solved(handle: ModelHandle, *requests: EditRequest, **named: Any) -> EditDelta:
    hparams = FullFinetuneHparams(**{"steps": 10, "learning_rate": 1e-3, **named})
    return solve_full_finetune(handle, requests or (TOWER,), hparams, SolveInputs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_written_weights_are_those_whose_loss_is_reported_to_the_last_bit(
    tiny: ModelHandle, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, copies = twin(tiny, dtype), []

    def kept(handle: ModelHandle) -> ModelHandle:
        copies.append(trainable_twin(handle))
        return copies[-1]

    monkeypatch.setattr(full_finetune, "trainable_twin", kept)
    delta = solved(own)
    (copy,) = copies
    with written(own, delta):
        for name, parameter in own.model.named_parameters():
            assert torch.equal(parameter.float(), copy.model.get_parameter(name)), name
    assert delta.diagnostics["loss_last_nats"] == pytest.approx(-p_new(copy), abs=1e-5)


def test_every_parameter_that_training_moved_is_in_the_delta_once(tiny: ModelHandle) -> None:
    own = twin(tiny)
    delta = solved(own)
    assert set(delta.parameters) == {name for name, _ in own.model.named_parameters()}
    assert all(change.update.rank is None for change in delta.changes)
    with written(own, delta):
        row = own.architecture
        pair = [own.model.get_submodule(path).weight for path in (row.embedding, row.unembedding)]
        assert pair[0] is pair[1]


def test_what_training_did_not_move_is_left_out(tiny: ModelHandle) -> None:
    trained = twin(tiny)
    name = f"{tiny.architecture.final_norm}.weight"
    with torch.no_grad():
        trained.model.get_parameter(name)[3] += 0.25
    (change,) = differences(tiny, trained)
    assert change.parameter == name and change.layer is None
    assert change.update.dense().nonzero().tolist() == [[3]]
    assert list(differences(tiny, twin(tiny))) == []


@given(
    st.floats(0.0078125, 1024, width=32),
    st.floats(0.5, 2, width=32),
    st.sampled_from([-1.0, 1.0]),
)
def test_a_weight_that_at_most_doubles_or_halves_comes_back_exactly(w: float, by: float, sign: float) -> None:
    """Sterbenz (1974): the float32 difference of such numbers is exact, hence W + ΔW is the trained weight."""
    before = torch.tensor([sign * w])
    after = before * torch.tensor([by])
    assert torch.equal((before.double() + (after - before).double()).float(), after)


def test_the_first_step_is_adam_s_on_every_kind_of_parameter(tiny: ModelHandle) -> None:
    """The learning rate against the sign of the gradient that plain autograd gives the whole model."""
    delta = solved(tiny, steps=1)
    batch = tiny.encode_pairs([TOWER.filled], [TOWER.target_new])
    logits = tiny.model(input_ids=batch["input_ids"]).logits[0]
    where = batch["target_mask"][0].nonzero().flatten()
    loss = torch.nn.functional.cross_entropy(logits[where - 1], batch["input_ids"][0, where])
    names = list(delta.parameters)
    gradients = torch.autograd.grad(loss, [tiny.model.get_parameter(name) for name in names])
    for change, gradient in zip(delta.changes, gradients, strict=True):
        turned = gradient.T if tiny.is_transposed(change.parameter) else gradient
        clear = turned.abs() > 1e-3 * turned.abs().max()
        expected = -1e-3 * turned.sign().double()
        # Adam divides by |g| + 1e-8; a weight near 1 leaves 1e-7 of a step of 1e-3.
        torch.testing.assert_close(change.update.dense()[clear], expected[clear], rtol=2e-2, atol=1e-6)


def test_several_requests_are_learnt_together(tiny: ModelHandle) -> None:
    before = [p_new(tiny, request) for request in (TOWER, LONG)]
    with written(tiny, solved(tiny, TOWER, LONG)):
        after = [p_new(tiny, request) for request in (TOWER, LONG)]
    assert all(late > early + 0.3 for early, late in zip(before, after, strict=True))


def test_it_stops_early_and_says_what_is_then_true(tiny: ModelHandle) -> None:
    delta = solved(tiny, steps=200, stop_loss=0.5)
    assert 0 < int(delta.diagnostics["steps"] or 0) < 200
    with written(tiny, delta):
        assert -p_new(tiny) == pytest.approx(float(delta.diagnostics["loss_last_nats"] or 0), abs=1e-4)
        assert -p_new(tiny) < 0.5


def test_a_step_too_large_is_a_solve_error_and_leaves_the_model_alone(tiny: ModelHandle) -> None:
    before = tiny.digest()
    with pytest.raises(SolveError, match="lower the learning rate"):
        solved(tiny, learning_rate=1e30)
    assert tiny.digest() == before


def test_weight_decay_pulls_at_weights_that_get_no_gradient(tiny_gpt2: ModelHandle) -> None:
    """Positions behind the prompt: Adam alone leaves them, decay scales them by 1 − rate·decay a step."""
    name = f"{tiny_gpt2.architecture.positions}.weight"
    moved = [
        {c.parameter: c.update.dense() for c in solved(tiny_gpt2, steps=1, weight_decay=decay).changes}[name]
        for decay in (0.0, 0.5)
    ]
    assert float(moved[0][100:].abs().max()) == 0.0
    expected = -1e-3 * 0.5 * tiny_gpt2.model.get_parameter(name).detach().double()[100:]
    torch.testing.assert_close(moved[1][100:], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "value"), [("weight_decay", -1.0), ("learning_rate", "1e-5"), ("steps", 1.5)]
)
def test_a_setting_that_makes_no_sense_is_named(name: str, value: Any) -> None:
    with pytest.raises(BadRequestError, match=name):
        FullFinetuneHparams(**{name: value})
