"""The report's lists and remarks: latents and prompts shown, what could have been seen, what was not looked at."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from guardedit.drift import behaviour, latents
from guardedit.drift.evidence import NO_PROMPTS, WATCHED, Evidence
from guardedit.drift.null import NullBank
from guardedit.drift.probes import DISTRACTOR, PROMPT_SCOPES, ProbeSet
from guardedit.drift.sides import BaseSide
from guardedit.models.handle import ModelHandle
from guardedit.records import LatentDrift, ProbeChange, Scope, digest_of

if TYPE_CHECKING:
    from guardedit.saes.checkpoints import Sae

SHOWN_LATENTS = 150
"""Per scope: all significant ones up to this number, then those that moved most, for the plot."""
SHOWN_PROBES = 24
SHOWN_NAMESAKES = 4
"""Fewer, as they say the same."""
LIMITS = (
    "Only what the control text and the listed prompts touch was looked at; a pass means no drift was found at the "
    "resolution stated, not that there is none.",
    "Latents are one decomposition of the activations and depend on the SAE's training; what no latent stands for, and "
    "facts rarer than the stated firing rate, are invisible to them.",
    "Free generation (fluency, consistency), multi-hop questions and longer conversations were not measured.",
    "The monitor is not built to resist somebody who edits with the intention to slip past it.",
)


def latent_rows(evidence: Evidence, saes: Mapping[str, Sae]) -> Iterator[LatentDrift]:
    """Significant latents first, then those that moved most without being significant, by scope."""
    target = evidence.findings.get("target")
    for scope, found in evidence.findings.items():
        rows: list[tuple[bool, float, int, int]] = []
        for index, (tests, flags) in enumerate(zip(found.tests, found.flagged, strict=True)):
            eligible = flags if scope == "target" else flags | tests.testable
            rows += [
                (bool(flags[f]), float(tests.changed_rate[f]), index, int(f))
                for f in np.flatnonzero(eligible)
            ]
        rows.sort(key=lambda row: (not row[0], -row[1], row[2], row[3]))
        for flagged, _, index, latent in rows[:SHOWN_LATENTS]:
            name = found.hook_names[index]
            own = target is not None and bool(target.flagged[index][latent])
            yield _latent(scope, name, latent, found.tests[index], flagged, own, label_of(saes[name], latent))


def _latent(
    scope: Scope, name: str, latent: int, tests: latents.LatentTests, flagged: bool, own: bool, label: str
) -> LatentDrift:
    ratio = float(tests.magnitude_ratio[latent])
    spilled: Literal["spill", "collateral"] = "spill" if own else "collateral"
    return LatentDrift(
        hook_name=name,
        latent=latent,
        scope=scope,
        rate_before=float(tests.rate_before[latent]),
        rate_after=float(tests.rate_after[latent]),
        turnover=float(tests.turnover[latent]),
        magnitude_ratio=ratio if np.isfinite(ratio) else None,
        p_value=float(tests.p_value[latent]),
        significant=flagged,
        kind="intended" if scope == "target" else spilled,
        label=label,
    )


def label_of(sae: Sae, latent: int) -> str:
    """The SAE's words for a latent, or its number."""
    known = sae.labels.latents
    return (known[latent].label if latent < len(known) else "") or f"latent {latent}"


def probe_rows(handle: ModelHandle, evidence: Evidence) -> Iterator[ProbeChange]:
    """All targets; of the other prompts those whose prediction moved most."""
    for scope in PROMPT_SCOPES:
        seen = evidence.observations.get(scope)
        if seen is not None:
            changes = behaviour.probe_changes(handle, seen.rows, seen.positions, scope)
            changes.sort(key=lambda change: -change.kl_nats)
            yield from changes[: SHOWN_NAMESAKES if scope == "namesake" else SHOWN_PROBES]


def resolution(evidence: Evidence) -> dict[str, float]:
    """What each watched scope could have shown at best: `latents.resolution`, names prefixed by the scope."""
    result: dict[str, float] = {}
    for scope in WATCHED:
        if scope in evidence.findings:
            tested = sum(int(t.testable.sum()) for t in evidence.findings[scope].tests)
            seen = evidence.observations[scope]
            found = latents.resolution(seen.rows.n_rows, seen.n_counted, tested)
            result |= {f"{scope}_{name}": value for name, value in found.items()}
    return result


def not_measured(evidence: Evidence, saes: Mapping[str, Sae]) -> Iterator[str]:
    """What this measurement leaves open, in plain sentences."""
    for scope in PROMPT_SCOPES:
        if scope not in evidence.observations:
            yield f"No {scope} prompts were given: what the edit does to them was not measured."
    if DISTRACTOR not in evidence.observations:
        yield "No near prompt was read with the edited sentence in front of it."
    if not saes:
        yield "No SAE watched: drift is judged by predictions and raw activations only."
    for scope, reason in evidence.untested.items():
        if saes and reason != NO_PROMPTS:
            yield f"Latents were not compared on {scope} text: {reason}."
    for note in evidence.probes.notes:
        if note.startswith("control text"):
            yield f"{note[0].upper()}{note[1:]}."
    yield from LIMITS


def inputs(
    base: BaseSide, probes: ProbeSet, saes: Mapping[str, Sae], bank: NullBank | None
) -> dict[str, str]:
    """Digests and settings that the numbers depend on."""
    named = {f"sae {name}": sae.digest for name, sae in saes.items()}
    return {
        "reference model": base.model_digest,
        "probes": probes.digest,
        "control text": probes.far.digest,
        "targets": digest_of([[t.prompt, t.new, t.old] for t in probes.targets]),
        "numeric settings": base.environment,
        "python": platform.python_version(),
        **named,
        **({"drift bank": bank.digest} if bank is not None else {}),
    }
