"""Deltas: save them, rehearse them, write them, take them back.

The only place that writes a Parameter. Weights are `(d_out, d_in)` here, whatever the model's own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from guardedit.edits.updates import Dense, EditDelta, LowRank, Update, WeightChange
from guardedit.errors import BadRequestError, IntegrityError, SolveError, UnknownArchitectureError
from guardedit.models.handle import ModelHandle, tensor_digest
from guardedit.models.hooks import key_hook, patch, rewrite_hook
from guardedit.records import DeltaRecord, TensorChange, digest_of_bytes

__all__ = [
    "Dense", "EditDelta", "LowRank", "Update", "WeightChange", "decode", "encode", "post_images", "raw_bytes",
    "record_of", "rehearsed", "require_linear", "restore", "written",
]  # fmt: skip


def post_images(handle: ModelHandle, delta: EditDelta) -> dict[str, Tensor]:
    """Each touched parameter as it will be: W + ΔW in float64, cast last, in the model's own layout.

    Raises SolveError if an entry is not finite, BadRequestError if the delta was solved for another model.
    """
    return {change.parameter: _post_image(handle, change) for change in delta.changes}


def _post_image(handle: ModelHandle, change: WeightChange) -> Tensor:
    _require_fit(handle, change)
    weight = handle.weight(change.layer).detach()
    cast = (weight.double() + change.update.dense().to(weight.device)).to(weight.dtype)
    if not torch.isfinite(cast).all():
        raise SolveError(
            f"the update of {change.parameter} is not finite in {cast.dtype}; nothing was written"
        )
    return (cast.T if handle.architecture.transposed else cast).contiguous()


def _require_fit(handle: ModelHandle, change: WeightChange) -> None:
    # A matrix of another shape might still broadcast, and another model's layer has another name.
    expected = handle.rewrite_parameter(change.layer), tuple(handle.weight(change.layer).shape)
    if (change.parameter, change.update.shape) != expected:
        raise BadRequestError(
            f"the delta changes {change.parameter} by a matrix {change.update.shape}, but layer {change.layer} of "
            f"{handle.name} has {expected[0]} {expected[1]}: it was solved for another model"
        )


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
    """The delta of a file's bytes, lowest layer first.

    Raises IntegrityError unless the bytes hash to the record's digest and are a delta.
    """
    if digest_of_bytes(data) != record.file_digest:
        raise IntegrityError(
            f"the delta file was changed: it hashes to {digest_of_bytes(data)}, the plan says {record.file_digest}"
        )
    try:
        changes = _changes(load_bytes(data))
        return EditDelta(changes, record.editor, dict(record.hparams), dict(record.diagnostics))
    except (SafetensorError, SolveError, ValueError, KeyError) as error:
        raise IntegrityError(f"the delta file is not one that `encode` wrote: {error}") from error


def _changes(tensors: dict[str, Tensor]) -> tuple[WeightChange, ...]:
    factors: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parameter, layer, name = key.split("|")
        factors.setdefault((int(layer), parameter), {})[name] = tensor
    return tuple(
        WeightChange(parameter, layer, _update(factors[layer, parameter]))
        for layer, parameter in sorted(factors)
    )


def _update(named: dict[str, Tensor]) -> Update:
    if named.keys() == {"matrix"} and named["matrix"].ndim == 2:
        return Dense(named["matrix"])
    left, right = named["left"], named["right"]
    if len(named) != 2 or left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"{sorted(named)} are not the factors of one matrix")
    return LowRank(left, right)


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
    """Put stored bytes into the model's parameters, in place.

    Raises IntegrityError, before anything is written, where name, shape or dtype are not the model's: `copy_` would
    broadcast and cast.
    """
    named = {name: _stored(handle, name, image) for name, image in images.items()}
    with torch.no_grad():
        for name, image in images.items():
            named[name].copy_(image)


def _stored(handle: ModelHandle, name: str, image: Tensor) -> Tensor:
    """The parameter that `image` is to replace."""
    try:
        stored: Tensor = handle.model.get_parameter(name)
    except AttributeError as error:
        raise IntegrityError(f"{handle.name} has no parameter {name}") from error
    if (image.shape, image.dtype) != (stored.shape, stored.dtype):
        raise IntegrityError(
            f"stored bytes of {name} are {image.dtype} {list(image.shape)}, "
            f"the model has {stored.dtype} {list(stored.shape)}"
        )
    return stored


@contextmanager
def written(handle: ModelHandle, delta: EditDelta) -> Iterator[ModelHandle]:
    """The model with the edit in its weights; on leaving, also by an exception, the old bytes are back."""
    images = post_images(handle, delta)
    saved = {name: handle.model.get_parameter(name).detach().clone() for name in images}
    try:
        restore(handle, images)
        yield handle
    finally:
        restore(handle, saved)


@contextmanager
def rehearsed(handle: ModelHandle, delta: EditDelta) -> Iterator[ModelHandle]:
    """The model as if edited: each rewrite module adds ΔW x to its output; no weight is written.

    Raises BadRequestError if the delta was solved for another model, UnknownArchitectureError as `require_linear`.
    """
    require_linear(handle)
    with ExitStack() as stack:
        for change in delta.changes:
            _require_fit(handle, change)
            seen: list[Tensor] = []
            stack.enter_context(patch(handle, key_hook(change.layer), _keep(seen)))
            stack.enter_context(patch(handle, rewrite_hook(change.layer), _add(seen, change.update)))
        yield handle


def _keep(seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def keep(key: Tensor) -> Tensor:
        seen[:] = [key]
        return key

    return keep


def _add(seen: list[Tensor], update: Update) -> Callable[[Tensor], Tensor]:
    return lambda output: output + update.move(seen[0])


def require_linear(handle: ModelHandle) -> None:
    """Raise UnknownArchitectureError where a norm stands between the rewrite module and the residual stream.

    There, what is added at the MLP's output is not what the rewrite module would have to add.
    """
    norm = handle.architecture.post_mlp_norm
    if norm is not None:
        raise UnknownArchitectureError(
            f"{handle.name} ({handle.architecture.name}) has {norm} behind its MLP: edits can be written and watched, "
            "but neither solved nor rehearsed"
        )
