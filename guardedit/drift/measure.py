"""The monitor's one call: a reference side and an edited model in, a DriftReport out.

    probes = build_probes(handle, [request], [prompts])
    base = base_side(handle, probes, layer, tuple(saes), cache=drift_cache())
    report = measure_drift(handle, base, probes, saes, change=delta)

`handle` may be the reference itself, with the edit as `change` (written for the time of the measurement, then taken
back bit for bit), or a second handle on the staged copy, with `change=None`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from guardedit.config import cache_folder
from guardedit.drift import behaviour, latents, lists
from guardedit.drift.cache import numeric_environment
from guardedit.drift.evidence import NO_PROMPTS, NO_SAE, NOT_FINITE, WATCHED, Evidence, LatentFindings, make
from guardedit.drift.null import NullBank
from guardedit.drift.observe import Observation, observe
from guardedit.drift.probes import PROMPT_SCOPES, ProbeSet
from guardedit.drift.scores import all_scores
from guardedit.drift.sides import (
    BaseSide,
    Progress,
    below_digest,
    edited_head,
    reference_head,
    same_below,
)
from guardedit.drift.sides import base_side as base_side
from guardedit.drift.sides import check_layers as check_layers
from guardedit.edits.deltas import EditDelta, post_images, restore, saved
from guardedit.errors import BadRequestError, StatisticsMismatchError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.records import DriftReport, Scope, Score

if TYPE_CHECKING:
    from guardedit.saes.checkpoints import Sae

Change = EditDelta | Mapping[str, Tensor]
"""A solved delta, or new tensors by parameter name."""

LATENT_SCOPES: tuple[Scope, ...] = ("target", *WATCHED)
SAME_BYTES = "parameters below the edit have the reference's bytes"
SAME_ACTIVATIONS = "activations below the edit are bit-identical on a sample"
SAME_NUMERICS = "both sides ran with the same numeric settings"


def drift_cache() -> Path:
    """Where far sides are cached."""
    return cache_folder() / "drift"


@torch.no_grad()
def measure_drift(
    handle: ModelHandle,
    base: BaseSide,
    probes: ProbeSet,
    saes: Mapping[str, Sae],
    *,
    change: Change | None = None,
    reference: Literal["previous", "base"] = "previous",
    bank: NullBank | None = None,
    bank_model_digest: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> DriftReport:
    """Compare the edited model with the reference side on the same tokens.

    `saes` by hook name; those whose hook the edit cannot move are left out. `bank_model_digest`: digest of the
    lineage's base, which the bank is bound to (default: the reference's own). Weights, hooks, modes and random state
    are as they were when it returns or raises. Deterministic apart from `seconds`.
    Raises BadRequestError for an edit below the reference side's layer, StatisticsMismatchError where probes, SAEs and
    reference side do not belong together.
    """
    start = time.perf_counter()
    used = {name: saes[name] for name in base.hook_names if name in saes}
    _check(base, probes, used, change)
    head_before = reference_head(handle, base, _parameters(change))
    with preserved(handle), applied(handle, change):
        heads = (head_before, edited_head(handle, base, head_before))
        seen = {
            rows.name: observe(handle, base, rows, heads, _wanted(rows.name, used), progress)
            for rows in (probes.far, *probes.prompts.values())
        }
        after = tuple(behaviour.beliefs(handle, probes.targets))
        integrity = _integrity(handle, base, probes)
    evidence = _evidence(base, probes, used, seen, after, seed)
    measured = _ranked(all_scores(evidence), base, probes, bank, bank_model_digest)
    return DriftReport(
        reference=reference,
        scores=tuple(measured),
        latents=tuple(lists.latent_rows(evidence, used)),
        domains=tuple(summary.record() for summary in evidence.domains if summary.finite),
        probes=tuple(lists.probe_rows(handle, evidence)),
        integrity=integrity,
        resolution=lists.resolution(evidence),
        not_measured=tuple(lists.not_measured(evidence, used)),
        inputs=lists.inputs(base, probes, used, bank),
        seconds=time.perf_counter() - start,
    )


@contextmanager
def applied(handle: ModelHandle, change: Change | None) -> Iterator[None]:
    """The model with the change in its weights; on leaving, also by an exception, the old bytes are back."""
    if change is None:
        yield
        return
    images = post_images(handle, change) if isinstance(change, EditDelta) else dict(change)
    kept = saved(handle, images)
    try:
        restore(handle, images)
        yield
    finally:
        restore(handle, kept)


def _parameters(change: Change | None) -> tuple[str, ...]:
    """Names of the parameters that a change writes to."""
    if isinstance(change, EditDelta):
        return change.parameters
    return tuple(change or ())


def _check(base: BaseSide, probes: ProbeSet, saes: Mapping[str, Sae], change: Change | None) -> None:
    if probes.digest != base.probes_digest:
        raise StatisticsMismatchError(
            "the reference side was recorded with other probes; record it with these"
        )
    if isinstance(change, EditDelta):
        check_layers(base, (change.lowest_layer,) if change.changes else ())
    for name, sae in saes.items():
        width = base.recorded["far"][0].acts[name].shape[-1]
        if sae.hook_name != name or sae.d_in != width:
            raise StatisticsMismatchError(
                f"the SAE given for {name} was trained at {sae.hook_name} with width {sae.d_in}; {width} is needed"
            )
    if not base.recorded["far"]:
        raise BadRequestError("the reference side has no control text")


def _wanted(name: str, saes: Mapping[str, Sae]) -> Mapping[str, Sae]:
    """Latents are compared where they are tested; the other rows need predictions only."""
    return saes if name in LATENT_SCOPES else {}


def _integrity(handle: ModelHandle, base: BaseSide, probes: ProbeSet) -> dict[str, bool]:
    """Yes/no facts; where one of the first two is false, the edited side was not computed from its own lower layers.

    From layer 0 on all of it was: there the two say nothing and are left out.
    """
    numerics = {SAME_NUMERICS: numeric_environment(handle) == base.environment}
    if base.layer == 0:
        return numerics
    return {
        SAME_BYTES: below_digest(handle, base.layer) == base.below_digest,
        SAME_ACTIVATIONS: same_below(handle, base, probes.far),
        **numerics,
    }


def _evidence(
    base: BaseSide,
    probes: ProbeSet,
    saes: Mapping[str, Sae],
    seen: dict[str, Observation],
    after: tuple[behaviour.TargetBelief, ...],
    seed: int,
) -> Evidence:
    findings: dict[Scope, LatentFindings] = {}
    untested: dict[Scope, str] = {}
    for scope in LATENT_SCOPES:
        reason = _untestable(scope, seen.get(scope), saes)
        if reason is None:
            findings[scope] = _find(scope, seen[scope], tuple(saes), seed)
        else:
            untested[scope] = reason
    domains = tuple(_summaries(probes, seen, seed))
    return Evidence(probes, seen, domains, base.beliefs, after, findings, untested, seed)


def _untestable(scope: Scope, seen: Observation | None, saes: Mapping[str, Sae]) -> str | None:
    if not saes:
        return NO_SAE
    if seen is None:
        return NO_PROMPTS
    if not all(seen.hooks[name].finite for name in saes):
        return NOT_FINITE
    needed = 1 if scope == "target" else latents.MIN_SEQUENCES
    if seen.rows.n_rows < needed:
        return f"{seen.rows.n_rows} sequences; {needed} are the fewest that can show anything"
    return None


def _find(scope: Scope, seen: Observation, hook_names: tuple[str, ...], seed: int) -> LatentFindings:
    counts = tuple(latents.joined(seen.hooks[name].counts) for name in hook_names)
    tests = tuple(latents.compare_latents(c, seed + 2 * index) for index, c in enumerate(counts))
    if scope == "target":
        flagged = [latents.in_target(c, t) for c, t in zip(counts, tests, strict=True)]
    else:
        flagged = latents.significant(tests)
    return LatentFindings(hook_names, counts, tests, tuple(flagged))


def _summaries(probes: ProbeSet, seen: Mapping[str, Observation], seed: int) -> Iterator[behaviour.Summary]:
    far = seen["far"]
    for domain in dict.fromkeys(probes.far.domains):
        rows = torch.tensor([name == domain for name in probes.far.domains])
        yield behaviour.summarise(far.positions, rows[far.positions.sequence], domain, "far", seed)
    for scope in PROMPT_SCOPES:
        if scope in seen:
            positions = seen[scope].positions
            yield behaviour.summarise(positions, torch.ones_like(positions.lost), scope, scope, seed)


def _ranked(
    measured: list[Score],
    base: BaseSide,
    probes: ProbeSet,
    bank: NullBank | None,
    bank_model_digest: str | None,
) -> list[Score]:
    """Scores with their percentile within the bank, and the overall one."""
    digest = bank_model_digest or base.model_digest
    refusal = (
        "there is no bank of accepted edits for this model"
        if bank is None
        else bank.refusal(digest, base.layer, base.hook_names, probes.far.n_tokens)
    )
    if bank is None or refusal is not None:
        return [*measured, make("drift_percentile", None, "percentile", "model", reason=refusal)]
    values = {score.name: score.value for score in measured if score.value is not None}
    overall = bank.overall(values)
    n = len(bank.values("omnibus_far")) or len(bank.values("far_kl"))
    reason = (
        None
        if overall is not None
        else "a statistic of the bank could not be measured, or the bank is too small"
    )
    placed = [
        score
        if score.value is None
        else score.model_copy(update={"percentile": bank.percentile(score.name, score.value)})
        for score in measured
    ]
    return [*placed, make("drift_percentile", overall, "percentile", "model", n=n, reason=reason)]
