"""All of it in order: what `guardedit sae train | evaluate | show` call, and how the shipped checkpoints were made."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardedit.errors import BadRequestError
from guardedit.saes import quality
from guardedit.saes.batches import all_inliers
from guardedit.saes.calibrate import Thresholded, thresholds, to_half
from guardedit.saes.cards import Labels, QualityCard
from guardedit.saes.checkpoints import Sae, load, root, save
from guardedit.saes.gather import Progress, gather
from guardedit.saes.grade import Fitted, grade
from guardedit.saes.labels import describe
from guardedit.saes.plan import Stores, TrainPlan, prepare
from guardedit.saes.train import train

if TYPE_CHECKING:
    from guardedit.models.handle import ModelHandle

SOURCE = "words: training text; examples: text sampled from the model, Python standard library"


def train_all(handle: ModelHandle, plan: TrainPlan, progress: Progress | None = None) -> dict[str, Path]:
    """Gather, train, calibrate, grade, label and save every hook of the plan; returns hook name -> folder.

    May be interrupted at any time: gathered shards and training checkpoints are kept, and a second call goes on.
    Raises BadRequestError for text or hooks that do not fit, TooFewTokensError where there is too little text.
    """
    hooks = plan.hooks(handle.n_layers)
    stores = prepare(handle, plan)
    for store, bf16 in ((stores.train, plan.settings.bf16), (stores.calibrate, False), (stores.test, False)):
        gather(handle, store, hooks, bf16=bf16, progress=progress)
    return {name: train_one(handle, plan, stores, name, progress) for name in hooks}


def train_one(
    handle: ModelHandle, plan: TrainPlan, stores: Stores, hook_name: str, progress: Progress | None = None
) -> Path:
    """Train, calibrate, grade, label and save the autoencoder of one hook whose activations are gathered."""
    state = stores.train.folder / "training" / hook_name
    weights = to_half(train(stores.train, hook_name, plan.settings, state / "sae", progress=progress))
    threshold, rule = thresholds(weights, all_inliers(stores.calibrate, hook_name), plan.settings.k)
    coder = Thresholded(weights, threshold)
    fitted = Fitted(hook_name, coder, rule, quality.latent_statistics(coder, stores.train, hook_name))
    card = grade(handle, plan, stores, fitted, state, progress)
    labels = _labels(handle, plan, fitted, progress)
    folder = (plan.out or root()) / handle.name / hook_name
    tensors = {name: getattr(weights, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    stats = {"energy": fitted.statistics.energy, "firing_rate": fitted.statistics.firing_rate}
    save(folder, {**tensors, "threshold": threshold}, stats, card, labels, _metadata(plan, card))
    return folder


def _metadata(plan: TrainPlan, card: QualityCard) -> dict[str, Any]:
    """What SAELens' users look for in `sae.cfg.metadata`; it answers None for anything that is missing."""
    return {
        "prepend_bos": False, "context_size": plan.row_length, "seed": plan.settings.seed,
        "training_architecture": "topk" if plan.settings.per_token else "batchtopk",
        "upstream_digest": card.upstream_digest,
        "sae_lens_version": version("sae-lens"), "l0": card.l0,
    }  # fmt: skip


def evaluate(
    handle: ModelHandle, plan: TrainPlan, folder: Path, progress: Progress | None = None
) -> dict[str, float]:
    """Explained variance by domain of a saved autoencoder on the plan's test text, measured anew."""
    sae = load(folder, expect_upstream=None)
    stores = prepare(handle, plan)
    gather(handle, stores.test, [sae.hook_name], progress=progress)
    data = quality.held_out(stores.test, sae.hook_name, sorted(stores.train.rows.mix))
    return quality.explained_variance_by_domain(sae.reconstruct, data)


def show(sae: Sae, latents: Sequence[int] = ()) -> dict[str, object]:
    """The card, and the named latents with label, examples, firing rate and energy: for printing."""
    wrong = [latent for latent in latents if not 0 <= latent < sae.d_sae]
    if wrong:
        raise BadRequestError(f"{sae.hook_name} has latents 0 to {sae.d_sae - 1}, not {wrong[0]}")
    described = [
        {
            "latent": latent,
            **sae.labels[latent].model_dump(),
            "firing_rate": float(sae.firing_rate[latent]),
            "energy": float(sae.energy[latent]),
        }
        for latent in latents
    ]
    return {"card": sae.card.model_dump(mode="json"), "digest": sae.digest, "latents": described}


def _labels(handle: ModelHandle, plan: TrainPlan, fitted: Fitted, progress: Progress | None) -> Labels:
    from guardedit.models.control import Half, control_texts

    halves: tuple[Half, ...] = ("calibrate", "test")
    texts = {
        domain: [
            text for half in halves for text in control_texts(handle, domain, plan.label_tokens, half=half)
        ]
        for domain in ("prose", "chat", "python")
    }
    return describe(
        handle, fitted.hook_name, fitted.coder, fitted.statistics, texts, SOURCE, progress=progress
    )
