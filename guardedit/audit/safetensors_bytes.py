"""Raw bytes of single tensors inside safetensors files, without numpy or torch.

Format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, data_offsets), then the data; offsets
count from the end of the header. https://huggingface.co/docs/safetensors (format section).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardedit.errors import BadModelError, MissingModelError

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes an element; a dtype that is not here is refused."""
MAX_HEADER = 100_000_000
"""The limit that safetensors itself sets, in bytes."""
OLDER_NAMES = {"lm_head.weight": "embed_out.weight"}
"""Parameter -> its name in files, where transformers renames it in loading and back in saving (GPT-NeoX)."""
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class TensorSpan:
    """Where one tensor's bytes lie."""

    name: str
    """As the file spells it."""
    file: Path
    dtype: str
    """safetensors' word, e.g. "F32"."""
    shape: tuple[int, ...]
    start: int
    """Offset from the start of the file, in bytes."""
    n_bytes: int


def read_header(file: Path) -> dict[str, TensorSpan]:
    """All tensors of one file. BadModelError when the header does not describe the file that is there."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise BadModelError(f"{file.name} is not safetensors: a header of {length} bytes cannot be")
            raw = json.loads(stream.read(length))
    except OSError as error:
        raise MissingModelError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadModelError(f"{file.name} is not safetensors: its header is not JSON") from error
    if not isinstance(raw, dict):
        raise BadModelError(f"{file.name} is not safetensors: its header is not a table")
    return {
        name: _span(name, info, file, 8 + length, size)
        for name, info in raw.items()
        if name != "__metadata__"
    }


def _span(name: str, info: Any, file: Path, base: int, size: int) -> TensorSpan:
    try:
        dtype, shape = str(info["dtype"]), tuple(int(n) for n in info["shape"])
        start, end = (int(n) for n in info["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadModelError(f"{file.name}: the entry of {name} cannot be read") from error
    if dtype not in ITEM_BYTES:
        raise BadModelError(f"{file.name}: {name} has dtype {dtype}; known are {', '.join(ITEM_BYTES)}")
    fits = 0 <= start <= end and base + end <= size
    if not fits or min(shape, default=0) < 0 or end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise BadModelError(f"{file.name}: {name} does not lie where the header says")
    return TensorSpan(name, file, dtype, shape, base + start, end - start)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a Hugging Face folder: one, or those that the index names."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    if not index.is_file():
        raise MissingModelError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; guardedit needs safetensors weights"
        )
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadModelError(f"{index.name} cannot be read") from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise BadModelError(
                f"{index.name} names the shard {shard!r}; a plain *.safetensors name is allowed"
            )
    return tuple(folder / shard for shard in shards)


def read_folder(folder: Path) -> dict[str, TensorSpan]:
    """All tensors of a Hugging Face folder, by the name in its files."""
    spans: dict[str, TensorSpan] = {}
    for file in weight_files(folder):
        for name, span in read_header(file).items():
            if name in spans:
                raise BadModelError(f"{name} occurs in {spans[name].file.name} and in {file.name}")
            spans[name] = span
    return spans


def locate(parameter: str, spans: dict[str, TensorSpan]) -> TensorSpan:
    """The span of a model's parameter.

    Files may leave out the base model's prefix ("transformer.h.0…" as "h.0…") or keep an older name of the unembedding.
    """
    for name in (parameter, parameter.partition(".")[2], OLDER_NAMES.get(parameter, "")):
        if name in spans:
            return spans[name]
    raise BadModelError(f"parameter {parameter} is in no safetensors file of the base model")


def read_span(span: TensorSpan) -> bytes:
    """The tensor's raw little-endian bytes."""
    try:
        with span.file.open("rb") as stream:
            stream.seek(span.start)
            data = stream.read(span.n_bytes)
    except OSError as error:
        raise MissingModelError(f"{span.file} cannot be read: {error.strerror}") from error
    if len(data) != span.n_bytes:
        raise BadModelError(f"{span.file.name} ends inside {span.name}")
    return data


def digest_span(span: TensorSpan) -> str:
    """`sha256:…` of the tensor's bytes, read in pieces."""
    hasher = hashlib.sha256()
    left = span.n_bytes
    try:
        with span.file.open("rb") as stream:
            stream.seek(span.start)
            while left:
                piece = stream.read(min(_CHUNK, left))
                if not piece:
                    raise BadModelError(f"{span.file.name} ends inside {span.name}")
                hasher.update(piece)
                left -= len(piece)
    except OSError as error:
        raise MissingModelError(f"{span.file} cannot be read: {error.strerror}") from error
    return "sha256:" + hasher.hexdigest()
