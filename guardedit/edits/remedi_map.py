"""REMEDI's map: from a subject's and an object's representation to the direction that joins them, and its file.

A folder holds `map.safetensors` (weight and bias in 16 bit) and `card.json` (how it was made, how good it is on facts
that it was not trained on). The card names the digest of the tensors and seals itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save as to_bytes
from torch import Tensor

from guardedit.edits.representations import Representations
from guardedit.edits.sealed_pairs import CARD, SealedCard, read_pair, write_pair
from guardedit.errors import IntegrityError, StatisticsMismatchError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import HookPoint
from guardedit.records import Digest, Record, digest_of

TENSORS = "map.safetensors"
MAP_FILES = (CARD, TENSORS)


class Share(Record):
    """A share of held-out facts with its 95 % bootstrap interval over them."""

    value: float
    low: float
    high: float
    n: int


class MapCard(SealedCard):
    """How a map was made, and how good it is; held-out figures are of facts about subjects it never saw."""

    hook_name: str
    model_name: str
    model_digest: Digest
    """Of the whole model: the map was trained through all of it."""
    d_model: int
    data_name: str
    data_digest: Digest
    """Over the training and held-out facts, in their order."""
    n_train: int
    n_held_out: int
    seed: int
    settings: dict[str, float | int | str | bool]
    epochs: int
    """That were run."""
    best_epoch: int
    """Whose map this is: the one of the lowest held-out loss."""
    held_out_loss: tuple[float, ...]
    """Before training and after each epoch, the weighed sum in nats."""
    efficacy: Share
    paraphrase: Share | None
    """None where no held-out fact has a paraphrase that names its subject."""
    p_new: Share
    kept_kl_nats: Share | None = None
    """KL(before ‖ after) a token between the subject and the prompt's end; None where there is no such token."""
    resamples: int
    created_with: dict[str, str]


@dataclass(frozen=True, eq=False)
class RemediMap:
    """direction = weight·[entity; attribute] + bias, float32."""

    weight: Float[Tensor, "d_model two_d_model"]
    bias: Float[Tensor, " d_model"]
    card: MapCard
    digest: str
    """Of the card, which names that of the tensors."""

    @property
    def hook_name(self) -> str:
        """Where representations are read and the direction is added."""
        return self.card.hook_name

    @property
    def layer(self) -> int:
        """The hook's layer."""
        return HookPoint.parse(self.hook_name, 1_000_000).layer

    def directions(self, found: Representations) -> Float[Tensor, "n d_model"]:
        """A direction for every row."""
        both = found.together()
        return both @ self.weight.to(both.device).T + self.bias.to(both.device)

    def check(self, handle: ModelHandle, manifest: Mapping[str, str] | None = None) -> None:
        """Raise StatisticsMismatchError unless it was trained on these weights, or on those of `manifest`."""
        found = handle.digest() if manifest is None else digest_of(dict(manifest))
        if self.card.model_digest != found or self.card.d_model != handle.d_model:
            raise StatisticsMismatchError(
                f"the REMEDI map of {self.hook_name} was trained on {self.card.model_name} with the weights "
                f"{self.card.model_digest}, {handle.name} has {found}; train one for these weights with "
                "`guardedit remedi train`"
            )


def halved(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they will be read back: rounded to 16 bit, so that figures are those of the file.

    Raises IntegrityError for an entry that 16 bit cannot hold.
    """
    small = weight.detach().cpu().half(), bias.detach().cpu().half()
    if not all(bool(torch.isfinite(part).all()) for part in small):
        raise IntegrityError(
            "the trained map does not fit 16 bit, nothing was written; lower the learning rate"
        )
    return small[0].float(), small[1].float()


def tensor_bytes(weight: Tensor, bias: Tensor) -> bytes:
    """The bytes of `map.safetensors`."""
    return to_bytes({"bias": bias.half().contiguous(), "weight": weight.half().contiguous()})


def save_map(folder: Path, weight: Tensor, bias: Tensor, card: MapCard) -> RemediMap:
    """Write both files and return what `load_map` gives."""
    write_pair(folder, TENSORS, tensor_bytes(weight, bias), card)
    return load_map(folder)


def load_map(folder: Path) -> RemediMap:
    """Read a map.

    Raises MissingStatisticsError where there is none, IntegrityError where a byte was changed.
    """
    tensors, card = read_pair(folder, TENSORS, MapCard, "train a map with `guardedit remedi train FACTS`")
    if tensors.keys() != {"weight", "bias"}:
        raise IntegrityError(f"{folder / TENSORS} holds {sorted(tensors)}, not weight and bias")
    return RemediMap(tensors["weight"].float(), tensors["bias"].float(), card, digest_of(card))
