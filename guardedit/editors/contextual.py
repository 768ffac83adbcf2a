"""Contextual: a fact that holds in a given context, while outside of it the model says what it always said.

ROME's rank-one update (key and value found behind openings of the context) is not written into the weight: it acts on
activations, where a gate says that the prompt stands in the context and the key of a position matches the fact's own.
Where the gate is silent nothing is computed differently, bit for bit. The gate reads higher blocks than the edit's,
where what a prompt is about has come together: the prompt is read up to there first (models/ahead.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from guardedit.editors.located import Plain, find_wanted, solve_wanted
from guardedit.editors.rome import RomeHparams
from guardedit.edits.activation_parts import Gate, KeyMatch, Move
from guardedit.edits.activations import ActivationChange
from guardedit.edits.context_texts import Example, examples, openings_of, require_context
from guardedit.edits.deltas import EditDelta, LowRank
from guardedit.edits.gate_rows import explained
from guardedit.edits.gate_shelf import Trained
from guardedit.edits.gates import Kind, Pooled, fit_gate, pooled
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.settings import require_number
from guardedit.edits.solvers import solve_batch
from guardedit.errors import BadRequestError, SolveError
from guardedit.models.handle import ModelHandle, preserved
from guardedit.models.hooks import key_hook
from guardedit.records import EditRequest
from guardedit.saes.checkpoints import Sae

GATE_DEPTH = 0.43
"""Of the depths tried the one at which a gate carries over best to words that its bank does not have."""
_GATE = 0.5
"""Share of the time that the gate takes, for the progress display."""


@dataclass(frozen=True)
class ContextualHparams(RomeHparams):
    """ROME's settings, with openings of the context in place of sampled prefixes, and the gate's."""

    openings: int = 4
    """Openings of the context that key and value are found behind, beside the bare prompt."""
    gate: Kind = "both"
    """What the gate reads: some SAE latents, the mean activation, or both; without an SAE there the mean activation."""
    gate_examples: int = 3000
    """Prompts that the gate is fitted to."""
    false_fire: float = 0.02
    """Share of held-out prompts outside the context at which the gate may fire."""
    gate_depth: float = GATE_DEPTH
    """Where the gate reads: the block at this share of the model's depth; 0 is the edited layer's own key space."""
    match_least: float = 0.4
    """A position is the fact's where p(x) = kᵀC⁻¹x / kᵀC⁻¹k is this at least."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "openings", least=1, whole=True)
        require_number(self, "gate_examples", least=100, whole=True)
        require_number(self, "false_fire", least=0)
        require_number(self, "gate_depth", least=0)
        if self.gate_depth >= 1:
            raise BadRequestError(f"gate_depth is {self.gate_depth!r}; it is a share of the depth, below 1")
        require_number(self, "match_least", least=0, above=True)
        if self.spare:
            raise BadRequestError(
                f"spare is {self.spare!r}; contextual acts only where the fact's own key stands: leave it out"
            )
        if self.gate not in get_args(Kind):
            raise BadRequestError(f"gate is {self.gate!r}; it must be one of {', '.join(get_args(Kind))}")


def solve_contextual(
    handle: ModelHandle, requests: Sequence[EditRequest], hparams: ContextualHparams, inputs: SolveInputs
) -> EditDelta:
    """Solve one request that names a context; the model is left as it was.

    Raises BadRequestError for more than one request or one without a usable context, SolveError where no gate tells the
    context apart; else errors as `solve_rome`.
    """
    if len(requests) != 1:
        raise BadRequestError(
            f"contextual edits one fact at a time, got {len(requests)}; plan them one by one (`--each`)"
        )
    require_context(requests[0])
    update, about = _update(handle, requests[0], hparams, inputs)
    inputs.tell("fitting the gate", _GATE)
    trained = train_gate(handle, requests[0], hparams, inputs)
    change = contextual_change(update, hparams, trained.gate, str(requests[0].context))
    return EditDelta(
        (change,),
        "contextual",
        about.hparams,
        {**about.diagnostics, **_about_gate(trained), "context": requests[0].context},
    )


def contextual_change(
    update: LowRank, hparams: ContextualHparams, gate: Gate, context: str
) -> ActivationChange:
    """The update as an activation edit: at positions whose key is the fact's, where the gate fires."""
    where = KeyMatch(update.right[0].clone(), hparams.match_least)
    return ActivationChange(hparams.layer, Move(update), where, gate, f"holds where the context is {context}")


def _update(
    handle: ModelHandle, request: EditRequest, hparams: ContextualHparams, inputs: SolveInputs
) -> tuple[LowRank, EditDelta]:
    """ROME's update behind openings of the context, and the delta that it would be in the weights."""
    before = openings_of(request, hparams.openings, inputs.seed)
    settings = replace(hparams, contexts=("", *before))
    moment = inputs.moment(handle, hparams.layer)
    wanted = find_wanted(handle, [request], settings, inputs)
    delta = solve_wanted(
        handle, wanted, "contextual", settings, inputs,
        lambda problem: solve_batch(problem.keys, problem.residuals, moment),
    )  # fmt: skip
    update = delta.changes[0].update  # type: ignore[union-attr]
    if not isinstance(update, LowRank) or update.rank != 1:
        raise SolveError("the update of one fact is not of rank one; report this with the request")
    return update, delta


def gate_hook(handle: ModelHandle, hparams: ContextualHparams) -> str:
    """Where the gate of these settings reads."""
    if not hparams.gate_depth:
        return key_hook(hparams.layer)
    return f"blocks.{min(round(hparams.gate_depth * handle.n_layers), handle.n_layers - 1)}.hook_resid_post"


def train_gate(
    handle: ModelHandle, request: EditRequest, hparams: ContextualHparams, inputs: SolveInputs
) -> Trained:
    """The gate of a request's context.

    Errors as `context_texts.examples` and `fit_gate`.
    """
    hook = gate_hook(handle, hparams)
    sae = inputs.saes.get(hook)
    made = examples(handle, request, hparams.gate_examples, inputs.seed)
    kind: Kind = "activations" if sae is None and hparams.gate == "both" else hparams.gate

    def fit() -> Trained:
        return _fit(handle, made, hook, kind, hparams, inputs)

    if inputs.gates is None:
        return fit()
    named = {
        "model": handle.hook_digest(hook), "hook": hook, "kind": kind, "seed": inputs.seed,
        "sae": None if sae is None else sae.digest, "false_fire": hparams.false_fire,
    }  # fmt: skip
    return inputs.gates.take(made, named, fit)


def _fit(
    handle: ModelHandle,
    made: Sequence[Example],
    hook: str,
    kind: Kind,
    hparams: ContextualHparams,
    inputs: SolveInputs,
) -> Trained:
    sae, texts = inputs.saes.get(hook), [example.text for example in made]

    def told(share: float) -> None:
        inputs.tell(
            f"reading {len(made)} prompts inside and outside the context", _GATE + (1 - _GATE) * share
        )

    def read() -> Pooled:
        with preserved(handle):
            return pooled(handle, texts, hook, sae, told)

    named = {"model": handle.hook_digest(hook), "hook": hook, "sae": None if sae is None else sae.digest}
    means = read() if inputs.gates is None else inputs.gates.reading(texts, named, read)
    gate, quality = fit_gate(made, means, hook, kind, sae, hparams.false_fire, inputs.seed)
    return Trained(gate, quality, _in_words(gate, made, means, sae))


def _in_words(gate: Gate, made: Sequence[Example], means: Pooled, sae: Sae | None) -> str:
    if sae is None:
        return f"there is no SAE at {gate.hook_name} to say it in latents"
    rows = list(zip(gate.latents, gate.labels, gate.net.tolist(), strict=True))[: gate.rooted]
    said = [f"latent {number} {label} ({weight:+.2f})" for number, label, weight in rows[:8]]
    found = explained(gate, made, means, sae) if gate.rooted < len(gate.weights) else []
    said += [
        f"by direction: latent {number} {sae.labels[number].label} ({share:.0%})"
        for number, share in found[:4]
    ]
    return "; ".join(said)


def _about_gate(trained: Trained) -> Plain:
    quality: Any = trained.quality
    names = ("auroc", "low", "high", "fires_inside", "fires_outside", "n_inside", "n_outside")
    return {f"gate_{name}": getattr(quality, name) for name in names} | {"gate_looks_at": trained.looks_at}
