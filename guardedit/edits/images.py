"""What a model holds under each name of its manifest, as tensors: kept, compared, put back.

A parameter's image is the parameter. An activation edit's is its bytes (uint8), and none of them where it is not
installed. The only place that writes a Parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from guardedit.edits.activations import ActivationChange, check_fit, install, installed, uninstall
from guardedit.errors import BadRequestError, IntegrityError
from guardedit.models.handle import ModelHandle
from guardedit.records import is_activation


def raw_bytes(tensor: Tensor) -> bytes:
    """The tensor's entries as little-endian bytes in row order, as they stand in a safetensors file."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def saved(handle: ModelHandle, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of what the model holds under the names now; `restore` puts them back."""
    edits = installed(handle)
    return {name: _held(handle, name, edits) for name in names}


def _held(handle: ModelHandle, name: str, edits: Mapping[str, ActivationChange]) -> Tensor:
    if is_activation(name):
        return image_of_bytes(edits[name].data if name in edits else b"")
    parameter: Tensor = handle.model.get_parameter(name)
    return parameter.detach().clone()


def image_of_bytes(data: bytes) -> Tensor:
    """Bytes of an activation edit as an image; no bytes mean that there is none."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def restore(handle: ModelHandle, images: Mapping[str, Tensor]) -> None:
    """Put images into the model: bytes into parameters, in place; activation edits installed, or taken out.

    Raises IntegrityError, before anything is written, where name, shape or dtype are not the model's (`copy_` would
    broadcast and cast), or where the bytes are not those of the activation edit of that name.
    """
    stored = {n: _stored(handle, n, image) for n, image in images.items() if not is_activation(n)}
    edits = {n: _edit(handle, n, image) for n, image in images.items() if is_activation(n)}
    with torch.no_grad():
        for name, parameter in stored.items():
            parameter.copy_(images[name])
    for name, edit in edits.items():
        there = name in installed(handle)
        if there and edit is None:
            uninstall(handle, name)
        elif not there and edit is not None:
            install(handle, edit)


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


def _edit(handle: ModelHandle, name: str, image: Tensor) -> ActivationChange | None:
    """The activation edit of an image, or None for an empty one."""
    if image.dtype != torch.uint8 or image.ndim != 1:
        raise IntegrityError(
            f"stored bytes of {name} are {image.dtype} {list(image.shape)}, not bytes in a row"
        )
    if not image.numel():
        return None
    change = ActivationChange.from_bytes(raw_bytes(image))
    if change.parameter != name:
        raise IntegrityError(f"the bytes stored as {name} are those of {change.parameter}")
    try:
        check_fit(handle, change)
    except BadRequestError as error:
        raise IntegrityError(f"{name} cannot be put in force: {error}") from error
    return change
