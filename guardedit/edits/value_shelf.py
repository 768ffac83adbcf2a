"""Values that were found once, in a folder: editors that ask for the same ones, and runs that were cut off, share them.

A value follows from the model's weights, the request, the layer, the contexts and the settings of the optimisation, not
from how many facts were optimised beside it nor from what is solved with it: those five are its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from guardedit.edits.value_types import Value, ValueHparams
from guardedit.errors import IntegrityError
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest, digest_of
from guardedit.saes.files import write_atomically

_ASIDE = ("facts_at_once",)
"""Settings that do not change a value by more than rounding."""
_GUARDED = ("keep_openings", "keep_turns", "keep_weight", "keep_contrast", "hold_loss", "margin")
"""Settings that say nothing where no openings are kept."""
_AT_ONCE = 64
"""Values that are found before they are kept: what an interruption can cost."""

Find = Callable[[Sequence[EditRequest]], Sequence[Value]]
"""Optimises the values that are not there yet."""


@dataclass(frozen=True)
class ValueShelf:
    """One safetensors file a value; files of other models and settings may lie beside."""

    folder: Path

    def take(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        layer: int,
        contexts: Sequence[str],
        hparams: ValueHparams,
        find: Find,
    ) -> tuple[Value, ...]:
        """The values of the requests in their order; those that are not there are found together, then kept.

        Raises IntegrityError for a file that cannot be read, and whatever `find` raises.
        """
        shared = {
            "model": handle.digest(),
            "layer": layer,
            "contexts": list(contexts),
            "settings": settings_of(hparams),
        }
        paths = [self._path(request, shared) for request in requests]
        missing = [number for number, path in enumerate(paths) if not path.is_file()]
        for start in range(0, len(missing), _AT_ONCE):
            some = missing[start : start + _AT_ONCE]
            found = find([requests[number] for number in some])
            for number, value in zip(some, found, strict=True):
                write_atomically(paths[number], _encode(value))
        return tuple(_decode(path) for path in paths)

    def _path(self, request: EditRequest, shared: dict[str, object]) -> Path:
        # What a request names beside these four does not enter its value.
        asked = [request.prompt, request.subject, request.target_new, request.target_true]
        return self.folder / f"{digest_of({**shared, 'request': asked}).split(':')[1]}.safetensors"


def settings_of(hparams: ValueHparams) -> dict[str, object]:
    """The settings that a value depends on; an editor's own beside them (its ridge, its band) do not count."""
    named = asdict(hparams)
    aside = _ASIDE if hparams.keep_openings else (*_ASIDE, *_GUARDED)
    return {field.name: named[field.name] for field in fields(ValueHparams) if field.name not in aside}


def _encode(value: Value) -> bytes:
    plain = [value.kl_nats, value.p_new, float(value.clamped), value.kept_nats, value.keep_weight]
    tensors = {
        "residual": value.residual.contiguous(),
        "losses": torch.tensor(value.losses, dtype=torch.float64),
        "plain": torch.tensor(plain, dtype=torch.float64),
    }
    return save(tensors)


def _decode(path: Path) -> Value:
    try:
        with safe_open(path, framework="pt") as file:
            residual, losses, plain = (file.get_tensor(name) for name in ("residual", "losses", "plain"))
    except (SafetensorError, OSError) as error:
        raise IntegrityError(
            f"the value {path} cannot be read ({error}); delete it to find it again"
        ) from error
    kl, p_new, clamped, kept, weight = plain.tolist()
    return Value(residual, tuple(losses.tolist()), kl, p_new, bool(clamped), kept, weight)
