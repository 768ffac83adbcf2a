"""Many values in one batch are the values that each fact would get alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from edits_helpers import CONTEXTS, LAYER, TOWER

from guardedit.edits.keys import key_of, keys_of
from guardedit.edits.objective import Fact, make_objective
from guardedit.edits.rowset import bucketed
from guardedit.edits.values import Value, ValueHparams, optimise_value, optimise_values
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

FREE = ValueHparams(steps=15, clamp_norm_factor=50.0, stop_loss=6.0)
REQUESTS = (
    TOWER,
    EditRequest(subject="Italy", prompt="The capital of {} is", target_new="the city of Paris"),
    EditRequest(subject="Marie Curie", prompt="{} was born in", target_new="London"),
    EditRequest(subject="Alan Turing", prompt="{} worked in the north of", target_new="France"),
    EditRequest(subject="the song", prompt="The language of {} is", target_new="French"),
)


def together(
    handle: ModelHandle, hparams: ValueHparams, requests: tuple[EditRequest, ...] = REQUESTS
) -> list[Value]:
    return list(
        optimise_values(
            handle, requests, keys_of(handle, requests, LAYER, CONTEXTS), LAYER, CONTEXTS, hparams
        )
    )


def alone(handle: ModelHandle, hparams: ValueHparams, request: EditRequest) -> Value:
    return optimise_value(handle, request, key_of(handle, request, LAYER, CONTEXTS), LAYER, CONTEXTS, hparams)


@pytest.mark.parametrize("size", [2, 5])
def test_a_batch_gives_each_fact_the_value_it_gets_alone(tiny: ModelHandle, size: int) -> None:
    found = together(tiny, replace(FREE, facts_at_once=size))
    for value, request in zip(found, REQUESTS, strict=True):
        single = alone(tiny, FREE, request)
        # Larger matrix products round otherwise in float32, and a dozen steps of Adam carry that on.
        assert float((value.residual - single.residual).norm()) <= 1e-3 * float(single.residual.norm())
        assert value.losses == pytest.approx(single.losses, abs=1e-3)
        assert value.clamped == single.clamped


def test_facts_end_at_different_steps_and_each_below_its_own_limit(tiny: ModelHandle) -> None:
    starts = sorted(value.losses[0] for value in together(tiny, replace(FREE, steps=0)))
    limit = starts[2] - 0.1
    found = together(tiny, replace(FREE, stop_loss=limit))
    lengths = {len(value.losses) for value in found}
    assert len(lengths) > 1
    for value in found:
        assert all(loss >= limit for loss in value.losses[:-1])
        assert value.losses[-1] < limit or len(value.losses) == FREE.steps + 1


def test_the_order_of_the_requests_does_not_matter(tiny: ModelHandle) -> None:
    there = together(tiny, FREE)
    back = together(tiny, FREE, REQUESTS[::-1])[::-1]
    for one, other in zip(there, back, strict=True):
        assert float((one.residual - other.residual).norm()) <= 1e-3 * float(one.residual.norm())


def test_keys_in_one_batch_are_the_keys_one_by_one(tiny: ModelHandle) -> None:
    for key, request in zip(keys_of(tiny, REQUESTS, LAYER, CONTEXTS, 4), REQUESTS, strict=True):
        single = key_of(tiny, request, LAYER, CONTEXTS)
        torch.testing.assert_close(key.k_star, single.k_star, atol=1e-5, rtol=1e-4)
        assert (key.position, key.subject_starts_text) == (single.position, single.subject_starts_text)


def test_finished_facts_leave_without_changing_the_others_losses(tiny: ModelHandle) -> None:
    facts = [Fact(request, CONTEXTS, "{} is a") for request in REQUESTS]
    whole = make_objective(tiny, facts, LAYER)
    residuals = 0.3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = whole.losses(residuals), whole.without([1, 3]).losses(residuals)
    for name in ("nll", "kl"):
        old, new = getattr(before, name), getattr(after, name)
        torch.testing.assert_close(new[[0, 2, 4]], old[[0, 2, 4]], atol=1e-4, rtol=1e-4)
        assert float(new[[1, 3]].abs().max()) == 0.0


def test_a_start_is_where_the_descent_begins(tiny: ModelHandle) -> None:
    keys = keys_of(tiny, [TOWER], LAYER, CONTEXTS)
    found = optimise_values(tiny, [TOWER], keys, LAYER, CONTEXTS, replace(FREE, stop_loss=0.0))[0]
    again = optimise_values(
        tiny, [TOWER], keys, LAYER, CONTEXTS, replace(FREE, steps=0), starts=[found.residual]
    )[0]
    assert again.losses[0] == pytest.approx(found.losses[-1], abs=1e-5)


def test_a_warm_start_goes_on_from_where_few_contexts_led(tiny: ModelHandle) -> None:
    keys = keys_of(tiny, REQUESTS, LAYER, CONTEXTS)
    few = optimise_values(tiny, REQUESTS, keys, LAYER, CONTEXTS[:1], FREE)
    starts = [value.residual.float() for value in few]
    rest = optimise_values(tiny, REQUESTS, keys, LAYER, CONTEXTS, FREE, starts=starts)
    for value, first, second in zip(together(tiny, replace(FREE, warm_contexts=1)), few, rest, strict=True):
        assert torch.equal(value.residual, second.residual)
        assert value.losses == first.losses + second.losses
        assert value.losses[-1] < FREE.stop_loss or len(second.losses) == FREE.steps + 1


@pytest.mark.parametrize("few", [len(CONTEXTS), len(CONTEXTS) + 4])
def test_a_warm_start_on_all_contexts_is_none(tiny_llama: ModelHandle, few: int) -> None:
    plain, warm = together(tiny_llama, FREE), together(tiny_llama, replace(FREE, warm_contexts=few))
    assert all(
        torch.equal(one.residual, other.residual) and one.losses == other.losses
        for one, other in zip(plain, warm, strict=True)
    )


def cost_of(lengths: list[int], cuts: list[slice], overhead: int) -> int:
    return sum((cut.stop - cut.start) * lengths[cut.stop - 1] + overhead for cut in cuts)


@pytest.mark.parametrize("overhead", [0, 3, 24, 1000])
@pytest.mark.parametrize("lengths", [[1], [2, 2, 2], [1, 1, 4, 4, 5, 9], [1, 2, 3, 4, 5, 6, 7]])
def test_rows_are_cut_into_runs_at_the_least_cost(lengths: list[int], overhead: int) -> None:
    cuts = bucketed(lengths, overhead)
    assert [at for cut in cuts for at in range(cut.start, cut.stop)] == list(range(len(lengths)))
    inner = range(1, len(lengths))
    every = [
        [slice(a, b) for a, b in zip((0, *edges), (*edges, len(lengths)), strict=True)]
        for count in range(len(lengths))
        for edges in combinations(inner, count)
    ]
    assert cost_of(lengths, cuts, overhead) == min(cost_of(lengths, some, overhead) for some in every)


def test_losses_do_not_depend_on_which_rows_run_together(
    tiny: ModelHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = [Fact(request, CONTEXTS, "{} is a") for request in REQUESTS]
    residuals = torch.randn(len(facts), tiny.d_model, generator=torch.Generator().manual_seed(0))
    found = []
    for overhead in (0, 10_000):
        monkeypatch.setattr(bucketed, "__defaults__", (overhead,))
        objective = make_objective(tiny, facts, LAYER)
        with torch.no_grad():
            losses = objective.losses(residuals)
            rest = objective.without([1, 3]).losses(residuals)
        found.append((len(objective.rows._parts), losses, rest))
    assert found[0][0] > found[1][0] == 1
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(one.nll, other.nll, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.kl, other.kl, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0][2].nll[[1, 3]], torch.zeros(2))
