"""Fills in the quality card of one autoencoder, controls and aims included."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guardedit.errors import BadRequestError
from guardedit.saes import quality
from guardedit.saes.batches import all_inliers
from guardedit.saes.calibrate import Thresholded, thresholds, to_half
from guardedit.saes.cards import Aim, QualityCard
from guardedit.saes.gather import Progress
from guardedit.saes.plan import Stores, TrainPlan
from guardedit.saes.train import train

if TYPE_CHECKING:
    from guardedit.models.handle import ModelHandle


@dataclass(frozen=True)
class Fitted:
    """An autoencoder that is trained and has its thresholds."""

    hook_name: str
    coder: Thresholded
    rule: str
    """Which threshold rule explained more on the calibration text."""
    statistics: quality.LatentStatistics


def grade(
    handle: ModelHandle,
    plan: TrainPlan,
    stores: Stores,
    fitted: Fitted,
    state: Path,
    progress: Progress | None,
) -> QualityCard:
    """Measure everything on the card; `state` is a folder for the control's training checkpoints."""
    hook_name, coder, rows = fitted.hook_name, fitted.coder, stores.train.rows
    data = quality.held_out(stores.test, hook_name, sorted(rows.mix))
    moment, mean = quality.second_moment(stores.train, hook_name)
    l0 = quality.mean_l0(coder, data.seen)
    controls = {
        "pca": quality.explained_variance(
            quality.pca_reconstruction(moment, mean, max(round(l0), 1)), data.seen
        ),
        **_frozen_decoder(plan, stores, hook_name, data.seen, state, progress),
    }
    recovered, nats, n_rows = _loss(handle, plan, stores, hook_name, coder, mean)
    shares, n_facts = _leakage(handle, plan, hook_name, coder, moment, data.seen)
    card = QualityCard(
        hook_name=hook_name, model_name=handle.name, d_in=len(mean), d_sae=plan.settings.d_sae,
        data_digest=rows.digest, mix=rows.mix, tokens=rows.n_tokens,
        samples=plan.settings.steps * plan.settings.batch_size,
        held_out_tokens=sum(len(x) for x in data.by_domain.values()), held_out_digest=stores.test.rows.digest,
        l0=round(l0, 2), explained_variance=quality.explained_variance_by_domain(coder.reconstruct, data),
        unseen_domains=data.unseen, ce_loss_recovered=recovered, ce_nats=nats, ce_rows=n_rows,
        dead_share=round(fitted.statistics.dead_share, 5), dense_share=round(fitted.statistics.dense_share, 5),
        statistics_tokens=fitted.statistics.n_tokens,
        controls={name: round(value, 4) for name, value in controls.items()}, controls_note=_controls_note(plan),
        leakage_share_explained=shares[0], leakage_variance_explained=shares[1], leakage_facts=n_facts,
        threshold_rule=fitted.rule, settings=asdict(plan.settings), seed=plan.settings.seed,
        created_with={name: version(name) for name in ("sae-lens", "torch", "transformers")},
        upstream_digest=handle.hook_digest(hook_name),
    )  # fmt: skip
    return card.model_copy(update={"aims": aims(card), "remarks": _remarks(plan)})


def _control_samples(plan: TrainPlan) -> int:
    return min(plan.frozen_control_samples, plan.settings.samples)


def _frozen_decoder(
    plan: TrainPlan, stores: Stores, hook_name: str, seen: Tensor, state: Path, progress: Progress | None
) -> dict[str, float]:
    """Explained variance of an autoencoder whose decoder stays as random as it began."""
    samples = _control_samples(plan)
    if not samples:
        return {}
    settings = replace(plan.settings, samples=samples, frozen_decoder=True)
    frozen = to_half(train(stores.train, hook_name, settings, state / "frozen_decoder", progress=progress))
    threshold, _ = thresholds(frozen, all_inliers(stores.calibrate, hook_name), settings.k)
    return {"frozen_decoder": quality.explained_variance(Thresholded(frozen, threshold).reconstruct, seen)}


def _controls_note(plan: TrainPlan) -> str:
    samples = _control_samples(plan)
    if not samples:
        return "the frozen-decoder control was not trained"
    if samples == plan.settings.samples:
        return "the frozen-decoder control was trained on as many samples"
    return f"the frozen-decoder control was trained on {samples} samples, fewer than the autoencoder's"


def _remarks(plan: TrainPlan) -> tuple[str, ...]:
    half = "Training activations come from forward passes in bfloat16, held-out ones from float32."
    return (half,) if plan.settings.bf16 else ()


def _loss(
    handle: ModelHandle, plan: TrainPlan, stores: Stores, hook_name: str, coder: Thresholded, mean: Tensor
) -> tuple[float | None, dict[str, float], int]:
    """CE loss recovered on about twenty long test rows of the training domains, taken in turn from each."""
    rows = stores.test.rows
    seen = set(stores.train.rows.mix)
    by_domain: dict[str, list[list[int]]] = {}
    for row, domain in zip(rows.ids, rows.domain_of, strict=True):
        if rows.domains[domain] in seen and len(row) >= 96:
            by_domain.setdefault(rows.domains[domain], []).append(row[:192].tolist())
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_domain.values()))
    chosen = [row for row in turns if row is not None][: plan.loss_rows]
    if not chosen:
        return None, {}, 0
    median = stores.train.median_norm(hook_name)
    recovered, nats = quality.ce_recovered(handle, hook_name, coder, mean.float(), median, chosen)
    return (round(recovered, 4) if recovered == recovered else None), nats, len(chosen)


def _leakage(
    handle: ModelHandle, plan: TrainPlan, hook_name: str, coder: Thresholded, moment: Tensor, x: Tensor
) -> tuple[tuple[float | None, float | None], int]:
    """Both figures of `quality.leakage_share` over the plan's facts, and how many there are; key space only."""
    if plan.facts is None or not hook_name.endswith("mlp.hook_post"):
        return (None, None), 0
    facts = [json.loads(line) for line in plan.facts.read_text(encoding="utf-8").splitlines() if line.strip()]
    keys = subject_keys(handle, hook_name, [(fact["prompt"], fact["subject"]) for fact in facts])
    share, explained = quality.leakage_share(coder, moment, keys, x)
    return (round(share, 4), round(explained, 4)), len(keys)


@torch.no_grad()
def subject_keys(handle: ModelHandle, hook_name: str, facts: Sequence[tuple[str, str]]) -> Tensor:
    """Activations (n, d_in) at each subject's last token; `facts` are (prompt with the subject in it, subject)."""
    from guardedit.models.hooks import record

    keys = []
    for prompt, subject in facts:
        at = prompt.rfind(subject)
        if at < 0:
            raise BadRequestError(f"the subject {subject!r} is not in the prompt {prompt!r}")
        encoded = handle.encode([prompt])
        ends = (encoded["offsets"][0, :, 1] >= at + len(subject)).nonzero()
        with record(handle, [hook_name], stop=True) as seen:
            handle.hidden(encoded["input_ids"], encoded["attention_mask"])
        keys.append(seen[hook_name][0, int(ends[0])].float().cpu())
    return torch.stack(keys)


AIMS = {"key": 0.65, "mlp": 0.72, "resid": 0.80}


def aims(card: QualityCard) -> tuple[Aim, ...]:
    """The bars of the default model's autoencoders, each with what was reached."""
    kind = (
        "key"
        if card.hook_name.endswith("mlp.hook_post")
        else "mlp"
        if card.hook_name.endswith("mlp_out")
        else "resid"
    )
    wanted: list[tuple[str, str, float, float | None]] = [
        ("explained_variance", ">=", AIMS[kind], card.explained_variance["all"]),
        ("ce_loss_recovered", ">=", 0.90, card.ce_loss_recovered),
        ("dead_share", "<=", 0.10, card.dead_share),
        ("dense_share", "<=", 0.01, card.dense_share),
    ]
    return tuple(
        Aim(
            name=name,
            op=op,
            limit=limit,
            value=value,
            met=value is not None and (value >= limit if op == ">=" else value <= limit),
        )
        for name, op, limit, value in wanted
    )
