"""Activation edits in a report: what acts where, and when its gate lets it speak."""

from __future__ import annotations

from collections.abc import Mapping

from guardedit.audit.sheet import Cell, Code, Section, Table
from guardedit.audit.words import number, visible
from guardedit.records import ActivationNote, AuditReport, GateLatent, GateNote, Plan, TensorChange

SHOWN = 12
"""Latents of a gate that are shown at once."""
DIRECTION = "direction"


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
    gates = [table for change, note in acting if note.gate for table in _gate(change.parameter, note.gate)]
    tables = (_edits(acting), *_quality(audit.plan), *gates)
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


def _gate(parameter: str, gate: GateNote) -> tuple[Table, ...]:
    """The latents that matter most, and the others folded away."""
    what = "largest" if gate.pool == "max" else "mean"
    roots = "" if not gate.rooted else (
        ", by its square root" if gate.rooted == len(gate.latents)
        else f", the first {gate.rooted} by their square roots"
    )  # fmt: skip
    against = "" if not gate.rivals else (
        f", less what speaks as strongly for {', '.join(map(visible, gate.rivals))} (a softmax),"
    )  # fmt: skip
    note = (
        f"Each counts with its {what} activation in the prompt at {gate.hook_name}{roots}; the weighted sum plus "
        f"{number(gate.bias)}{against} must be {number(gate.limit)} at least. Those that tell most apart come first."
    )
    if gate.rivals:
        note += " A weight is that for the context itself, less the mean of those for the others."
    rows = [_latent(one) for one in gate.latents]
    # A direction stands behind all latents and weighs more than most of them.
    rows.sort(key=lambda row: row[0] != DIRECTION)
    shown = _latents(f"When {parameter} speaks", rows[:SHOWN], note)
    more = _latents(f"{len(rows) - SHOWN} further latents of this gate", rows[SHOWN:], "", folded=True)
    return (shown, more) if len(rows) > SHOWN else (shown,)


def _latent(one: GateLatent) -> tuple[Cell, ...]:
    """A negative number stands for a direction that is no latent; it has no threshold."""
    direction = one.latent is not None and one.latent < 0
    name = DIRECTION if direction else "unknown" if one.latent is None else str(one.latent)
    threshold = "–" if direction else number(one.threshold)
    return (name, visible(one.label) or "no label", number(one.weight), threshold)


def _latents(caption: str, rows: list[tuple[Cell, ...]], note: str, folded: bool = False) -> Table:
    head = ("Latent", "Label", "Weight", "Counts above")
    return Table(caption, head, tuple(rows), frozenset({0, 2, 3}), note, folded)


def _quality(plan: Plan) -> tuple[Table, ...]:
    """How well a fitted gate did on wordings that it had not seen, where its editor says so."""
    said = plan.delta.diagnostics
    if "gate_auroc" not in said:
        return ()
    rows: list[tuple[Cell, ...]] = [
        ("The context", visible(str(said.get("context", "")))),
        ("Prompts in the context, of which it fires in", _share(said, "inside")),
        ("Prompts outside, of which it fires in (false)", _share(said, "outside")),
        (
            "AUROC (1 tells all apart, 0.5 nothing)",
            f"{said['gate_auroc']:.3f}, 95 % interval {said['gate_low']:.3f} to {said['gate_high']:.3f}",
        ),
        ("What it looks at", visible(str(said.get("gate_looks_at", "")))),
    ]
    return (Table("The gate, on wordings that it was not fitted to", ("", ""), tuple(rows)),)


def _share(said: Mapping[str, object], side: str) -> str:
    return f"{said[f'gate_n_{side}']} prompts, {float(str(said[f'gate_fires_{side}'])):.1%}"


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
