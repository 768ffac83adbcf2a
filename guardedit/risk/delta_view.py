"""A delta seen through the contexts of its layers: the sums that its scores are made of.

With one layer every sum has one term and is that term, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor

from guardedit.edits.activation_parts import Move
from guardedit.edits.deltas import EditDelta, LowRank, Update, WeightChange
from guardedit.errors import MissingStatisticsError, StatisticsMismatchError
from guardedit.risk.context import RiskContext
from guardedit.risk.key_view import KeyView, fill_near_keys
from guardedit.risk.shown import Pick


@dataclass(frozen=True)
class LayerPart:
    """The update of one layer, seen through that layer's context."""

    context: RiskContext
    views: tuple[KeyView, ...]
    """The requests at this layer."""
    update: Update

    @cached_property
    def leakage(self) -> float:
        """tr(ΔW C ΔWᵀ)."""
        c, update = self.context.need_second_moment.matrix.cpu(), self.update
        if isinstance(update, LowRank):
            left, right = update.left.double().cpu(), update.right.double().cpu()
            return float(((left.T @ left) * (right @ c @ right.T)).sum())
        matrix = update.dense().double().cpu()
        return float(((matrix @ c) * matrix).sum())

    def energy(self, keys: Float[Tensor, "n d_in"]) -> Float[Tensor, " n"]:
        """‖ΔW x‖² of each key, float64."""
        return self.update.move(keys.double().cpu()).square().sum(-1)

    @property
    def near_keys(self) -> Float[Tensor, "n d_in"]:
        """Keys of all requests' neighbours."""
        return torch.cat([one.near_keys.float() for one in self.views])

    @cached_property
    def leaks(self) -> Float[Tensor, " d_sae"]:
        """E[a_f²]·‖ΔW d_f‖² of each latent of the key-space SAE."""
        sae = self.context.need_key_sae
        return sae.energy.double().cpu() * self.energy(sae.W_dec)

    @property
    def explained(self) -> tuple[float, float, int]:
        """Σ⟨ΔW x̂, ΔW x⟩ and Σ‖ΔW x‖² over a sample of bank tokens, and their number; the first is 0 without an SAE."""
        keys = self.context.sampled_keys
        moved = self.update.move(keys.double())
        total = float(moved.square().sum())
        if self.context.key_sae is None:
            return 0.0, total, len(keys)
        seen = self.update.move(self.context.reconstructed.double())
        return float((seen * moved).sum()), total, len(keys)


@dataclass(frozen=True)
class DeltaView:
    """One delta seen through the contexts of its layers."""

    context: RiskContext
    views: tuple[KeyView, ...]
    """The requests at the layer of `context`."""
    delta: EditDelta
    others: tuple[RiskContext, ...] = ()
    """Contexts of the delta's other layers."""

    @cached_property
    def parts(self) -> tuple[LayerPart, ...]:
        """The delta layer by layer, lowest first.

        Raises MissingStatisticsError for a delta that changes nothing, a layer without a context, or anything else
        than rewrite modules: a sum that leaves something out would look like a smaller risk.
        """
        contexts = {one.layer: one for one in (self.context, *self.others)}
        self._require_measurable(contexts)
        layers = self.written.layers
        views = self._views_at([contexts[layer] for layer in layers])
        return tuple(LayerPart(contexts[layer], views[layer], self.written.update(layer)) for layer in layers)

    @property
    def is_bound(self) -> bool:
        """Whether closed-form scores are upper bounds: of an edit that adds ΔW x at some positions, a rule and a gate
        only take away from what ΔW in the weight would do."""
        edits = self.delta.activation_edits
        layers = {one.layer for one in edits}
        return bool(edits) and len(layers) == len(self.delta.changes) and all(one.moves for one in edits)

    @cached_property
    def written(self) -> EditDelta:
        """The delta as it would be in the weights."""
        if not self.is_bound:
            return self.delta
        handle = self.context.handle
        changes = tuple(
            WeightChange(handle.rewrite_parameter(one.layer), one.layer, one.action.update)
            for one in self.delta.activation_edits
            if isinstance(one.action, Move)
        )
        return replace(self.delta, changes=changes)

    def _require_measurable(self, contexts: dict[int, RiskContext]) -> None:
        delta = self.written
        if delta.activation_edits:
            raise MissingStatisticsError(
                "the edit pushes activations: there is no ΔW from which its effect on a key would follow"
            )
        if not delta.touches_only_rewrite_modules:
            raise MissingStatisticsError(
                f"the delta changes {len(delta.changes)} parameters, not only rewrite modules: what it does to a key "
                "is not ΔW x"
            )
        if not delta.changes:
            raise MissingStatisticsError("the delta changes nothing")
        missing = sorted(set(delta.layers) - set(contexts))
        if missing:
            raise MissingStatisticsError(
                f"the delta changes layers {delta.layers}, statistics are those of {sorted(contexts)}; collect those "
                f"of layer {missing[0]} with `guardedit stats collect --layer {missing[0]}`"
            )
        read = [(one.bank.contexts, one.protected.contexts) for one in contexts.values()]
        if any(words != read[0] for words in read):
            raise StatisticsMismatchError("the key banks of the delta's layers are not of the same text")

    def _views_at(self, contexts: list[RiskContext]) -> dict[int, tuple[KeyView, ...]]:
        """The requests at each layer; near keys of layers beside the first context's are taken together."""
        twins = {
            one.layer: tuple(view.at(one) for view in self.views)
            for one in contexts if one.layer != self.context.layer
        }  # fmt: skip
        if twins:
            fill_near_keys(list(twins.values()))
        return {self.context.layer: self.views, **twins}

    @cached_property
    def leakage(self) -> float:
        """Σ_l tr(ΔW C ΔWᵀ)."""
        return reduce(add, (part.leakage for part in self.parts))

    @cached_property
    def output_energy(self) -> float:
        """Σ_l tr(W C Wᵀ), the yardstick of every move."""
        return reduce(add, (part.context.output_energy for part in self.parts))

    @property
    def n_tokens(self) -> int:
        """Tokens behind the second moments, the fewest of any layer."""
        return min(part.context.need_second_moment.n_tokens for part in self.parts)

    def energy(self, keys: Callable[[LayerPart], Tensor]) -> Float[Tensor, " n"]:
        """Σ_l ‖ΔW x‖² of the same tokens' keys at each layer, float64."""
        return reduce(add, (part.energy(keys(part)) for part in self.parts))

    @cached_property
    def bank_moves(self) -> Float[Tensor, " n"]:
        """√Σ_l ‖ΔW x‖² of each bank token, float32."""
        return _norms([part.update.move(part.context.bank.keys) for part in self.parts])

    def relative_moves(self, pick: Pick) -> Float[Tensor, " n"]:
        """√Σ_l ‖ΔW x‖² / √Σ_l ‖W x‖² of each token whose keys are picked."""
        keys = [(part, pick(part.context).keys) for part in self.parts]
        moved = _norms([part.update.move(x) for part, x in keys])
        return moved / _norms([x @ part.context.weight.T for part, x in keys])

    @cached_property
    def seen(self) -> tuple[LayerPart, ...]:
        """The parts whose layer has a key-space SAE; raises MissingStatisticsError where none has."""
        found = tuple(part for part in self.parts if part.context.key_sae is not None)
        if not found:
            raise MissingStatisticsError(f"{self.unseen}: guardedit sae train")
        return found

    @property
    def unseen(self) -> str | None:
        """Which layers have no key-space SAE, or None."""
        missing = [str(part.context.layer) for part in self.parts if part.context.key_sae is None]
        return f"no SAE on the key space of layer {', '.join(missing)}" if missing else None

    @cached_property
    def leaks(self) -> Float[Tensor, " latents"]:
        """E[a_f²]·‖ΔW d_f‖² of every latent of the layers' key-space SAEs, layer after layer."""
        return torch.cat([part.leaks for part in self.seen])

    @property
    def explained(self) -> tuple[float, float, int]:
        """Σ⟨ΔW x̂, ΔW x⟩ and Σ‖ΔW x‖² over layers and sampled bank tokens, and the number of tokens.

        Raises MissingStatisticsError where no layer has an SAE.
        """
        found = [part.explained for part in self.parts] if self.seen else []
        return reduce(add, (one[0] for one in found)), reduce(add, (one[1] for one in found)), found[0][2]


def _norms(moves: list[Float[Tensor, "n d_out"]]) -> Float[Tensor, " n"]:
    """Norm of each token's moves at all layers, as one long vector."""
    norms: Tensor = torch.linalg.vector_norm(torch.cat(moves, dim=1), dim=1)
    return norms
