"""The reference's far side on disk: it is the same for every edit of a layer, so it is computed once a version."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from guardedit.models.handle import ModelHandle, tensor_digest
from guardedit.records import digest_of

KEPT_FILES = 6
"""Far sides kept on disk; the oldest go first. One default-size file is about 90 MB for the default model."""


@dataclass(frozen=True)
class Recorded:
    """One batch through one model, float32."""

    resid: Float[Tensor, "batch seq d_model"]
    """Input of the lowest edited layer."""
    final: Float[Tensor, "positions d_model"]
    """After the final norm, where the next token is compared: all real positions (far) or each row's last (prompts)."""
    acts: dict[str, Float[Tensor, "batch seq d"]]
    """Activations by hook name."""


def numeric_environment(handle: ModelHandle) -> str:
    """What the last bits of a forward pass depend on besides weights and tokens; part of the cache's name."""
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {handle.dtype}, {handle.device.type}"
    )


def far_path(
    folder: Path, model_digest: str, layer: int, hooks: Sequence[str], rows_digest: str, environment: str
) -> Path:
    """File named by all that a far side depends on."""
    recipe: dict[str, Any] = {
        "format": 1,
        "model": model_digest,
        "layer": layer,
        "hooks": list(hooks),
        "far": rows_digest,
        "environment": environment,
    }
    return folder / f"{digest_of(recipe).removeprefix('sha256:')[:32]}.safetensors"


def save(path: Path, recorded: Sequence[Recorded]) -> bool:
    """Keep a far side; False where it cannot be written (no space left, say): a cache is no reason to stop."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(temporary, recorded)
        os.replace(temporary, path)
        _flush(path.parent)
        _prune(path)
    except (OSError, SafetensorError):
        with suppress(OSError):
            temporary.unlink()
        return False
    return True


def _write(path: Path, recorded: Sequence[Recorded]) -> None:
    tensors: dict[str, Tensor] = {}
    for index, side in enumerate(recorded):
        named = {"resid": side.resid, "final": side.final, **side.acts}
        tensors |= {f"{index}|{name}": tensor.contiguous().cpu() for name, tensor in named.items()}
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"digests": json.dumps(digests)})
    _flush(path)


def _prune(path: Path) -> None:
    """Drop the oldest files beyond KEPT_FILES, never the one just written."""
    files = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    for old in [file for file in files if file != path][KEPT_FILES - 1 :]:
        old.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: Path, n_batches: int, hooks: Sequence[str]) -> list[Recorded] | None:
    """The cached far side, or None where there is none or its bytes are not those that were written."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            digests = json.loads(file.metadata()["digests"])
            # Copies: a tensor inside the mapped file may be unaligned, and alignment can change a kernel's last bits.
            tensors = {name: file.get_tensor(name).clone() for name in digests}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    if any(tensor_digest(tensor) != digests[name] for name, tensor in tensors.items()):
        return None
    expected = {f"{index}|{name}" for index in range(n_batches) for name in ("resid", "final", *hooks)}
    if set(tensors) != expected:
        return None
    os.utime(path)
    return [
        Recorded(
            tensors[f"{index}|resid"],
            tensors[f"{index}|final"],
            {name: tensors[f"{index}|{name}"] for name in hooks},
        )
        for index in range(n_batches)
    ]
