"""Short text in front of a prompt, so that a key and a value are those of the subject and not of one wording.

ROME averages over the bare prompt and prefixes sampled from the model (Meng et al. 2022, section 3.1). Here they are
sampled once with a fixed seed and handed on as a value: the same ones serve the key and the value.
"""

from __future__ import annotations

from guardedit.models.corpus import sample_texts
from guardedit.models.handle import ModelHandle

OPENINGS = (
    "It is well known that",
    "In the early days of",
    "According to the report,",
    "Many people believe that",
    "After a long journey,",
    "The second chapter begins with",
    "You may have heard of",
    "When the meeting was over,",
    "On the other side of",
    "There are many reasons for",
)
"""First words of the sampled prefixes; several, as a model without a BOS token does not find into English from one."""
TEMPERATURE = 0.7
"""Below 1, as a small model at its own temperature soon leaves English."""


def sample_contexts(
    handle: ModelHandle, n_prefixes: int, seed: int, lengths: tuple[int, int] = (5, 10)
) -> tuple[str, ...]:
    """The bare context "" and `n_prefixes` prefixes of the model's own words, each ending in ". ".

    Half of them are `lengths[0]` tokens long, half `lengths[1]`. Deterministic for a model and a seed.
    """
    prefixes: list[str] = []
    for index, length in enumerate(lengths):
        count = n_prefixes // 2 + (n_prefixes % 2 if index else 0)
        if count:
            openings = [OPENINGS[(i + index * 5) % len(OPENINGS)] for i in range(count)]
            texts = sample_texts(
                handle, count, length, seed + index, prompts=openings, temperature=TEMPERATURE
            )
            prefixes += [" ".join(text.split()).rstrip(".") + ". " for text in texts]
    return ("", *prefixes)
