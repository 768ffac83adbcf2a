"""What is known of an edit before it is made: the scores of the risk report, and trivial ones that ask for no guard."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.hooks import record
from guardedit.models.tokens import tokenise
from guardedit.records import EditRequest, RiskReport
from guardedit.risk.rehearsal import RehearsalView

SAE_SCORES = (
    "sae_view", "neuron_polysemanticity", "key_participation", "latent_leak", "latent_leak_count", "leakage_explained",
)  # fmt: skip
"""Scores that need a sparse autoencoder."""


def guard_scores(report: RiskReport) -> dict[str, float | None]:
    """Every score of the report; None where it could not be measured."""
    return {score.name: score.value for score in report.scores}


def trivial(
    handle: ModelHandle, request: EditRequest, near: Sequence[str], layer: int
) -> dict[str, float | None]:
    """What anybody can read off: counts, and how alike the hidden states of the neighbours are. (The key's and the
    update's norms are among the guard's scores.)

    `hidden_cosine` is the mean cosine of the edit prompt's last hidden state at `layer` with those of the near prompts
    that the guard saw (after CLaRE's entanglement measure); `subject_token_id` is the mean logarithm of the subject's
    token numbers, which a byte-pair vocabulary orders by frequency.
    """
    ids = [int(token) for token in tokenise(handle, " " + request.subject).ids]
    return {
        "subject_tokens": float(len(ids)),
        "subject_token_id": sum(torch.tensor(ids).add(1).double().log().tolist()) / len(ids),
        "prompt_tokens": float(len(tokenise(handle, request.filled).ids)),
        "target_tokens": float(len(tokenise(handle, " " + request.target_new.strip()).ids)),
        "hidden_cosine": _cosine(handle, request.filled, near, layer),
    }


def _cosine(handle: ModelHandle, prompt: str, near: Sequence[str], layer: int) -> float | None:
    if not near:
        return None
    states = _last_states(handle, [prompt, *near], layer).double()
    return float(torch.nn.functional.cosine_similarity(states[:1], states[1:]).mean())


def _last_states(handle: ModelHandle, prompts: Sequence[str], layer: int) -> Float[Tensor, "n d_model"]:
    name, batch = f"blocks.{layer}.hook_resid_post", handle.encode(prompts)
    with torch.no_grad(), preserved(handle), record(handle, [name], stop=True) as seen:
        handle.hidden(batch["input_ids"], batch["attention_mask"])
    last = batch["attention_mask"].sum(1) - 1
    return seen[name][torch.arange(len(last)), last]


def seen_by_the_guard(view: RehearsalView) -> tuple[list[str], list[str]]:
    """Every prompt that the report's scores rest on, and the subjects that its near prompts are about."""
    found: list[str] = []
    about: list[str] = []
    for one in view.views:
        found += [probe.prompt for probe in one.near.probes]
        about += [probe.subject or "" for probe in one.near.probes]
    for probes in view.probes:
        found += [
            *probes.target,
            *probes.entailed,
            *probes.subject,
            *probes.namesake,
            *(probe.prompt for probe in probes.near),
        ]
        about += [probe.subject or "" for probe in probes.near]
    return found, sorted({subject for subject in about if subject})
