"""Activation edits in a report: what acts where, and when its gate lets it speak."""

from __future__ import annotations

from guardedit.audit.sheet import Cell, Code, Section, Table
from guardedit.audit.words import number, visible
from guardedit.records import ActivationNote, AuditReport, GateNote, Plan, TensorChange


def _acting(plan: Plan) -> list[tuple[TensorChange, ActivationNote]]:
    return [(change, change.acts) for change in plan.delta.changes if change.acts is not None]


def sentences(plan: Plan) -> tuple[str, ...]:
    """A line for each activation edit: "Acts at layer 5 where its gate fires; weights untouched; 9,420 bytes."."""
    return tuple(_sentence(change, note) for change, note in _acting(plan))


def _sentence(change: TensorChange, note: ActivationNote) -> str:
    label = f"{visible(note.label)}: acts" if note.label else "Acts"
    when = "in prompts in which its gate fires, " if note.gate else ""
    where = f"{label} at layer {change.layer} {when}{visible(note.rule)}"
    return f"{where}; weights untouched; {note.n_bytes:,} bytes."


def sections(audit: AuditReport) -> tuple[Section, ...]:
    """What acts, and the latents that each gate listens to; nothing for an edit of weights."""
    acting = _acting(audit.plan)
    if not acting:
        return ()
    lead = (
        "Instead of changing weights, the edit acts on activations while the model runs.",
        "A gate is read from the whole prompt and holds through the answer. What it listens to is listed: it speaks in "
        "every prompt in which these latents add up to the limit, whether or not the fact is meant there.",
    )
    gates = [_gate(change.parameter, note.gate) for change, note in acting if note.gate]
    tables = (_edits(acting), *gates)
    return (Section("acts", "Where and when the edit acts", lead if gates else lead[:1], (), tables),)


def _edits(acting: list[tuple[TensorChange, ActivationNote]]) -> Table:
    head = ("Edit", "Acts at", "What it does", "At which positions", "Gate", "Bytes")
    rows = tuple(
        (
            Code(change.parameter),
            Code(note.hook_name),
            visible(note.action),
            visible(note.rule),
            Code(note.gate.hook_name) if note.gate else "none",
            number(note.n_bytes),
        )
        for change, note in acting
    )
    return Table("Activation edits", head, rows, frozenset({5}))


def _gate(parameter: str, gate: GateNote) -> Table:
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            "unknown" if one.latent is None else str(one.latent),
            visible(one.label) or "no label",
            number(one.weight),
            number(one.threshold),
        )
        for one in sorted(gate.latents, key=lambda one: -abs(one.weight))
    )
    caption = f"When {parameter} speaks"
    note = (
        f"Each latent counts with its largest activation in the prompt at {gate.hook_name}; the weighted sum plus "
        f"{number(gate.bias)} must be {number(gate.limit)} at least."
    )
    return Table(caption, ("Latent", "Label", "Weight", "Counts above"), rows, frozenset({0, 2, 3}), note)


def edit_rows(audit: AuditReport) -> list[dict[str, object]]:
    """Activation edits as plain rows, for tracking."""
    return [
        {
            "parameter": change.parameter,
            "layer": change.layer,
            **note.model_dump(mode="json", exclude={"gate"}),
            "gate_hook_name": note.gate.hook_name if note.gate else None,
            "gate_bias": note.gate.bias if note.gate else None,
            "gate_limit": note.gate.limit if note.gate else None,
        }
        for change, note in _acting(audit.plan)
    ]


def latent_rows(audit: AuditReport) -> list[dict[str, object]]:
    """Latents of all gates as plain rows, for tracking."""
    return [
        {"parameter": change.parameter, **one.model_dump(mode="json")}
        for change, note in _acting(audit.plan)
        for one in (note.gate.latents if note.gate else ())
    ]
