"""What is put on record of an activation edit, in words and numbers, for whoever approves it."""

from __future__ import annotations

from guardedit.edits.activation_parts import Action, Gate, KeyMatch, Push, TokenMatch, Where
from guardedit.edits.activations import ActivationChange
from guardedit.models.hooks import rewrite_hook
from guardedit.records import ActivationNote, GateLatent, GateNote


def note_of(change: ActivationChange) -> ActivationNote:
    """The torch-free description of an edit."""
    return ActivationNote(
        hook_name=change.action.hook_name if isinstance(change.action, Push) else rewrite_hook(change.layer),
        action=_action(change.action),
        rule=_rule(change.where),
        gate=None if change.gate is None else _gate(change.gate),
        n_bytes=len(change.data),
        label=change.label,
    )


def _action(action: Action) -> str:
    if isinstance(action, Push):
        kept = "" if action.beta == 1.0 else f" and scales what is there by {action.beta:g}"
        return f"adds a direction of norm {float(action.direction.double().norm()):.4g}{kept}"
    return f"adds an update of rank {action.update.rank} times the key"


def _rule(where: Where) -> str:
    if isinstance(where, KeyMatch):
        return f"where the key's read-out is {where.least:g} at least"
    if isinstance(where, TokenMatch):
        return f"at the last token of {len(where.sequences)} token sequence(s) of the prompt"
    return "at every position"


def _gate(gate: Gate) -> GateNote:
    n = len(gate.weights)
    labels, numbers = gate.labels or ("",) * n, gate.latents or (None,) * n
    columns = zip(numbers, labels, gate.net.tolist(), gate.threshold.tolist(), strict=True)
    latents = tuple(
        GateLatent(latent=number, label=label, weight=weight, threshold=threshold)
        for number, label, weight, threshold in columns
    )
    return GateNote(
        hook_name=gate.hook_name,
        latents=latents,
        bias=float(gate.bias),
        limit=float(gate.limit),
        pool=gate.pool,
        rooted=gate.rooted,
        rivals=gate.rival_names,
    )
