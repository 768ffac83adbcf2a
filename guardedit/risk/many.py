"""Prompts around many requests: sizes are shared, and beyond some two dozen requests a sample stands for all.

What each request is meant to change is always looked at; what a joint edit does to everything around is a mean over
prompts, for which a sample of requests serves.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest, ProbePrompts
from guardedit.risk.neighbours import NearProbes, Probes, ProbeSizes, generated_probes, noted

SURROUNDED = 24
"""Requests whose surroundings are looked at; of more, so many are drawn."""


def sample_requests(n: int, limit: int, seed: int) -> tuple[int, ...]:
    """Indices of at most `limit` of `n` requests, ascending; the same for the same seed."""
    if n <= limit:
        return tuple(range(n))
    return tuple(sorted(random.Random(f"requests/{seed}").sample(range(n), limit)))


def sampling_note(n: int, n_sampled: int, seed: int) -> tuple[str, ...]:
    """What a reader has to know where not all requests' surroundings were looked at."""
    if n_sampled == n:
        return ()
    return (
        f"each of the {n} requests' own prompt was looked at; subject, near and entailed prompts stand around "
        f"{n_sampled} requests drawn with seed {seed}",
    )


def shared(sizes: ProbeSizes, n_requests: int) -> ProbeSizes:
    """Sizes for one of `n_requests`: the numbers divided, but two prompts a scope at least."""
    return ProbeSizes(**{name: max(2, -(-size // n_requests)) for name, size in vars(sizes).items()})


def own_prompt(request: EditRequest) -> Probes:
    """The request's own prompt and the wordings that it names, and nothing around it."""
    nothing = Probes(request.wordings, (), (), (), "none looked for")
    return noted(request, nothing)


def first_near(request: EditRequest, near: NearProbes, n: int) -> NearProbes:
    """The first `n` near prompts; those that the request names are never cut."""
    return NearProbes(near.probes[: max(n, len(request.neighborhood))], near.origin)


def probes_around_all(
    handle: ModelHandle, requests: Sequence[EditRequest], sizes: ProbeSizes, seed: int
) -> tuple[tuple[ProbePrompts, ...], tuple[str, ...]]:
    """Prompts around each request, `sizes` shared among those that are sampled, and what a reader has to know."""
    if len(requests) == 1:
        return (generated_probes(handle, requests[0], sizes, seed),), ()
    chosen = sample_requests(len(requests), SURROUNDED, seed)
    each = shared(sizes, len(chosen))
    found = tuple(
        generated_probes(handle, request, each, seed) if index in chosen else own_prompt(request).prompts()
        for index, request in enumerate(requests)
    )
    return found, sampling_note(len(requests), len(chosen), seed)
