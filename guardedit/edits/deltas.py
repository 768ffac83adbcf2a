"""Deltas: save them, rehearse them, write them, take them back.

Weights are `(d_out, d_in)` here, whatever the model's own layout. Activation edits are installed and taken out where
updates are written and taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from guardedit.edits.activation_notes import note_of
from guardedit.edits.activations import ActivationChange, check_fit, installed
from guardedit.edits.images import image_of_bytes, raw_bytes, restore, saved
from guardedit.edits.updates import Change, Dense, EditDelta, LowRank, Update, WeightChange
from guardedit.errors import BadRequestError, IntegrityError, SolveError
from guardedit.models.handle import ModelHandle, tensor_digest
from guardedit.models.hooks import key_hook, patch, rewrite_hook
from guardedit.records import ABSENT, DeltaRecord, TensorChange, digest_of_bytes

__all__ = [
    "ActivationChange", "Dense", "EditDelta", "LowRank", "Update", "WeightChange", "change_of", "decode", "encode",
    "post_images", "raw_bytes", "record_of", "rehearsed", "restore", "saved", "written",
]  # fmt: skip


_ACTIVATION = "activation"


def change_of(handle: ModelHandle, parameter: str, update: Update) -> WeightChange:
    """An update of any parameter, with its place in the model."""
    layer = handle.layer_of(parameter)
    rewrites = layer is not None and parameter == handle.rewrite_parameter(layer)
    return WeightChange(parameter, layer, update, rewrites)


def post_images(handle: ModelHandle, delta: EditDelta) -> dict[str, Tensor]:
    """Each touched parameter as it will be: W + ΔW in float64, cast last, in the model's own layout.

    An activation edit's image is its bytes. Raises SolveError if an entry is not finite or an activation edit is in
    force already, BadRequestError if the delta was solved for another model.
    """
    _require_fit(handle, delta)
    return {change.parameter: _post_image(handle, change) for change in delta.changes}


def _post_image(handle: ModelHandle, change: Change) -> Tensor:
    if isinstance(change, ActivationChange):
        if change.parameter in installed(handle):
            raise SolveError(f"{change.parameter} is in force in {handle.name} already; nothing would change")
        return image_of_bytes(change.data)
    weight = handle.oriented(change.parameter).detach()
    cast = (weight.double() + change.update.dense().to(weight.device)).to(weight.dtype)
    if not torch.isfinite(cast).all():
        raise SolveError(
            f"the update of {change.parameter} is not finite in {cast.dtype}; nothing was written"
        )
    return (cast.T if handle.is_transposed(change.parameter) else cast).contiguous()


def _require_fit(handle: ModelHandle, delta: EditDelta) -> None:
    """Raise BadRequestError unless every change names a parameter of the model, its place and its shape."""
    # A tied parameter has a second name, which the model does not list: under it, it could be written twice.
    listed = {name for name, _ in handle.model.named_parameters()}
    for change in delta.changes:
        if isinstance(change, ActivationChange):
            check_fit(handle, change)
            continue
        name, shape = change.parameter, None
        if change.rewrites and change.layer is not None:
            name = handle.rewrite_parameter(change.layer)
        if name in listed:
            shape = tuple(handle.oriented(name).shape)
        # A tensor of another shape might still broadcast, and another model's layer has another name.
        if shape is None or change.update.shape != shape or not _same_place(handle, name, change):
            raise BadRequestError(
                f"the delta changes {change.parameter} (layer {change.layer}) by {change.update.shape}, but "
                f"{handle.name} has {f'{name} {shape} there' if shape else 'no parameter of that name'}: it was "
                "solved for another model"
            )


def _same_place(handle: ModelHandle, name: str, change: WeightChange) -> bool:
    real = change_of(handle, name, change.update)
    return (real.parameter, real.layer, real.rewrites) == (change.parameter, change.layer, change.rewrites)


def encode(delta: EditDelta) -> bytes:
    """The updates' tensors as the bytes of a safetensors file; equal deltas give equal bytes.

    Their names are `parameter|place|factor`; the place is a rewrite module's layer ("5"), the block of another
    parameter ("block 5"), or "outside" the blocks. An activation edit is one tensor, `parameter|activation|bytes`.
    """
    tensors: dict[str, Tensor] = {}
    for change in delta.changes:
        if isinstance(change, ActivationChange):
            tensors[f"{change.parameter}|{_ACTIVATION}|bytes"] = image_of_bytes(change.data)
            continue
        for name, tensor in change.update.tensors().items():
            tensors[f"{change.parameter}|{_place(change)}|{name}"] = tensor.contiguous()
    return save_bytes(tensors)


def _place(change: WeightChange) -> str:
    if change.layer is None:
        return "outside"
    return str(change.layer) if change.rewrites else f"block {change.layer}"


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


def _changes(tensors: dict[str, Tensor]) -> tuple[Change, ...]:
    factors: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parameter, place, name = key.split("|")
        factors.setdefault((parameter, place), {})[name] = tensor
    changes = [_change(parameter, place, named) for (parameter, place), named in factors.items()]
    # By number, those outside the blocks first: as text, layer 10 would stand before layer 9.
    return tuple(sorted(changes, key=lambda c: (-1 if c.layer is None else c.layer, c.parameter)))


def _change(parameter: str, place: str, named: dict[str, Tensor]) -> Change:
    if place == _ACTIVATION:
        change = ActivationChange.from_bytes(raw_bytes(named.pop("bytes")))
        if named or change.parameter != parameter:
            raise ValueError(f"the bytes of {parameter} are those of {change.parameter}")
        return change
    update = _update(named)
    if place == "outside":
        return WeightChange(parameter, None, update, rewrites=False)
    rewrites = not place.startswith("block ")
    if rewrites and len(update.shape) != 2:
        raise ValueError(f"the update of {parameter} is no matrix")
    return WeightChange(parameter, int(place.removeprefix("block ")), update, rewrites)


def _update(named: dict[str, Tensor]) -> Update:
    if named.keys() == {"matrix"} and named["matrix"].ndim:
        return Dense(named["matrix"])
    left, right = named["left"], named["right"]
    if len(named) != 2 or left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"{sorted(named)} are not the factors of one matrix")
    return LowRank(left, right)


def record_of(
    handle: ModelHandle, delta: EditDelta, *, model_digest: str, statistics_digests: dict[str, str]
) -> DeltaRecord:
    """The torch-free description of a delta, with each tensor's digest before and after."""
    _require_fit(handle, delta)
    return DeltaRecord(
        editor=delta.editor,
        # One image at a time: all of them would be a second model.
        changes=tuple(_change_record(handle, c, _post_image(handle, c)) for c in delta.changes),
        file_digest=digest_of_bytes(encode(delta)),
        hparams=delta.hparams,
        model_digest=model_digest,
        statistics_digests=statistics_digests,
        diagnostics=delta.diagnostics,
    )


def _change_record(handle: ModelHandle, change: Change, image: Tensor) -> TensorChange:
    if isinstance(change, ActivationChange):
        return _activation_record(handle, change, image)
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


def _activation_record(handle: ModelHandle, change: ActivationChange, image: Tensor) -> TensorChange:
    rewritten = handle.weight(change.layer).detach().double().norm() if change.moves else 0.0
    return TensorChange(
        parameter=change.parameter,
        layer=change.layer,
        shape=tuple(image.shape),
        dtype=_ACTIVATION,
        rank=change.rank,
        delta_norm=change.delta_norm,
        weight_norm=float(rewritten),
        digest_before=ABSENT,
        digest_after=tensor_digest(image),
        acts=note_of(change),
    )


@contextmanager
def written(handle: ModelHandle, delta: EditDelta) -> Iterator[ModelHandle]:
    """The model with the edit in its weights; on leaving, also by an exception, the old bytes are back."""
    images = post_images(handle, delta)
    kept = saved(handle, images)
    try:
        restore(handle, images)
        images.clear()
        yield handle
    finally:
        restore(handle, kept)


@contextmanager
def rehearsed(handle: ModelHandle, delta: EditDelta) -> Iterator[ModelHandle]:
    """The model as if edited: each rewrite module adds ΔW x to its output; no weight is written.

    A delta that touches anything else is `written` for the time being: the bytes are back afterwards all the same.
    Activation edits are installed for the time being.
    Raises BadRequestError if the delta was solved for another model.
    """
    with ExitStack() as stack:
        if delta.touches_only_rewrite_modules:
            _add_hooks(handle, delta, stack)
        else:
            stack.enter_context(written(handle, delta))
        yield handle


def _add_hooks(handle: ModelHandle, delta: EditDelta, stack: ExitStack) -> None:
    _require_fit(handle, delta)
    for layer in delta.layers:
        seen: list[Tensor] = []
        stack.enter_context(patch(handle, key_hook(layer), _keep(seen)))
        stack.enter_context(patch(handle, rewrite_hook(layer), _add(seen, delta.update(layer))))


def _keep(seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def keep(key: Tensor) -> Tensor:
        seen[:] = [key]
        return key

    return keep


def _add(seen: list[Tensor], update: Update) -> Callable[[Tensor], Tensor]:
    return lambda output: output + update.move(seen[0])
