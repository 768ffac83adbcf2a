"""One home with its live model. The order of the steps lies in planning and applying."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version

import torch
from torch import Tensor

from guardedit.config import Settings
from guardedit.edits.deltas import EditDelta, decode, restore, saved
from guardedit.errors import IntegrityError, StaleError
from guardedit.models.handle import ModelHandle
from guardedit.models.sources import load
from guardedit.pipeline.history import History, Progress
from guardedit.pipeline.kit import MAPS, Kit, full_name, load_kit
from guardedit.records import Plan

__all__ = ["Progress", "Workspace", "tensor_from", "tensor_like", "versions"]

_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "U8": torch.uint8,
}  # fmt: skip
"""U8 are the bytes of an activation edit."""


class Workspace(History):
    """A guarded model and its record. Making one reads nothing; the model is loaded when it is first needed."""

    def __init__(self, settings: Settings | None = None, progress: Progress | None = None) -> None:
        super().__init__(settings, progress)
        self._at: str | None = None
        """Digest of the version that the loaded model was last brought to."""

    @cached_property
    def handle(self) -> ModelHandle:
        """The live model: the base's files with the bytes of committed edits on top, every digest compared."""
        self.progress(f"loading {self.settings.model}", 0.0)
        handle = load(full_name(self.settings.model), device_map=self.settings.device_map)
        if self.store.exists:
            base, digest = self.store.base(), handle.digest()
            if base.digest != digest:
                raise StaleError(
                    f"{self.home} guards {base.name} ({base.digest}), {self.settings.model} is {digest}; "
                    "use another --home"
                )
            restore(handle, {name: self.tensor(name) for name in self.store.live_overrides()})
            self._compare(handle)
        return handle

    @cached_property
    def kit(self) -> Kit:
        """Statistics, SAEs, maps, policy and banks of the model; the home's own maps come first."""
        base = self.store.base().manifest if self.store.exists else self.handle.manifest()
        return load_kit(self.handle, self.settings.policy, base, own_maps=self.home / MAPS)

    def tensor(self, parameter: str, edit_version: str | None = None) -> Tensor:
        """A stored tensor of the live version, or of a named one ("base", an edit's id); its digest is compared."""
        raw = self.store.read(parameter, edit_version)
        return tensor_from(raw.data, raw.dtype, raw.shape)

    def _compare(self, handle: ModelHandle) -> None:
        found, live = handle.digest(), self.store.digest()
        if found != live:
            raise IntegrityError(f"the loaded model is {found}, the live version is {live}")
        self._at = live

    def refresh(self) -> None:
        """Bring the loaded model, if it is loaded, to what is live on disk: here or elsewhere, somebody may have
        committed or undone an edit."""
        if "handle" not in vars(self) or not self.store.exists or self.store.digest() == self._at:
            return
        live = self.store.manifest()
        here = self.handle.manifest()
        stale = [name for name in here.keys() | live.keys() if live.get(name) != here.get(name)]
        restore(self.handle, {name: self.tensor(name) for name in stale})
        self._compare(self.handle)

    @contextmanager
    def staged(self, edit_id: str) -> Iterator[ModelHandle]:
        """The staged copy, read back from its bytes on disk; the live model's bytes are back afterwards."""
        version_ = self.store.staged(edit_id)
        spans = {t.parameter: t for t in version_.record.tensors}
        kept = saved(self.handle, spans)
        images = {
            name: tensor_like(kept[name], (version_.folder / "post" / f"{name}.bin").read_bytes())
            for name in spans
        }
        try:
            restore(self.handle, images)
            if self.handle.digest() != version_.digest:
                raise IntegrityError(f"the staged copy of {edit_id} is not {version_.digest}")
            yield self.handle
        finally:
            restore(self.handle, kept)

    def read_delta(self, plan: Plan) -> EditDelta:
        """A plan's solved update, its bytes compared with the digest in the plan."""
        return decode(self._bytes(self.plan_folder(plan.plan_id) / "delta.safetensors"), plan.delta)


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    named = {name: version(name) for name in ("guardedit", "torch", "transformers")}
    return {**named, "python": platform.python_version()}


def tensor_from(data: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of raw little-endian bytes; `dtype` is safetensors' word."""
    if dtype not in _DTYPES:
        raise IntegrityError(f"a stored tensor has the type {dtype!r}; known are {', '.join(_DTYPES)}")
    return _from_bytes(data, _DTYPES[dtype]).reshape(shape)


def tensor_like(tensor: Tensor, data: bytes) -> Tensor:
    """Raw bytes as a tensor of the same type and shape; those of an activation edit may be more than there were."""
    found = _from_bytes(data, tensor.dtype)
    return found if tensor.dtype == torch.uint8 else found.reshape(tensor.shape)


def _from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
