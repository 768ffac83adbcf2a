"""ROME: one fact, one layer, rank one (Meng et al. 2022), with one key throughout (Gupta et al. 2024).

v_star = W k_star + r and ΔW = r (C⁻¹k_star)ᵀ / (k_starᵀ C⁻¹ k_star), solved in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from guardedit.edits.contexts import sample_contexts
from guardedit.edits.deltas import EditDelta, WeightChange
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.keys import Key, key_of
from guardedit.edits.settings import require_contexts, require_number
from guardedit.edits.solvers import solve
from guardedit.edits.values import Value, ValueHparams, optimise_values
from guardedit.errors import BadRequestError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.statistics import SecondMoment
from guardedit.records import EditRequest


@dataclass(frozen=True)
class RomeHparams(ValueHparams):
    """Where and how ROME writes."""

    layer: int = 0
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


def solve_rome(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    hparams: RomeHparams,
    inputs: SolveInputs,
) -> EditDelta:
    """Solve one request; the model is left as it was.

    Raises BadRequestError for more than one request or a layer that the model does not have,
    MissingStatisticsError without the layer's second moment, StatisticsMismatchError with another layer's or another
    model's, SolveError where no finite update exists.
    """
    if len(requests) != 1:
        raise BadRequestError(f"rome edits one fact at a time, got {len(requests)}; plan them one by one")
    request, layer = requests[0], hparams.layer
    moment = inputs.moment(handle, layer)
    with preserved(handle):
        contexts = hparams.contexts or sample_contexts(handle, hparams.n_prefixes, inputs.seed)
        key = key_of(handle, request, layer, contexts)
        value = optimise_values(
            handle, [request], [key], layer, contexts, hparams, _steps(inputs, hparams), seed=inputs.seed
        )[0]
    update = solve(key.k_star[:, None], value.residual[:, None], moment)
    change = WeightChange(handle.rewrite_parameter(layer), layer, update)
    return EditDelta(
        (change,), "rome", _plain(hparams, contexts, inputs.seed), _diagnostics(key, value, moment)
    )


def _steps(inputs: SolveInputs, hparams: RomeHparams) -> Callable[[int, float], None]:
    return lambda step, loss: inputs.tell(
        f"optimising the value: loss {loss:.2f} nats", step / max(hparams.steps, 1)
    )


def _plain(
    hparams: RomeHparams, contexts: Sequence[str], seed: int
) -> dict[str, float | int | str | bool | None]:
    named = {name: value for name, value in asdict(hparams).items() if name != "contexts"}
    return {**named, "n_prefixes": len(contexts) - 1, "contexts": "|".join(contexts), "seed": seed}


def _diagnostics(key: Key, value: Value, moment: SecondMoment) -> dict[str, float | int | str | bool | None]:
    return {
        "steps": len(value.losses) - 1,
        "loss_first_nats": value.losses[0],
        "loss_last_nats": value.losses[-1],
        "p_new_at_solution": value.p_new,
        "kl_nats": value.kl_nats,
        "kept_nats": value.kept_nats,
        "keep_weight": value.keep_weight,
        "residual_norm": float(value.residual.norm()),
        "key_leverage": float(moment.leverage(key.k_star)),
        "clamped": value.clamped,
        "subject_position": key.position,
        "subject_starts_text": key.subject_starts_text,
    }
