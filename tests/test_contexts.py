"""Prefixes: the same ones for a model and a seed, the bare prompt first, none of them empty."""

from __future__ import annotations

import torch

from guardedit.edits.contexts import OPENINGS, sample_contexts
from guardedit.models.handle import ModelHandle


def test_the_same_seed_gives_the_same_contexts_and_another_seed_others(tiny: ModelHandle) -> None:
    first = sample_contexts(tiny, 6, seed=0)
    assert sample_contexts(tiny, 6, seed=0) == first
    assert sample_contexts(tiny, 6, seed=1) != first


def test_the_bare_prompt_comes_first_and_no_prefix_is_empty(tiny: ModelHandle) -> None:
    for count in (1, 2, 5, 10, 12):
        contexts = sample_contexts(tiny, count, seed=3)
        assert len(contexts) == count + 1
        assert contexts[0] == ""
        for context in contexts[1:]:
            assert context.startswith(OPENINGS)
            assert context.endswith(". ") and not context.endswith(".. ")
            assert "  " not in context and "\n" not in context


def test_no_prefixes_leave_the_bare_prompt(tiny_llama: ModelHandle) -> None:
    assert sample_contexts(tiny_llama, 0, seed=0) == ("",)


def test_half_of_the_prefixes_are_short_and_half_are_long(tiny_llama: ModelHandle) -> None:
    """Two samplings, of 5 and of 10 new tokens; the second half gets the odd one."""
    contexts = sample_contexts(tiny_llama, 5, seed=0, lengths=(1, 40))[1:]
    sizes = [len(context) for context in contexts]
    assert max(sizes[:2]) < min(sizes[2:])


def test_sampling_leaves_the_random_state_alone(tiny: ModelHandle) -> None:
    before = torch.get_rng_state()
    sample_contexts(tiny, 4, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
