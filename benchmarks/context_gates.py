"""The gates that the tables of contexts hold against each other, all fitted to the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guardedit.editors.contextual import ContextualHparams, gate_hook
from guardedit.edits.activation_parts import Gate
from guardedit.edits.context_texts import Example, examples
from guardedit.edits.gate_shelf import GateShelf
from guardedit.edits.gates import GateQuality, Pooled, fit_gate, pooled
from guardedit.pipeline import Guard
from guardedit.records import EditRequest

SEED = 0
GATES = ("both", "latents", "activations", "distance")


@dataclass(frozen=True, eq=False)
class Trained:
    """One kind's gates, by name: logit of a prompt's mean key and mean latents, limit and quality."""

    logits: Mapping[str, Callable[[Tensor, Tensor], Tensor]]
    limits: Mapping[str, float]
    gates: Mapping[str, Gate]
    about: Mapping[str, Any]


def trained(guard: Guard, kind: str, hparams: ContextualHparams, out: Path) -> Trained:
    """The gates of one kind of context, all fitted to the same prompts; those on latents where an SAE is."""
    handle, hook = guard.handle, gate_hook(guard.handle, hparams)
    sae = guard.kit.saes.get(hook)
    made = examples(handle, _any_request(kind), hparams.gate_examples, SEED)
    texts = [one.text for one in made]
    named = {"model": handle.hook_digest(hook), "hook": hook, "sae": None if sae is None else sae.digest}
    means = GateShelf(out / "read").reading(texts, named, lambda: pooled(handle, texts, hook, sae))
    fits = {
        name: fit_gate(made, means, hook, name, sae, hparams.false_fire, SEED)  # type: ignore[arg-type]
        for name in (GATES[:3] if sae is not None else ("activations",))
    }
    centre, limit = _distance(made, means, hparams.false_fire)
    logits: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        name: partial(_logit, gate) for name, (gate, _) in fits.items()
    }
    logits["distance"] = lambda acts, _: -(acts - centre).norm(dim=1)
    gates = {name: gate for name, (gate, _) in fits.items()}
    about: dict[str, Any] = {name: _about(quality) for name, (_, quality) in fits.items()} | {"hook": hook}
    return Trained(
        logits, {name: gate.limit for name, gate in gates.items()} | {"distance": limit}, gates, about
    )


def shipped(gates: Mapping[str, Any]) -> str:
    """The gate that an edit has: both readers where there are two."""
    return "both" if "both" in gates else "activations"


def _logit(gate: Gate, acts: Tensor, latents: Tensor) -> Tensor:
    """A gate's logit of prompts whose means are known."""
    numbers = list(gate.latents[: gate.rooted])
    return gate.logit(torch.cat([latents[:, numbers], acts @ gate.w_enc[gate.rooted :].T], 1))


def _any_request(kind: str) -> EditRequest:
    return EditRequest(subject="x", prompt="{} is", target_new="y", context=kind)


def _about(quality: GateQuality) -> dict[str, float]:
    return {name: round(value, 4) for name, value in vars(quality).items()}


def _distance(made: Sequence[Example], means: Pooled, false_fire: float) -> tuple[Tensor, float]:
    """As GRACE does (Hartvigsen et al. 2023): near the mean activation of the prompts inside."""
    inside = torch.tensor([one.inside for one in made])
    centre = means.acts[inside].mean(0)
    outside = (-(means.acts[~inside] - centre).norm(dim=1)).sort().values
    return centre, float(outside[-1 - int(false_fire * len(outside))]) + 1e-6
