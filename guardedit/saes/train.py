"""Train an autoencoder with SAELens' trainer on a store of activations; interrupted training goes on where it was.

k latents are active a token, on average. The trainer is driven through `SAETrainer.step`, the seam that SAELens gives
to outside coordinators, because `fit` keeps its state with pickle. State here is safetensors and JSON. Inputs are
normalised (zero mean, mean squared norm d_in) and the normalisation is folded into the weights at the end, so that the
autoencoder takes raw activations and its decoder rows have norm 1.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from guardedit.errors import IntegrityError, SolveError, TooFewTokensError
from guardedit.records import digest_of, digest_of_bytes
from guardedit.saes.batches import Normalisation, normalisation, stream
from guardedit.saes.files import write_atomically

if TYPE_CHECKING:
    from guardedit.saes.gather import Progress, Store


@dataclass(frozen=True)
class TrainSettings:
    """How one autoencoder is trained; the defaults are those of the shipped checkpoints."""

    d_sae: int = 3072
    k: int = 32
    samples: int = 2_400_000
    """Activations seen in all; more than the store holds means several epochs."""
    batch_size: int = 1024
    lr: float = 1.5e-3
    init_norm: float = 0.3
    """Norm of the decoder rows at the start; small ones learn faster, but more latents die."""
    seed: int = 20
    bf16: bool = True
    """Matrix products in bfloat16; the weights stay float32."""
    per_token: bool = False
    """Exactly k latents a token (TopK) instead of k on average (see `RunningThreshold`)."""
    dead_after: int = 150
    """Steps without firing after which a latent counts as dead and gets SAELens' auxiliary loss."""
    frozen_decoder: bool = False
    """Keep the random initial decoder: a control, not an autoencoder to use."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return max(self.samples // self.batch_size, 1)


@dataclass(frozen=True)
class Weights:
    """Trained weights on raw activations, float32; decoder rows of norm 1; no thresholds yet."""

    W_enc: Tensor
    """(d_in, d_sae)"""
    b_enc: Tensor
    """(d_sae,)"""
    W_dec: Tensor
    """(d_sae, d_in)"""
    b_dec: Tensor
    """(d_in,); also subtracted from the input."""


class RunningThreshold(nn.Module):
    """One threshold for all latents that lets k of them through on average: BatchTopK with a moving average.

    What is trained is then what is saved: after plain TopK, putting fixed thresholds in its place cost 0.06 of the
    explained variance. (BatchTopK: Bussmann et al. 2024, arXiv 2412.06410.) The threshold is estimated from up to 128
    rows of each batch.
    """

    threshold: Tensor
    rows: int = 128
    rate: float = 0.1

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.register_buffer("threshold", torch.full((), -1.0))

    def forward(self, pre: Tensor) -> Tensor:
        """(n, d_sae) pre-activations -> activations; values at or under the threshold become 0."""
        if self.training:
            self._follow(pre.detach())
        return torch.where(pre > self.threshold.to(pre.dtype), pre, torch.zeros((), dtype=pre.dtype))

    def _follow(self, pre: Tensor) -> None:
        sample = pre[: self.rows].float()
        wanted = (
            sample.flatten()
            .topk(min(self.k * len(sample), sample.numel()), sorted=False)
            .values.min()
            .clamp(min=0)
        )
        self.threshold.copy_(wanted if self.threshold < 0 else self.threshold.lerp(wanted, self.rate))


def train(
    store: Store,
    hook_name: str,
    settings: TrainSettings,
    state: Path,
    *,
    progress: Progress | None = None,
    save_every_s: float = 120.0,
) -> Weights:
    """Train on every shard of the hook that the store holds; `state` is a folder for checkpoints.

    Raises TooFewTokensError where no shard is there, SolveError where the loss is not finite. The caller's random state
    is left as it was.
    """
    shards = store.available(hook_name)
    if not shards:
        raise TooFewTokensError(f"no activations of {hook_name} were gathered; gather first")
    normal = normalisation(store, hook_name, shards)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        trainer = _trainer(hook_name, len(normal.mean), settings)
        key = digest_of(
            {"hook": hook_name, "settings": asdict(settings), "shards": shards, "rows": store.rows.digest}
        )
        _restore(trainer, state, key)
        _loop(trainer, store, hook_name, shards, normal, settings, state, key, progress, save_every_s)
    return _fold(trainer.sae, normal)


def _trainer(hook_name: str, d_in: int, settings: TrainSettings) -> Any:
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=d_in, d_sae=settings.d_sae, k=settings.k, decoder_init_norm=settings.init_norm
        )
    )
    if not settings.per_token:
        sae.activation_fn = RunningThreshold(settings.k)
    if settings.frozen_decoder:
        sae.W_dec.requires_grad_(False)
    config = SAETrainerConfig(
        total_training_samples=settings.samples,
        train_batch_size_samples=settings.batch_size,
        lr=settings.lr,
        lr_end=settings.lr / 100,  # SAETrainer refuses None
        lr_warm_up_steps=settings.steps // 20 if settings.steps >= 40 else 0,
        lr_decay_steps=settings.steps // 4,
        dead_feature_window=settings.dead_after,
        feature_sampling_window=10**9,
        autocast=settings.bf16,
    )
    return SAETrainer(cfg=config, sae=sae, data_provider=iter(()))


def _loop(
    trainer: Any,
    store: Store,
    hook_name: str,
    shards: list[int],
    normal: Normalisation,
    settings: TrainSettings,
    state: Path,
    key: str,
    progress: Progress | None,
    save_every_s: float,
) -> None:
    done = trainer.n_training_steps
    batches = stream(store, hook_name, shards, normal, settings.batch_size, settings.seed, skip=done)
    saved = time.monotonic()
    for step in range(done, settings.steps):
        output = trainer.step(next(batches))
        trainer.n_training_steps += 1
        if not bool(torch.isfinite(output.loss)):
            raise SolveError(
                f"training of {hook_name} diverged at step {step}; lower the learning rate {settings.lr}"
            )
        last = step + 1 == settings.steps
        if last or time.monotonic() - saved > save_every_s:
            _save(trainer, state, key)
            saved = time.monotonic()
        if progress is not None and (last or (step + 1) % 20 == 0):
            progress(f"train {hook_name}", step + 1, settings.steps)


def _save(trainer: Any, state: Path, key: str) -> None:
    """Weights, Adam's moments and counters; the JSON names the tensors' digest, so the pair is whole or unused."""
    from safetensors.torch import save

    tensors = {f"sae.{name}": value for name, value in trainer.sae.state_dict().items()}
    for name, parameter in trainer.sae.named_parameters():
        for moment, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{name}.{moment}"] = value
    tensors["since_fired"] = trainer.n_forward_passes_since_fired
    tensors["fired"] = trainer.act_freq_scores
    data = save({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()})
    counters = {
        "key": key,
        "digest": digest_of_bytes(data),
        "steps": trainer.n_training_steps,
        "samples": trainer.n_training_samples,
        "active": trainer.n_frac_active_samples,
        "scheduler": _plain_scheduler(trainer.lr_scheduler.state_dict()),
    }
    write_atomically(state / "state.safetensors", data)
    write_atomically(state / "state.json", json.dumps(counters).encode())


def _restore(trainer: Any, state: Path, key: str) -> None:
    """Go on from a checkpoint of the same job; a checkpoint of another job, or a torn one, is ignored."""
    from safetensors.torch import load

    if not (state / "state.json").exists() or not (state / "state.safetensors").exists():
        return
    counters = json.loads((state / "state.json").read_text())
    data = (state / "state.safetensors").read_bytes()
    if counters["key"] != key or digest_of_bytes(data) != counters["digest"]:
        return
    tensors = load(data)
    trainer.sae.load_state_dict(
        {name[4:]: value for name, value in tensors.items() if name.startswith("sae.")}
    )
    for name, parameter in trainer.sae.named_parameters():
        prefix = f"adam.{name}."
        moments = {full[len(prefix) :]: value for full, value in tensors.items() if full.startswith(prefix)}
        if moments:
            trainer.optimizer.state[parameter] = moments
    trainer.n_forward_passes_since_fired.copy_(tensors["since_fired"])
    trainer.act_freq_scores.copy_(tensors["fired"])
    trainer.n_training_steps, trainer.n_training_samples = counters["steps"], counters["samples"]
    trainer.n_frac_active_samples = counters["active"]
    _restore_scheduler(trainer, counters["scheduler"])


def _plain_scheduler(state: dict[str, Any]) -> dict[str, Any]:
    """The JSON part of a scheduler's state, sub-schedulers included."""
    plain: dict[str, Any] = {}
    for name, value in state.items():
        if name == "_schedulers":
            plain[name] = [_plain_scheduler(part) for part in value]
        elif isinstance(value, int | float | str | bool | list) and name != "lr_lambdas":
            plain[name] = value
    return plain


def _restore_scheduler(trainer: Any, state: dict[str, Any]) -> None:
    current = trainer.lr_scheduler.state_dict()
    trainer.lr_scheduler.load_state_dict(_merged(current, state))
    for group, lr in zip(trainer.optimizer.param_groups, state["_last_lr"], strict=True):
        group["lr"] = lr


def _merged(current: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    merged = {**current, **{name: value for name, value in saved.items() if name != "_schedulers"}}
    if "_schedulers" in saved:
        pairs = zip(current["_schedulers"], saved["_schedulers"], strict=True)
        merged["_schedulers"] = [_merged(mine, theirs) for mine, theirs in pairs]
    return merged


@torch.no_grad()
def _fold(sae: Any, normal: Normalisation) -> Weights:
    """Weights on raw inputs with decoder rows of norm 1; what fires and what is reconstructed stay the same.

    SAELens' TopK scales latents by n_f = |d_f| and decodes with d_f/n_f. With x' = (x - m)/s every latent becomes s
    times as large: W_enc -> n_f w_f (its input is s times as large), b_enc -> s n_f b_f, W_dec -> d_f/n_f,
    b_dec -> s b_dec + m.
    """
    if sae.cfg.normalize_activations != "none" or not sae.cfg.apply_b_dec_to_input:
        raise IntegrityError("the training configuration changed under the fold; this is a bug in guardedit")
    norms = sae.W_dec.norm(dim=-1).clamp(min=1e-12)
    return Weights(
        W_enc=(sae.W_enc * norms).detach().clone(),
        b_enc=(sae.b_enc * norms * normal.scale).detach().clone(),
        W_dec=(sae.W_dec / norms[:, None]).detach().clone(),
        b_dec=(sae.b_dec * normal.scale + normal.mean).detach().clone(),
    )
