"""Solved updates as frozen values: measure them, save them, rehearse them, write them, take them back.

The only place that writes a Parameter. Weights are `(d_out, d_in)` here, whatever the model's own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from guardedit.errors import IntegrityError, SolveError
from guardedit.models.handle import ModelHandle, tensor_digest
from guardedit.models.hooks import key_hook, mlp_hook, patch
from guardedit.records import DeltaRecord, TensorChange, digest_of_bytes


@dataclass(frozen=True)
class LowRank:
    """ΔW = left @ right, float64."""

    left: Float[Tensor, "d_out rank"]
    right: Float[Tensor, "rank d_in"]

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """The update as one matrix."""
        return self.left @ self.right

    def move(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_out"]:
        """ΔW x for each key, in the dtype of x."""
        return (x @ self.right.T.to(x.dtype)) @ self.left.T.to(x.dtype)

    @property
    def rank(self) -> int | None:
        """Number of factors."""
        return self.left.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The factors by name."""
        return {"left": self.left, "right": self.right}


@dataclass(frozen=True)
class Dense:
    """ΔW as a full matrix, for editors that are not low-rank (fine-tuning)."""

    matrix: Float[Tensor, "d_out d_in"]

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """The update as one float64 matrix."""
        return self.matrix.double()

    def move(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_out"]:
        """ΔW x for each key, in the dtype of x."""
        return x @ self.matrix.T.to(x.dtype)

    @property
    def rank(self) -> int | None:
        """None: not known to be low-rank."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """The matrix by name."""
        return {"matrix": self.matrix}


Update = LowRank | Dense


@dataclass(frozen=True)
class WeightChange:
    """An update of one layer's rewrite module (the MLP's down projection)."""

    parameter: str
    layer: int
    update: Update


@dataclass(frozen=True)
class EditDelta:
    """A solved edit: updates of one or more layers, and how they were found."""

    changes: tuple[WeightChange, ...]
    editor: str
    hparams: dict[str, float | int | str | bool | None]
    diagnostics: dict[str, float | int | str | bool | None]

    @property
    def layers(self) -> tuple[int, ...]:
        """Edited layers, lowest first."""
        return tuple(sorted(change.layer for change in self.changes))

    def update(self, layer: int) -> Update:
        """The update of one layer; KeyError where there is none."""
        return {change.layer: change.update for change in self.changes}[layer]


def post_images(handle: ModelHandle, delta: EditDelta) -> dict[str, Tensor]:
    """Each touched parameter as it will be: W + ΔW in float64, cast last, in the model's own layout.

    Raises SolveError if an entry is not finite.
    """
    images = {}
    for change in delta.changes:
        edited = handle.weight(change.layer).detach().double() + change.update.dense()
        cast = edited.to(handle.weight(change.layer).dtype)
        if not torch.isfinite(cast).all():
            raise SolveError(
                f"the update of {change.parameter} is not finite in {cast.dtype}; nothing was written"
            )
        images[change.parameter] = (cast.T if handle.architecture.transposed else cast).contiguous()
    return images


def raw_bytes(tensor: Tensor) -> bytes:
    """The tensor's entries as little-endian bytes in row order, as they stand in a safetensors file."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def encode(delta: EditDelta) -> bytes:
    """The update's tensors as the bytes of a safetensors file; equal deltas give equal bytes."""
    tensors = {
        f"{change.parameter}|{change.layer}|{name}": tensor.contiguous()
        for change in delta.changes
        for name, tensor in change.update.tensors().items()
    }
    return save_bytes(tensors)


def decode(data: bytes, record: DeltaRecord) -> EditDelta:
    """The delta of a file's bytes; raises IntegrityError unless they hash to the record's digest."""
    if digest_of_bytes(data) != record.file_digest:
        raise IntegrityError(
            f"the delta file was changed: it hashes to {digest_of_bytes(data)}, the plan says {record.file_digest}"
        )
    factors: dict[tuple[str, int], dict[str, Tensor]] = {}
    for key, tensor in load_bytes(data).items():
        parameter, layer, name = key.split("|")
        factors.setdefault((parameter, int(layer)), {})[name] = tensor
    changes = tuple(
        WeightChange(parameter, layer, _update(named))
        for (parameter, layer), named in sorted(factors.items())
    )
    return EditDelta(changes, record.editor, dict(record.hparams), dict(record.diagnostics))


def _update(named: dict[str, Tensor]) -> Update:
    return Dense(named["matrix"]) if "matrix" in named else LowRank(named["left"], named["right"])


def record_of(
    handle: ModelHandle, delta: EditDelta, *, model_digest: str, statistics_digests: dict[str, str]
) -> DeltaRecord:
    """The torch-free description of a delta, with each tensor's digest before and after."""
    images = post_images(handle, delta)
    return DeltaRecord(
        editor=delta.editor,
        changes=tuple(_change_record(handle, change, images[change.parameter]) for change in delta.changes),
        file_digest=digest_of_bytes(encode(delta)),
        hparams=delta.hparams,
        model_digest=model_digest,
        statistics_digests=statistics_digests,
        diagnostics=delta.diagnostics,
    )


def _change_record(handle: ModelHandle, change: WeightChange, image: Tensor) -> TensorChange:
    stored = handle.model.get_parameter(change.parameter)
    return TensorChange(
        parameter=change.parameter,
        layer=change.layer,
        shape=tuple(stored.shape),
        dtype=str(stored.dtype).removeprefix("torch."),
        rank=change.update.rank,
        delta_norm=float(change.update.dense().norm()),
        weight_norm=float(stored.detach().double().norm()),
        digest_before=tensor_digest(stored),
        digest_after=tensor_digest(image),
    )


def restore(handle: ModelHandle, images: dict[str, Tensor]) -> None:
    """Put stored bytes into the model's parameters, in place; shapes and dtypes must agree."""
    with torch.no_grad():
        for name, image in images.items():
            handle.model.get_parameter(name).copy_(image)


@contextmanager
def written(handle: ModelHandle, delta: EditDelta) -> Iterator[ModelHandle]:
    """The model with the edit in its weights; on leaving, also by an exception, the old bytes are back."""
    images = post_images(handle, delta)
    saved = {name: handle.model.get_parameter(name).detach().clone() for name in images}
    restore(handle, images)
    try:
        yield handle
    finally:
        restore(handle, saved)


@contextmanager
def rehearsed(handle: ModelHandle, delta: EditDelta) -> Iterator[ModelHandle]:
    """The model as if edited: each rewrite module adds ΔW x to its output; no weight is written."""
    with ExitStack() as stack:
        for change in delta.changes:
            seen: list[Tensor] = []
            stack.enter_context(patch(handle, key_hook(change.layer), _keep(seen)))
            stack.enter_context(patch(handle, mlp_hook(change.layer), _add(seen, change.update)))
        yield handle


def _keep(seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def keep(key: Tensor) -> Tensor:
        seen[:] = [key]
        return key

    return keep


def _add(seen: list[Tensor], update: Update) -> Callable[[Tensor], Tensor]:
    return lambda output: output + update.move(seen[0])
