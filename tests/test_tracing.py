"""Causal tracing: the fast way gives the plain way's numbers, and what must hold of any restoration holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.plain_tracing import plain_probabilities, plain_trace
from guardedit.errors import BadRequestError
from guardedit.models.corrupting import noise
from guardedit.models.handle import ModelHandle
from guardedit.models.tracing import (
    KINDS,
    Fact,
    TraceSettings,
    embedding_std,
    trace,
    window_at,
    window_of,
)

TOWER = Fact("Eiffel Tower", "The {} is located in the city of")
FRONT = Fact("Marie Curie", "{} was born in")
LAST = Fact("is", "The capital of France {}")
"""A single corrupted token, behind which nothing stands."""
SETTINGS = TraceSettings(samples=4)
# float32 through four blocks, probabilities of some 0.1: sums run in another order in other batch shapes.
CLOSE = 1e-5
LOUD = 5.0
"""Embedding deviation to take: the tiny model's own is so small that noise of its size changes little."""


@pytest.mark.parametrize("window", [None, 3, 5])
@pytest.mark.parametrize("fact", [TOWER, FRONT], ids=["inside", "in front"])
def test_batched_restorations_are_the_plain_ones(tiny: ModelHandle, fact: Fact, window: int | None) -> None:
    """Windows of 3 and 5 layers are clipped at both ends of a model of 4: some begin alike, some are the same."""
    settings = replace(SETTINGS, window=window)
    found = trace(tiny, fact, LOUD, settings)
    plain = plain_trace(tiny, fact, LOUD, settings)
    assert len(plain) == 3 * len(found.tokens) * tiny.n_layers
    for (kind, token, layer), value in plain.items():
        assert found.scores[kind][token, layer] == pytest.approx(value, abs=CLOSE), (kind, token, layer)
    rows = plain_probabilities(tiny, fact, LOUD, SETTINGS)
    assert found.p_clean == pytest.approx(float(rows[0]), abs=CLOSE)
    assert found.p_corrupted == pytest.approx(float(rows[1:].mean()), abs=CLOSE)
    assert max(float(found.indirect(kind).abs().max()) for kind in KINDS) > 1000 * CLOSE


def test_every_family_is_traced_as_the_plain_way_does(every_family: ModelHandle) -> None:
    settings = TraceSettings(samples=2, every=2, window=3)
    found = trace(every_family, TOWER, LOUD, settings)
    for (kind, token, layer), value in plain_trace(every_family, TOWER, LOUD, settings).items():
        column = found.layers.index(layer)
        assert found.scores[kind][token, column] == pytest.approx(value, abs=CLOSE), (kind, token, layer)


@pytest.mark.parametrize("batch_tokens", [1, 40, 100_000])
def test_how_restorations_are_batched_changes_nothing(tiny_llama: ModelHandle, batch_tokens: int) -> None:
    found = trace(tiny_llama, TOWER, LOUD, TraceSettings(samples=4, batch_tokens=batch_tokens))
    reference = trace(tiny_llama, TOWER, LOUD, SETTINGS)
    for kind in KINDS:
        torch.testing.assert_close(found.scores[kind], reference.scores[kind], atol=CLOSE, rtol=0)


def test_some_layers_are_those_of_all_layers(tiny: ModelHandle) -> None:
    whole = trace(tiny, TOWER, LOUD, SETTINGS)
    some = trace(tiny, TOWER, LOUD, TraceSettings(samples=4, every=2))
    assert some.layers == (1, 3)
    for kind in KINDS:
        torch.testing.assert_close(some.scores[kind], whole.scores[kind][:, [1, 3]], atol=CLOSE, rtol=0)


def test_the_last_state_of_the_last_token_is_the_whole_answer(tiny: ModelHandle) -> None:
    found = trace(tiny, TOWER, LOUD, SETTINGS)
    residual = found.scores["residual"]
    assert residual[-1, -1] == pytest.approx(found.p_clean, abs=CLOSE)
    assert abs(found.total_effect) > 100 * CLOSE
    # Behind the last block no other token is looked at.
    torch.testing.assert_close(
        residual[:-1, -1], torch.full_like(residual[:-1, -1], found.p_corrupted), atol=CLOSE, rtol=0
    )


def test_without_corruption_there_is_no_effect(tiny: ModelHandle) -> None:
    found = trace(tiny, TOWER, 0.0, SETTINGS)
    assert found.total_effect == pytest.approx(0, abs=CLOSE)
    for kind in KINDS:
        assert float(found.indirect(kind).abs().max()) < CLOSE


def test_tokens_before_the_subject_have_no_effect(tiny: ModelHandle) -> None:
    found = trace(tiny, TOWER, LOUD, SETTINGS)
    first, end = found.subject
    assert first > 0 and "".join(found.tokens[first:end]).strip() == TOWER.subject
    for kind in KINDS:
        assert bool((found.indirect(kind)[:first] == 0).all())
    assert bool((found.indirect("residual")[first:end, 0] != 0).all())


def test_where_only_the_last_token_is_corrupted_its_state_at_any_layer_is_the_whole_answer(
    tiny: ModelHandle,
) -> None:
    found = trace(tiny, LAST, LOUD, SETTINGS)
    assert found.subject == (len(found.tokens) - 1, len(found.tokens))
    assert abs(found.total_effect) > 100 * CLOSE
    last = found.scores["residual"][-1]
    torch.testing.assert_close(last, torch.full_like(last, found.p_clean), atol=CLOSE, rtol=0)


def test_noise_is_published_noise_and_hits_the_subject_alone(tiny: ModelHandle) -> None:
    drawn = noise(TraceSettings(), 3, 8)
    assert drawn.shape == (10, 3, 8)
    np.testing.assert_array_equal(drawn, np.random.RandomState(1).randn(10, 3, 8))


def test_the_noise_level_is_the_deviation_of_the_subjects_embeddings(tiny: ModelHandle) -> None:
    module = tiny.model.get_submodule(tiny.architecture.embedding)
    # Gemma's embedding scales what it looks up; the noise is added to the scaled rows.
    table = module.weight.detach() * getattr(module, "scalar_embed_scale", 1.0)
    rows = [table[tiny.encode([subject])["input_ids"][0]] for subject in ("Eiffel Tower", "France")]
    assert embedding_std(tiny, ("Eiffel Tower", "France")) == pytest.approx(float(torch.cat(rows).std()))
    with pytest.raises(BadRequestError, match="no subjects"):
        embedding_std(tiny, ())


def test_windows_are_clipped_and_scaled() -> None:
    assert window_at(15, 10, 30) == range(10, 20)
    assert window_at(2, 10, 30) == range(7) and window_at(29, 10, 30) == range(24, 30)
    assert window_at(3, 1, 4) == range(3, 4) and window_at(2, 3, 8) == range(1, 4)
    assert [window_of(n) for n in (1, 4, 12, 24, 28, 30, 48)] == [1, 1, 4, 9, 10, 10, 10]


def test_only_known_facts_are_traced(tiny: ModelHandle) -> None:
    said = trace(tiny, TOWER, LOUD, TraceSettings(samples=1, kinds=("residual",), every=4)).answer
    other = " Rome" if not said.startswith(" Rome") else " Paris"
    with pytest.raises(BadRequestError, match="only facts that the model knows"):
        trace(tiny, Fact(TOWER.subject, TOWER.prompt, other), LOUD)


@pytest.mark.parametrize(
    "wrong",
    [{"kinds": ("heads",)}, {"kinds": ()}, {"samples": 0}, {"window": 0}, {"noise_factor": float("nan")}],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BadRequestError, match=next(iter(wrong))):
        TraceSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BadRequestError, match="with one"):
        Fact("X", "no blank")
