"""Gates that were fitted once, in a folder: a plan of another fact in the same kind of context takes the same one, and
another kind of context is fitted to what was read of the same prompts.

A gate follows from the weights below its hook, the prompts that it is fitted to, the SAE and the settings: these are
its name, so a changed bank, model or SAE finds none and fits anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from guardedit.edits.activation_bytes import gate_from, gate_tensors
from guardedit.edits.activation_parts import Gate
from guardedit.edits.context_texts import Example
from guardedit.edits.gates import GateQuality, Pooled
from guardedit.errors import BadRequestError, IntegrityError
from guardedit.records import canonical, digest_of
from guardedit.saes.files import write_atomically

_FORMAT = 2


@dataclass(frozen=True, eq=False)
class Trained:
    """A gate, how good it is, and what it looks at."""

    gate: Gate
    quality: GateQuality
    looks_at: str
    """Latents in words, with their share of the difference that the gate sees."""


@dataclass(frozen=True)
class GateShelf:
    """One safetensors file a gate or reading; files of other models and settings may lie beside."""

    folder: Path

    def take(
        self, made: Sequence[Example], named: Mapping[str, object], fit: Callable[[], Trained]
    ) -> Trained:
        """The gate that is fitted to these examples under these settings; fitted and kept where it is not there.

        Raises IntegrityError for a file that cannot be read, and whatever `fit` raises.
        """
        about = {**named, "format": _FORMAT, "examples": digest_of([astuple(one) for one in made])}
        path = self.folder / f"{digest_of(about).split(':')[1]}.safetensors"
        if not path.is_file():
            found = fit()
            write_atomically(path, _encode(found))
        return _decode(path)

    def reading(
        self, texts: Sequence[str], named: Mapping[str, object], read: Callable[[], Pooled]
    ) -> Pooled:
        """What a model's activations were in these texts; read and kept where it is not there.

        Raises IntegrityError for a file that cannot be read, and whatever `read` raises.
        """
        about = {**named, "format": _FORMAT, "texts": digest_of(list(texts))}
        path = self.folder / f"read-{digest_of(about).split(':')[1]}.safetensors"
        if not path.is_file():
            found = read()
            tensors = {"acts": found.acts} | ({} if found.latents is None else {"latents": found.latents})
            write_atomically(path, save({name: one.cpu().contiguous() for name, one in tensors.items()}))
        try:
            kept = load(path.read_bytes())
            return Pooled(kept["acts"], kept.get("latents"))
        except (SafetensorError, OSError, KeyError) as error:
            raise IntegrityError(
                f"the activations {path} cannot be read ({error}); delete the file to read them again"
            ) from error


def _encode(found: Trained) -> bytes:
    about, tensors = gate_tensors(found.gate)
    text = canonical({"gate": about, "quality": asdict(found.quality), "looks_at": found.looks_at})
    return save({**tensors, "about": torch.frombuffer(bytearray(text), dtype=torch.uint8)})


def _decode(path: Path) -> Trained:
    try:
        tensors = load(path.read_bytes())
        about: dict[str, Any] = json.loads(tensors.pop("about").numpy().tobytes())
        gate = gate_from(about["gate"], tensors)
        return Trained(gate, GateQuality(**about["quality"]), str(about["looks_at"]))
    except (SafetensorError, OSError, BadRequestError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"the gate {path} cannot be read ({error}); delete it to fit it again"
        ) from error
