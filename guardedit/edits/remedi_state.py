"""A map while it is trained: scaled parameters, optimiser, the best so far; and the checkpoint of all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from guardedit.edits.representations import Representations
from guardedit.records import digest_of_bytes
from guardedit.saes.files import write_atomically

_FLOOR = 1e-6
"""Of a spread: an entry that never varies is divided by this instead of 0."""


@dataclass(frozen=True, eq=False)
class Scaling:
    """direction = start·(attribute − mean attribute) + size·(weight·z + bias), z the inputs standardised."""

    mean: Float[Tensor, " two_d_model"]
    spread: Float[Tensor, " two_d_model"]
    size: float
    """Of one entry of an entity's deviation from the mean entity."""
    start: float

    @classmethod
    def of(cls, found: Representations, start: float) -> Scaling:
        """From the training facts; a single fact has no spread and is taken as it is."""
        both, entity = found.together(), found.entity
        spread = both.std(0, correction=0) + _FLOOR
        size = (entity - entity.mean(0)).norm(dim=1).median() / math.sqrt(entity.shape[1])
        return cls(both.mean(0), spread, float(size) or 1.0, start)

    def directions(self, found: Representations, weight: Tensor, bias: Tensor) -> Float[Tensor, "n d_model"]:
        """A direction for every row; gradients reach weight and bias."""
        z = (found.together() - self.mean) / self.spread
        first = self.start * (found.attribute - self.mean[found.entity.shape[1] :])
        return first + self.size * (z @ weight.T + bias)

    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The same map on raw representations, as weight (d_model, 2·d_model) and bias; computed in float64."""
        d_model = len(bias)
        mean, scaled = self.mean.double(), self.size * weight.detach().double() / self.spread.double()
        moved = self.size * bias.detach().double() - scaled @ mean - self.start * mean[d_model:]
        scaled[:, d_model:] += self.start * torch.eye(d_model, dtype=torch.float64, device=scaled.device)
        return scaled.float(), moved.float()


@dataclass(frozen=True)
class Progress:
    """How far a training is."""

    epoch: int = 0
    """Whole epochs behind it."""
    step: int = 0
    """Steps of the epoch that is under way."""
    best_epoch: int = 0
    losses: tuple[float, ...] = ()
    """Held-out, before training and after each epoch."""


@dataclass(eq=False)
class Run:
    """What changes while a map is trained."""

    weight: Tensor
    bias: Tensor
    adam: torch.optim.AdamW
    best: tuple[Tensor, Tensor]
    """Copies: the published code keeps names of the live weights, and so returns the last map and not the best."""
    progress: Progress

    @classmethod
    def start(cls, scaling: Scaling, learning_rate: float, weight_decay: float) -> Run:
        """An untrained map: what is learned is zero."""
        d_model = len(scaling.mean) // 2
        device = scaling.mean.device
        weight = torch.zeros(d_model, 2 * d_model, device=device, requires_grad=True)
        bias = torch.zeros(d_model, device=device, requires_grad=True)
        adam = torch.optim.AdamW([weight, bias], lr=learning_rate, weight_decay=weight_decay)
        return cls(weight, bias, adam, _copies(weight, bias), Progress())

    def close_epoch(self, loss: float) -> None:
        """Put down the held-out loss, and keep a copy of the map where it is the lowest so far."""
        now = self.progress
        better = not now.losses or loss < min(now.losses)
        if better:
            self.best = _copies(self.weight, self.bias)
        best_epoch = now.epoch if better else now.best_epoch
        self.progress = replace(now, losses=(*now.losses, loss), best_epoch=best_epoch)


def best_of(run: Run, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """The best map so far, on raw representations."""
    return scaling.folded(*run.best)


def _copies(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return weight.detach().clone(), bias.detach().clone()


def save_run(run: Run, state: Path, key: str) -> None:
    """Write a checkpoint; the JSON names the digest of the tensors, so the pair is whole or unused."""
    tensors = {
        "weight": run.weight,
        "bias": run.bias,
        "best.weight": run.best[0],
        "best.bias": run.best[1],
    }
    for name, parameter in (("weight", run.weight), ("bias", run.bias)):
        moments: dict[str, Tensor] = run.adam.state.get(parameter, {})
        tensors |= {f"adam.{name}.{moment}": value for moment, value in moments.items()}
    data = to_bytes({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()})
    plain = {"key": key, "digest": digest_of_bytes(data), "progress": asdict(run.progress)}
    write_atomically(state / "run.safetensors", data)
    write_atomically(state / "run.json", json.dumps(plain).encode())


def restore_run(run: Run, state: Path | None, key: str) -> None:
    """Go on from a checkpoint of the same training; another training's, or a torn one, is not used."""
    if state is None or not (state / "run.json").is_file() or not (state / "run.safetensors").is_file():
        return
    plain: dict[str, Any] = json.loads((state / "run.json").read_bytes())
    data = (state / "run.safetensors").read_bytes()
    if plain["key"] != key or plain["digest"] != digest_of_bytes(data):
        return
    tensors = {name: value.to(run.weight.device) for name, value in from_bytes(data).items()}
    with torch.no_grad():
        run.weight.copy_(tensors["weight"])
        run.bias.copy_(tensors["bias"])
    run.best = tensors["best.weight"], tensors["best.bias"]
    for name, parameter in (("weight", run.weight), ("bias", run.bias)):
        prefix = f"adam.{name}."
        moments = {full[len(prefix) :]: value for full, value in tensors.items() if full.startswith(prefix)}
        if moments:
            run.adam.state[parameter] = {**moments, "step": moments["step"].cpu()}
    run.progress = _progress(plain["progress"])


def _progress(plain: dict[str, Any]) -> Progress:
    losses: Sequence[float] = plain.pop("losses")
    return Progress(**plain, losses=tuple(losses))
