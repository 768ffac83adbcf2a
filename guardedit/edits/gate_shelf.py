"""Gates that were fitted once, in a folder: a plan of another fact in the same kind of context takes the same one.

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
from guardedit.edits.gates import GateQuality
from guardedit.errors import BadRequestError, IntegrityError
from guardedit.records import canonical, digest_of
from guardedit.saes.files import write_atomically

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Trained:
    """A gate, how good it is, and what it looks at."""

    gate: Gate
    quality: GateQuality
    looks_at: str
    """Latents in words, with their share of the difference that the gate sees."""


@dataclass(frozen=True)
class GateShelf:
    """One safetensors file a gate; files of other models and settings may lie beside."""

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
