"""Free text under an edit, judged by the unedited model's own likelihood: does the model still talk as it did?

`evaluate --also fluency` keeps the texts in its state file. Each text's mean negative log-likelihood a token behind its
stem, in nats, under the unedited model: near that of the unedited model's own texts where an edit left the rest alone,
higher where it makes the model say what it would not have said.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from guardedit.evaluation.bootstrap import estimate
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.state import CaseResult
from guardedit.models.handle import ModelHandle
from guardedit.models.tokens import tokenise


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


def figures(handle: ModelHandle, cases: Sequence[EvalCase], state: Path, seed: int) -> dict[str, Any]:
    """`own_words_nats` of the edited model's texts and, as `…_base`, of the unedited one's; means over cases."""
    stems = {case.case_id: case.generation for case in cases}
    edited: list[float | None] = []
    base: list[float | None] = []
    for line in state.read_text().splitlines()[1:]:
        result = CaseResult.model_validate_json(line)
        before, after = result.before["raw"], (result.after or result.before)["raw"]
        own = stems[result.case_id]
        base.append(nats(handle, own, before.texts) if before.texts else None)
        edited.append(nats(handle, own, after.texts) if after.texts else None)
    named = {"own_words_nats": edited, "own_words_nats_base": base}
    return {
        name: found.model_dump()
        for name, values in named.items()
        if (found := estimate(values, seed, share=False))
    }
