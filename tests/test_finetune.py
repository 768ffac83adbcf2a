"""Fine-tuning descends on ΔW without writing it: its loss must be the one that the written weights have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from edits_helpers import CONTEXTS, LAYER, TOWER, p_new, twin

from guardedit.editors.finetune import FinetuneHparams, FinetuneLHparams, solve_finetune
from guardedit.edits import targets
from guardedit.edits.deltas import Dense, EditDelta, encode, written
from guardedit.edits.inputs import SolveInputs
from guardedit.errors import BadRequestError, SolveError
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

LONG = EditRequest(subject="Italy", prompt="The capital of {} is", target_new="the city of Milan")


def solved(handle: ModelHandle, requests: Sequence[EditRequest] = (TOWER,), **named: Any) -> EditDelta:
    return solve_finetune(
        handle, requests, FinetuneHparams(**{"layer": LAYER, "steps": 10, **named}), SolveInputs()
    )


def loss_of(handle: ModelHandle, requests: Sequence[EditRequest], contexts: Sequence[str] = ("",)) -> float:
    """Mean negative log-likelihood over all target tokens of all rows."""
    pairs = [(context + request.filled, request.target_new) for request in requests for context in contexts]
    found = handle.token_logprobs([prompt for prompt, _ in pairs], [target for _, target in pairs])
    return -float(torch.cat(found).mean())


@pytest.mark.parametrize("requests", [(TOWER,), (TOWER, LONG)], ids=["one", "two of unequal length"])
@pytest.mark.parametrize("contexts", [("",), CONTEXTS], ids=["bare", "contexts"])
def test_the_losses_are_those_of_the_weights_before_and_after_writing(
    tiny: ModelHandle, requests: tuple[EditRequest, ...], contexts: tuple[str, ...]
) -> None:
    delta = solved(tiny, requests, contexts=contexts)
    # Wx + ΔWx against (W + ΔW)x, in float32.
    assert delta.diagnostics["loss_first_nats"] == pytest.approx(loss_of(tiny, requests, contexts), abs=2e-4)
    with written(tiny, delta):
        assert delta.diagnostics["loss_last_nats"] == pytest.approx(
            loss_of(tiny, requests, contexts), abs=2e-4
        )


def test_several_requests_are_learnt_together(tiny: ModelHandle) -> None:
    delta, before = solved(tiny, (TOWER, LONG), steps=20), [p_new(tiny, request) for request in (TOWER, LONG)]
    with written(tiny, delta):
        after = [p_new(tiny, request) for request in (TOWER, LONG)]
    assert all(late > early + 0.1 for early, late in zip(before, after, strict=True))


def test_it_is_gradient_descent_on_the_weight_itself(tiny: ModelHandle) -> None:
    """Adam's first step is the learning rate against the sign of the gradient that plain autograd gives the weight."""
    delta = solved(tiny, steps=1)
    parameter = tiny.model.get_parameter(tiny.rewrite_parameter(LAYER))
    batch = tiny.encode_pairs([TOWER.filled], [TOWER.target_new])
    logits = tiny.model(input_ids=batch["input_ids"]).logits[0]
    where = batch["target_mask"][0].nonzero().flatten()
    loss = torch.nn.functional.cross_entropy(logits[where - 1], batch["input_ids"][0, where])
    gradient = torch.autograd.grad(loss, parameter)[0]
    gradient = gradient.T if tiny.architecture.transposed else gradient
    clear = gradient.abs() > 1e-4 * gradient.abs().max()
    step = delta.update(LAYER).dense()
    expected = -5e-4 * gradient.sign().double()
    # Adam divides by |g| + 1e-8.
    torch.testing.assert_close(step[clear], expected[clear], rtol=1e-2, atol=1e-8)
    assert float(clear.float().mean()) > 0.9


def test_the_clamp_bounds_every_entry_and_is_reached(tiny: ModelHandle) -> None:
    free, held = solved(tiny), solved(tiny, clamp=7e-4)
    largest = [float(delta.update(LAYER).dense().abs().max()) for delta in (free, held)]
    assert largest[0] > 1e-3 and largest[1] == pytest.approx(7e-4, rel=1e-6)


def test_ft_l_keeps_its_clamp_always(tiny: ModelHandle) -> None:
    """Also with steps far larger than the clamp, and with a request it cannot learn under it."""
    hparams = FinetuneLHparams(layer=LAYER, steps=10, clamp=2e-3, learning_rate=0.1)
    delta = solve_finetune(tiny, (TOWER, LONG), hparams, SolveInputs())
    largest = delta.update(LAYER).dense().abs().max()
    assert delta.editor == "finetune-l" and float(largest) == pytest.approx(2e-3, rel=1e-6)
    with written(tiny, delta):
        moved = tiny.weight(LAYER).detach().clone()
    assert float((moved - tiny.weight(LAYER).detach()).abs().max()) < 2e-3 + 1e-6
    with pytest.raises(BadRequestError, match="clamp"):
        FinetuneLHparams(clamp=None)


@torch.no_grad()
def test_the_published_loss_scores_every_target_token_after_the_bare_prompt(tiny: ModelHandle) -> None:
    """Meng et al. 2022: mean over requests of the mean over the target's tokens of −log p(token | prompt)."""
    requests, means = (TOWER, LONG), []
    for request in requests:
        batch = tiny.encode_pairs([request.filled], [request.target_new])
        ids = batch["input_ids"][0][batch["target_mask"][0]]
        prompt = batch["input_ids"][:, : -len(ids)]
        logprobs = tiny.model(input_ids=prompt).logits[0, -1].double().log_softmax(-1)
        means.append(-float(logprobs[ids].mean()))
    assert len(ids) > 1
    found = solved(tiny, requests, steps=0, score_at="prompt_end").diagnostics["loss_first_nats"]
    assert found == pytest.approx(sum(means) / 2, abs=1e-4)


def test_requests_beyond_one_pass_have_the_same_loss_and_step(
    tiny: ModelHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = (TOWER, LONG, TOWER.model_copy(update={"target_new": "the north of Europe"}))
    for score_at in ("own", "prompt_end"):
        monkeypatch.setattr(targets, "ROWS", 64)
        whole = solved(tiny, requests, contexts=CONTEXTS, steps=1, score_at=score_at)
        monkeypatch.setattr(targets, "ROWS", 2)
        parts = solved(tiny, requests, contexts=CONTEXTS, steps=1, score_at=score_at)
        assert parts.diagnostics["loss_first_nats"] == pytest.approx(
            whole.diagnostics["loss_first_nats"], abs=1e-4
        )
        assert parts.diagnostics["loss_last_nats"] == pytest.approx(
            whole.diagnostics["loss_last_nats"], abs=1e-3
        )


def test_it_stops_at_the_first_loss_below_the_limit(tiny: ModelHandle) -> None:
    whole = solved(tiny, steps=20).diagnostics
    first, last = float(whole["loss_first_nats"] or 0), float(whole["loss_last_nats"] or 0)
    limit = (first + last) / 2
    early = solved(tiny, steps=20, stop_loss=limit).diagnostics
    assert float(early["loss_last_nats"] or 0) < limit and 0 < int(early["steps"] or 0) < 20 == whole["steps"]


def test_the_bare_prompt_alone_is_the_default_and_contexts_change_the_edit(tiny: ModelHandle) -> None:
    plain, named, more = solved(tiny), solved(tiny, contexts=("",)), solved(tiny, contexts=CONTEXTS)
    assert encode(plain) == encode(named) != encode(more)
    assert (plain.hparams["contexts"], more.hparams["contexts"]) == ("", "|".join(CONTEXTS))


def test_contexts_carry_the_edit_behind_other_text(tiny: ModelHandle) -> None:
    """Trained behind a prefix, the target gains more there than by training on the bare prompt alone."""
    gains = []
    for contexts in (("",), ("", CONTEXTS[1])):
        with written(tiny, solved(tiny, contexts=contexts)):
            gains.append(p_new(tiny, TOWER, CONTEXTS[1]))
    assert gains[1] > gains[0]


def test_the_update_is_a_dense_float32_matrix(tiny: ModelHandle) -> None:
    update = solved(tiny).update(LAYER)
    assert isinstance(update, Dense) and update.rank is None
    assert update.shape == tuple(tiny.weight(LAYER).shape) and update.matrix.dtype == torch.float32
    assert not update.matrix.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_a_solve_error(tiny: ModelHandle, bad: float) -> None:
    own = twin(tiny)
    with torch.no_grad():
        own.model.get_parameter(own.rewrite_parameter(3)).view(-1)[0] = bad
    with pytest.raises(SolveError, match="at step 0"):
        solved(own)


BAD = {
    "steps": [-1, 1.5],
    "learning_rate": [-1.0, "5e-4"],
    "clamp": [0, -1.0, "x"],
    "score_at": ["last", None],
    "weight_decay": [-1.0],
    "stop_loss": [float("nan")],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_setting_that_makes_no_sense_is_named(name: str, value: Any) -> None:
    with pytest.raises(BadRequestError, match=name):
        FinetuneHparams(**{name: value})
