"""Free text under an edit, judged by the unedited model's own likelihood: does the model still talk as it did?

`evaluate --also fluency` keeps the texts in its state file. Each text's mean negative log-likelihood a token behind its
stem, in nats, under the unedited model: near that of the unedited model's own texts where an edit left the rest alone,
higher where it makes the model say what it would not have said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from guardedit.evaluation.bootstrap import Estimate, estimate
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.state import CaseResult
from guardedit.models.handle import ModelHandle
from guardedit.models.tokens import tokenise

Pair = tuple[float | None, float | None]
"""Nats of the edited model's texts and of the unedited one's."""


@torch.no_grad()
def nats(handle: ModelHandle, stems: Sequence[str], texts: Sequence[str]) -> float | None:
    """Mean over the texts of the mean NLL a token behind the stem; None where no text goes on."""
    found = []
    for stem, text in zip(stems, texts, strict=True):
        batch, start = handle.encode([text]), len(tokenise(handle, stem).ids)
        ids = batch["input_ids"][0]
        if len(ids) <= start:
            continue
        wanted = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
        wanted[0, start - 1 : -1] = True
        hidden = handle.hidden(batch["input_ids"], batch["attention_mask"])
        logprobs = handle.logits_at(hidden, wanted).float().log_softmax(-1)
        found.append(-float(logprobs.gather(-1, ids[start:, None]).mean()))
    return fmean(found) if found else None


def by_case(handle: ModelHandle, cases: Sequence[EvalCase], state: Path) -> dict[str, Pair]:
    """Case id -> nats of the edited model's texts and of the unedited one's."""
    stems = {case.case_id: case.generation for case in cases}
    found: dict[str, Pair] = {}
    for line in state.read_text().splitlines()[1:]:
        result = CaseResult.model_validate_json(line)
        sides = ((result.after or result.before)["raw"], result.before["raw"])
        own = stems[result.case_id]
        edited, base = (nats(handle, own, side.texts) if side.texts else None for side in sides)
        found[result.case_id] = (edited, base)
    return found


def figures(found: Mapping[str, Pair], seed: int) -> dict[str, Any]:
    """`own_words_nats` of the edited model's texts and, as `…_base`, of the unedited one's; means over cases."""
    sides = dict(
        zip(("own_words_nats", "own_words_nats_base"), zip(*found.values(), strict=True), strict=True)
    )
    return {
        name: told.model_dump()
        for name, values in sides.items()
        if (told := estimate(values, seed, share=False))
    }


def nearer(one: Mapping[str, Pair], other: Mapping[str, Pair], seed: int) -> Estimate | None:
    """`one`'s nats less `other`'s on the cases that both have: below 0 where `one`'s texts are the likelier ones."""
    pairs = [(edited, other[case_id][0]) for case_id, (edited, _) in one.items() if case_id in other]
    gaps = [a - b for a, b in pairs if a is not None and b is not None]
    return estimate(gaps, seed, signed=True, share=False)
