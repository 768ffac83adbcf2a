"""What the locate-then-edit editors share: settings, keys and values of a batch, the record of how it went.

ROME, EMMET, MEMIT and AlphaEdit find keys and values in the same way and differ in how they solve for the update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import torch

from guardedit.edits.batches import require_consistent, require_distinct_keys
from guardedit.edits.contexts import sample_contexts
from guardedit.edits.deltas import EditDelta
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.keys import Key, keys_of
from guardedit.edits.settings import require_contexts, require_number
from guardedit.edits.spreading import SolveLayer, Spread, Wanted, spread
from guardedit.edits.values import Value, ValueHparams, optimise_values
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.second_moment import SecondMoment
from guardedit.records import EditRequest

Plain = dict[str, float | int | str | bool | None]
_VALUES = 0.9
"""Share of the time that the values take, for the progress display."""


@dataclass(frozen=True)
class LocatedHparams(ValueHparams):
    """Where an editor writes, and what its keys and values are averaged over."""

    layer: int = 0
    """The layer that values are found for."""
    n_prefixes: int = 10
    """Sampled prefixes beside the bare prompt."""
    contexts: tuple[str, ...] = ()
    """The bare prompt's "" and the prefixes themselves; sampled from the model when empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "layer", least=0, whole=True)
        require_number(self, "n_prefixes", least=0, whole=True)
        if self.contexts != ():
            require_contexts(self.contexts)

    @property
    def band(self) -> tuple[int, ...]:
        """Layers that are written, ascending."""
        return (self.layer,)


@dataclass(frozen=True)
class BandHparams(LocatedHparams):
    """Settings of an editor that can spread a batch over several layers."""

    layers: tuple[int, ...] = ()
    """The layers that are written, ascending, `layer` last; empty is `layer` alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layers, tuple) or not all(type(n) is int and n >= 0 for n in self.layers):
            raise BadRequestError(
                f"layers are {self.layers!r}; they must be whole numbers, or none for `layer` alone"
            )
        if self.layers and (list(self.layers) != sorted({*self.layers}) or self.layers[-1] != self.layer):
            raise BadRequestError(
                f"layers are {self.layers}; each may be there once, ascending, and the last must be `layer`, "
                f"{self.layer}, which values are found for"
            )

    @property
    def band(self) -> tuple[int, ...]:
        """Layers that are written, ascending."""
        return self.layers or (self.layer,)


def find_wanted(
    handle: ModelHandle, requests: Sequence[EditRequest], hparams: LocatedHparams, inputs: SolveInputs
) -> Wanted:
    """Keys and values of a batch at the value layer; the model is left as it was.

    One `Wanted` serves every editor of this family. Raises BadRequestError for requests that cannot be solved together
    or a layer that the model does not have, SolveError where a value cannot be found.
    """
    require_consistent(requests)
    layer = hparams.layer
    with preserved(handle):
        contexts = tuple(hparams.contexts or sample_contexts(handle, hparams.n_prefixes, inputs.seed))
        keys = keys_of(handle, requests, layer, contexts)
        require_distinct_keys(requests, keys, layer)
        values = _values(handle, requests, keys, contexts, hparams, inputs)
    return Wanted(tuple(requests), contexts, layer, keys, values)


def _values(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    keys: Sequence[Key],
    contexts: tuple[str, ...],
    hparams: LocatedHparams,
    inputs: SolveInputs,
) -> tuple[Value, ...]:
    """From the shelf where they are known; the others are optimised together."""
    key_for = dict(zip(requests, keys, strict=True))

    def find(some: Sequence[EditRequest]) -> tuple[Value, ...]:
        told, own = _told(inputs, hparams, len(some), contexts), [key_for[request] for request in some]
        return optimise_values(handle, some, own, hparams.layer, contexts, hparams, told)

    if inputs.values is None:
        return find(requests)
    return inputs.values.take(handle, requests, hparams.layer, contexts, hparams, find)


def moments_of(handle: ModelHandle, layers: Sequence[int], inputs: SolveInputs) -> dict[int, SecondMoment]:
    """The second moment of each layer, before anything expensive is done; errors as `SolveInputs.moment`."""
    return {layer: inputs.moment(handle, layer) for layer in layers}


def solve_wanted(
    handle: ModelHandle,
    wanted: Wanted,
    editor: str,
    hparams: LocatedHparams,
    inputs: SolveInputs,
    solve_layer: SolveLayer,
) -> EditDelta:
    """Solve every layer of the band for keys and values that are known; the model is left as it was."""
    band = hparams.band
    moment = inputs.moment(handle, wanted.layer)

    def told(done: int) -> None:
        inputs.tell(f"solving layer {band[done - 1]}", _VALUES + (1 - _VALUES) * done / len(band))

    found = spread(handle, wanted, band, solve_layer, told)
    named = plain_hparams(hparams, wanted.contexts, inputs.seed)
    return EditDelta(found.changes, editor, named, {**_about_batch(wanted, moment), **_about_solve(found)})


def plain_hparams(hparams: LocatedHparams, contexts: Sequence[str], seed: int) -> Plain:
    """Settings as they were used, as plain values."""
    named = {name: value for name, value in asdict(hparams).items() if name not in ("contexts", "layers")}
    if not named.get("spare"):  # deltas from before it keep their bytes
        named.pop("spare", None)
    spread_over = {"layers": ",".join(map(str, hparams.band))} if isinstance(hparams, BandHparams) else {}
    return {
        **named,
        **spread_over,
        "n_prefixes": len(contexts) - 1,
        "contexts": "|".join(contexts),
        "seed": seed,
    }


def _told(
    inputs: SolveInputs, hparams: LocatedHparams, count: int, contexts: Sequence[str]
) -> Callable[[int, float], None]:
    """Progress over batches of facts: a step that is not larger than the last one begins the next batch."""
    passes = 2 if 0 < hparams.warm_contexts < len(contexts) else 1
    batches = passes * max(1, -(-count // hparams.facts_at_once))
    done, last = -1, -1

    def tell(step: int, loss: float) -> None:
        nonlocal done, last
        done += step <= last or done < 0
        last = step
        share = (done + step / max(hparams.steps, 1)) / batches
        inputs.tell(f"optimising values: loss {loss:.2f} nats", _VALUES * min(share, 1.0))

    return tell


def _about_batch(wanted: Wanted, moment: SecondMoment) -> Plain:
    """How the values came out: of one fact its own figures, of many their mean, and the worst where it matters."""
    keys, values = wanted.keys, wanted.values
    leverage = moment.leverage(torch.stack([key.k_star for key in keys], 1))
    return {
        "facts": len(values),
        "steps": max(len(value.losses) for value in values) - 1,
        "loss_first_nats": fmean(value.losses[0] for value in values),
        "loss_last_nats": fmean(value.losses[-1] for value in values),
        "p_new_at_solution": fmean(value.p_new for value in values),
        "kl_nats": fmean(value.kl_nats for value in values),
        "kept_nats": fmean(value.kept_nats for value in values),
        "keep_weight": fmean(value.keep_weight for value in values),
        "residual_norm": fmean(float(value.residual.norm()) for value in values),
        "key_leverage": float(leverage.min()),
        "clamped": any(value.clamped for value in values),
        "subject_position": min(key.position for key in keys),
        "subject_starts_text": any(key.subject_starts_text for key in keys),
    }


def _about_solve(found: Spread) -> Plain:
    """Of several layers the worst: fewest independent keys, largest condition number."""
    ranks = [solution.rank for solution in found.solutions if solution.rank is not None]
    return {
        "gram_rank": min(ranks) if ranks else None,
        "gram_condition": max(solution.condition for solution in found.solutions),
        "missed_share": found.missed,
    }
