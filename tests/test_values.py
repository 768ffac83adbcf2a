"""The residual makes the model say the target, stays inside its bound, and finding it leaves no trace.

What the optimisation says of itself is compared with whole forward passes in which the residual is patched in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from edits_helpers import CONTEXTS, LAYER, TOWER, gaussian, p_new, twin
from torch import Tensor

from guardedit.edits.keys import key_of
from guardedit.edits.values import Value, ValueHparams, optimise_value
from guardedit.errors import BadRequestError, SolveError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import patch, rewrite_hook
from guardedit.models.tokens import tokenise
from guardedit.records import EditRequest

FREE = ValueHparams(steps=12, clamp_norm_factor=50.0)
LONG = TOWER.model_copy(update={"target_new": "the capital of Italy"})


def optimise(
    handle: ModelHandle,
    hparams: ValueHparams = FREE,
    request: EditRequest = TOWER,
    contexts: Sequence[str] = CONTEXTS,
) -> Value:
    key = key_of(handle, request, LAYER, contexts)
    return optimise_value(handle, request, key, LAYER, contexts, hparams)


def subject_end(handle: ModelHandle, request: EditRequest, context: str) -> int:
    cut = context + request.prompt[: request.prompt.index("{}")] + request.subject
    return len(tokenise(handle, cut).ids) - 1


def nll(handle: ModelHandle, request: EditRequest, context: str, residual: Tensor | None) -> float:
    """Mean negative log-likelihood of the target in a plain forward pass, with the residual patched in."""
    at = subject_end(handle, request, context)

    def add(output: Tensor) -> Tensor:
        where = torch.zeros(output.shape[1], 1)
        where[at] = 1.0
        return output if residual is None else output + where * residual.to(output.dtype)

    with patch(handle, rewrite_hook(LAYER), add):
        return -p_new(handle, request, context)


@pytest.mark.parametrize("request_", [TOWER, LONG], ids=["short target", "long target"])
@pytest.mark.parametrize("contexts", [("",), CONTEXTS], ids=["bare", "contexts"])
def test_the_losses_are_those_of_whole_forward_passes(
    tiny: ModelHandle, request_: EditRequest, contexts: tuple[str, ...]
) -> None:
    """At the start (nothing added) and at the end (the residual added), averaged over contexts and target tokens."""
    found = optimise(tiny, request=request_, contexts=contexts)
    for loss, residual in ((found.losses[0], None), (found.losses[-1], found.residual)):
        by_hand = [nll(tiny, request_, context, residual) for context in contexts]
        assert loss == pytest.approx(sum(by_hand) / len(by_hand), abs=2e-4)
    assert found.p_new == pytest.approx(math.exp(-found.losses[-1]))


def test_the_target_becomes_far_more_likely(tiny: ModelHandle) -> None:
    found = optimise(tiny)
    assert found.losses[-1] < found.losses[0] - 0.5
    assert found.residual.dtype == torch.float64 and found.residual.shape == (32,)


@pytest.mark.parametrize("factor", [0.01, 0.3, 2.0])
def test_the_residual_stays_inside_its_bound(tiny: ModelHandle, factor: float) -> None:
    hparams = replace(FREE, clamp_norm_factor=factor, learning_rate=1.0)
    found, key = optimise(tiny, hparams), key_of(tiny, TOWER, LAYER, CONTEXTS)
    bound = factor * float((tiny.weight(LAYER).detach().double() @ key.k_star).norm())
    # The projection rounds in float32.
    assert float(found.residual.norm()) <= bound * (1 + 1e-6)
    if factor == 0.01:
        assert found.clamped
        assert float(found.residual.norm()) == pytest.approx(bound, rel=1e-5)


def test_a_residual_that_never_met_its_bound_is_not_called_clamped(tiny: ModelHandle) -> None:
    assert not optimise(tiny, replace(FREE, clamp_norm_factor=1e6)).clamped


def test_it_stops_at_the_first_loss_below_the_limit(tiny: ModelHandle) -> None:
    whole = optimise(tiny).losses
    limit = (whole[0] + min(whole)) / 2
    found = optimise(tiny, replace(FREE, stop_loss=limit)).losses
    assert found[-1] < limit <= min(found[:-1])
    assert len(found) < len(whole) == FREE.steps + 1
    assert found == whole[: len(found)]


def test_a_target_that_is_already_said_costs_no_step(tiny: ModelHandle) -> None:
    found = optimise(tiny, replace(FREE, stop_loss=1e3))
    assert len(found.losses) == 1 and float(found.residual.norm()) == 0.0 and not found.clamped


def test_the_kl_term_is_zero_before_the_first_step(tiny: ModelHandle) -> None:
    assert optimise(tiny, replace(FREE, steps=0)).kl_nats == 0.0
    assert optimise(tiny, replace(FREE, steps=2)).kl_nats > 0.0


@torch.no_grad()
def test_the_kl_term_is_the_divergence_after_the_subject(tiny: ModelHandle) -> None:
    """KL(edited ‖ unedited) of the next token behind "Eiffel Tower", in nats, from whole forward passes."""
    found = optimise(tiny)
    ids = torch.tensor([tokenise(tiny, TOWER.subject).ids])

    def add(output: Tensor) -> Tensor:
        return torch.cat([output[:, :-1], output[:, -1:] + found.residual.float()], 1)

    base = tiny.model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
    with patch(tiny, rewrite_hook(LAYER), add):
        edited = tiny.model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
    expected = float((edited.exp() * (edited - base)).sum())
    assert found.kl_nats == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-3


def test_a_larger_weight_on_the_kl_term_keeps_what_the_subject_is(tiny: ModelHandle) -> None:
    free, held = (optimise(tiny, replace(FREE, kl_factor=factor)).kl_nats for factor in (0.0, 10.0))
    assert held < free / 2


def test_weight_decay_makes_the_residual_smaller(tiny: ModelHandle) -> None:
    sizes = [float(optimise(tiny, replace(FREE, weight_decay=decay)).residual.norm()) for decay in (0.0, 1e3)]
    assert sizes[1] < sizes[0]


def test_two_runs_agree_bit_for_bit(tiny: ModelHandle) -> None:
    first, second = optimise(tiny), optimise(tiny)
    assert torch.equal(first.residual, second.residual)
    assert (first.losses, first.kl_nats, first.clamped) == (second.losses, second.kl_nats, second.clamped)


class Interrupted(Exception):
    """Somebody pressed Ctrl-C."""


def interrupt(step: int, loss: float) -> None:
    if step == 2:
        raise Interrupted


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("raising", [False, True])
def test_model_flags_and_random_state_are_left_as_they_were(
    tiny: ModelHandle, training: bool, raising: bool
) -> None:
    own = twin(tiny)
    own.model.train(training)
    flags = [index % 3 == 0 for index, _ in enumerate(own.model.parameters())]
    for flag, parameter in zip(flags, own.model.parameters(), strict=True):
        parameter.requires_grad_(flag)
    before, state = own.digest(), torch.get_rng_state()
    key = key_of(own, TOWER, LAYER, CONTEXTS)
    if raising:
        with pytest.raises(Interrupted):
            optimise_value(own, TOWER, key, LAYER, CONTEXTS, FREE, interrupt)
    else:
        optimise_value(own, TOWER, key, LAYER, CONTEXTS, FREE)
    assert own.digest() == before and torch.equal(torch.get_rng_state(), state)
    assert [parameter.requires_grad for parameter in own.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in own.model.parameters())
    assert all(module.training is training for module in own.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in own.model.modules())


def test_a_caller_without_gradients_gets_the_same_value(tiny: ModelHandle) -> None:
    with torch.no_grad():
        inside = optimise(tiny)
    assert torch.equal(inside.residual, optimise(tiny).residual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_a_small_type_is_edited_too(tiny: ModelHandle, dtype: torch.dtype) -> None:
    found = optimise(twin(tiny, dtype))
    assert found.residual.dtype == torch.float64
    assert found.losses[-1] < found.losses[0] - 0.5


def test_progress_is_told_every_step_and_its_loss(tiny_llama: ModelHandle) -> None:
    told: list[tuple[int, float]] = []
    key = key_of(tiny_llama, TOWER, LAYER, ("",))
    found = optimise_value(
        tiny_llama, TOWER, key, LAYER, ("",), FREE, lambda step, loss: told.append((step, loss))
    )
    assert told == list(enumerate(found.losses))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_a_solve_error(tiny: ModelHandle, bad: float) -> None:
    own = twin(tiny)
    key = key_of(own, TOWER, LAYER, CONTEXTS)
    with torch.no_grad():
        own.model.get_parameter(own.rewrite_parameter(3)).view(-1)[0] = bad
    with pytest.raises(SolveError, match="at step 0"):
        optimise_value(own, TOWER, key, LAYER, CONTEXTS, FREE)


def test_a_rewrite_module_that_answers_zero_is_a_solve_error(tiny: ModelHandle) -> None:
    own = twin(tiny)
    with torch.no_grad():
        own.model.get_parameter(own.rewrite_parameter(LAYER)).zero_()
    with pytest.raises(SolveError, match="another layer"):
        optimise(own)


def test_a_target_that_shares_the_subject_s_token_is_a_bad_request(tiny_llama: ModelHandle) -> None:
    """A space at the subject's end belongs to the target's first token, which nothing could then predict."""
    request = EditRequest(subject="Tower ", prompt="The {}", target_new="Rome")
    with pytest.raises(BadRequestError, match="first token"):
        optimise(tiny_llama, request=request)


@pytest.mark.parametrize("prompt", ["The capital of {}", "{} is", "{}"])
def test_a_subject_may_start_the_text_or_stand_right_before_the_target(
    tiny: ModelHandle, prompt: str
) -> None:
    request = EditRequest(subject="Italy", prompt=prompt, target_new="Rome")
    found = optimise(tiny, request=request)
    by_hand = [nll(tiny, request, context, found.residual) for context in CONTEXTS]
    assert found.losses[-1] == pytest.approx(sum(by_hand) / len(by_hand), abs=2e-4)
    assert found.losses[-1] < found.losses[0]


def test_the_last_layer_cannot_carry_a_subject_s_value_to_a_later_token(tiny: ModelHandle) -> None:
    """Only where the target follows the subject at once does the last layer's answer reach it."""
    top, adjacent = 3, EditRequest(subject="Italy", prompt="The capital of {}", target_new="Rome")
    with pytest.raises(SolveError, match="edit a lower layer"):
        optimise_value(tiny, TOWER, key_of(tiny, TOWER, top, ("",)), top, ("",), FREE)
    found = optimise_value(tiny, adjacent, key_of(tiny, adjacent, top, ("",)), top, ("",), FREE)
    assert found.losses[-1] < found.losses[0] - 0.5


BAD = {
    "steps": [-1, 2.5, "25", None, True],
    "learning_rate": [-0.1, float("nan"), "1e-3"],
    "clamp_norm_factor": [0, -1.0, float("inf")],
    "kl_factor": [-1.0, "x"],
    "weight_decay": [-1e-3],
    "stop_loss": [-1.0, None],
    "kl_prompt": ["is a", "{} and {}", 3],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_setting_that_makes_no_sense_is_named(name: str, value: object) -> None:
    with pytest.raises(BadRequestError, match=name):
        ValueHparams(**{name: value})  # type: ignore[arg-type]


def test_the_residual_depends_on_the_weights_it_was_found_on(tiny: ModelHandle) -> None:
    own = twin(tiny)
    with torch.no_grad():
        own.model.get_parameter(own.rewrite_parameter(2)).add_(0.05 * _like(own))
    assert not torch.equal(optimise(own).residual, optimise(tiny).residual)


def _like(handle: ModelHandle) -> Tensor:
    return gaussian(*handle.model.get_parameter(handle.rewrite_parameter(2)).shape).float()
