"""Examples and activations that gates are fitted to."""

from __future__ import annotations

import torch
from drift_helpers import make_sae
from edits_helpers import LAYER, gaussian
from torch import Tensor

from guardedit.edits.activation_parts import Gate
from guardedit.edits.context_texts import Example
from guardedit.edits.gates import Pooled
from guardedit.models.hooks import key_hook

HOOK = key_hook(LAYER)
N, D = 240, 64


def made(n: int = N) -> list[Example]:
    """Every third one inside; twelve wordings a side."""
    return [Example(f"text {i}", i % 3 == 0, f"{i % 3 == 0} {i % 12}") for i in range(n)]


def planted(strength: float, n: int = N) -> Pooled:
    """Standard normal rows, those inside moved along one direction."""
    rows, direction = gaussian(n, D, seed=1).float(), gaussian(D, seed=2).float()
    inside = torch.tensor([one.inside for one in made(n)])
    acts = rows + strength * inside[:, None] * direction / direction.norm()
    return Pooled(acts, make_sae(HOOK, d_in=D).encode(acts).float())


def logits(gate: Gate, acts: Tensor) -> Tensor:
    """A mean of one token is the token."""
    return gate.logit(gate.latent_acts(acts))
