"""What more than one test of the evaluation needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from conftest import SENTENCES

from guardedit.edits.deltas import EditDelta, LowRank, WeightChange
from guardedit.evaluation.cases import EvalCase
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

LAYER = 2


def case(case_id: str, subject: str = "Eiffel Tower") -> EvalCase:
    """A small case with one prompt of each kind."""
    request = EditRequest(
        subject=subject, prompt="The {} is located in the city of", target_new="Rome", target_true="Paris"
    )
    return EvalCase(
        case_id=case_id,
        request=request,
        paraphrases=(f"Where is the {subject}? It is in",),
        neighborhood=("The Louvre is in", "Notre Dame is in the city of"),
        distractors=(f"The {subject} is in Rome. The Louvre is in",),
    )


CASES = tuple(case(str(i), who) for i, who in enumerate(("Eiffel Tower", "Colosseum", "tower of Berlin")))


def nudge(size: float) -> Callable[[ModelHandle, tuple[EditRequest, ...]], EditDelta]:
    """A stand-in editor: a seeded random change of one layer, of the given size."""

    def solve(handle: ModelHandle, requests: tuple[EditRequest, ...]) -> EditDelta:
        noise = torch.Generator().manual_seed(len(requests[0].subject))
        d_out, d_in = handle.weight(LAYER).shape
        left = size * torch.randn(d_out, 2, generator=noise, dtype=torch.float64)
        right = torch.randn(2, d_in, generator=noise, dtype=torch.float64)
        change = WeightChange(handle.rewrite_parameter(LAYER), LAYER, LowRank(left, right))
        return EditDelta((change,), "nudge", {"size": size}, {"seen": "|".join(requests[0].paraphrases)})

    return solve


def spoken(handle: ModelHandle) -> tuple[str, str]:
    """A prompt and the one-token word that the model says after it when decoding greedily."""
    for sentence in SENTENCES:
        words = sentence.split()
        for end in range(2, len(words)):
            prompt = " ".join(words[:end])
            with torch.no_grad():
                token = int(handle.model(handle.encode([prompt])["input_ids"]).logits[0, -1].argmax())
            word = handle.tokenizer.decode([token])
            if not word.startswith(" ") or not word.strip().isalnum():
                continue
            pair = handle.encode_pairs([prompt], [word])
            if pair["input_ids"][pair["target_mask"]].tolist() == [token]:
                return prompt, word.strip()
    raise LookupError("the tiny model never says a word; take another seed for it")
