"""A solved update without its tensors: weights changed, activations acted on."""

from __future__ import annotations

from typing import ClassVar

from guardedit.records.base import Digest, Grown, Record


class GateLatent(Record):
    """One latent that a gate listens to."""

    latent: int | None
    """Its number in the SAE; None where that is not known."""
    label: str
    weight: float
    threshold: float
    """Activation below which it counts as zero."""


class GateNote(Grown):
    """When an activation edit speaks: where Σ weight·latent + bias, less what speaks for the rival kinds of context,
    reaches the limit in a prompt."""

    later: ClassVar[frozenset[str]] = frozenset({"rivals"})
    hook_name: str
    latents: tuple[GateLatent, ...]
    """Those that matter most first, where the editor says which."""
    bias: float
    limit: float
    pool: str = "max"
    """What of each latent counts over the prompt: its "max" or its "mean"."""
    rooted: int = 0
    """How many of them, the first ones, count by their square root."""
    rivals: tuple[str, ...] = ()
    """Kinds of context that are weighed against its own; a latent's weight is then its own less their mean."""


class ActivationNote(Record):
    """What an activation edit does, and when: for whoever approves it."""

    hook_name: str
    """Where it acts."""
    action: str
    """In words."""
    rule: str
    """Which positions, in words."""
    gate: GateNote | None = None
    """None where no gate has to fire."""
    n_bytes: int
    label: str = ""


class TensorChange(Grown):
    """What a delta does to one parameter, or one activation edit that it brings."""

    later: ClassVar[frozenset[str]] = frozenset({"acts"})

    parameter: str
    """Name in the model's state, e.g. "model.layers.5.mlp.down_proj.weight"; see `is_activation`."""
    layer: int | None
    """The block it lies in; None for embeddings, final norm and unembedding."""
    shape: tuple[int, ...]
    dtype: str
    rank: int | None
    """Rank of the update; None for a dense one."""
    delta_norm: float
    """Frobenius norm of the update, in units of the weight."""
    weight_norm: float
    digest_before: Digest
    digest_after: Digest
    """Digest of the tensor's bytes once the update has been added and cast."""
    acts: ActivationNote | None = None
    """Of an activation edit."""

    @property
    def delta_norm_ratio(self) -> float:
        """‖ΔW‖ / ‖W‖."""
        return self.delta_norm / self.weight_norm if self.weight_norm else 0.0


class DeltaRecord(Record):
    """A solved update without its tensors: those are the file whose digest is `file_digest`."""

    editor: str
    changes: tuple[TensorChange, ...]
    file_digest: Digest
    hparams: dict[str, float | int | str | bool | None]
    model_digest: Digest
    statistics_digests: dict[str, Digest] = {}
    """Second moments used, by hook name."""
    diagnostics: dict[str, float | int | str | bool | None] = {}
    """How the solve went: steps, final loss, P(new) under the optimised value, constraint error, seconds."""
