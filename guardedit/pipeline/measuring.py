"""What the risk room measures with: statistics, SAEs and banks of each layer, as the live model has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guardedit.gate.reference import with_percentiles
from guardedit.models.hooks import key_hook, mlp_hook
from guardedit.pipeline.workspace import Workspace
from guardedit.records import Score
from guardedit.risk.banks import control_banks, protected_banks
from guardedit.risk.measure import RiskContext


def risk_context(workspace: Workspace) -> RiskContext:
    """The context of the kit's layer."""
    layer = workspace.kit.layer
    return risk_contexts(workspace, (layer,))[layer]


def risk_contexts(workspace: Workspace, layers: Sequence[int]) -> dict[int, RiskContext]:
    """A context per layer: second moment and SAEs of the kit, where it has them, and key banks."""
    kit, handle, seed = workspace.kit, workspace.handle, workspace.settings.seed
    banks = control_banks(handle, layers, seed=seed)
    protected = protected_banks(handle, layers, seed=seed)
    return {
        layer: RiskContext(
            handle,
            layer,
            kit.second_moments.get(key_hook(layer)),
            key_sae=kit.saes.get(key_hook(layer)),
            mlp_sae=kit.monitors.get(mlp_hook(layer)),
            bank=banks[layer],
            protected=protected[layer],
            seed=seed,
            contexts=tuple(kit.hparams.get("rome", {}).get("contexts", ("",))),
            remarks=_remarks(workspace, layer),
        )
        for layer in layers
    }


def _remarks(workspace: Workspace, layer: int) -> tuple[str, ...]:
    """Whether the statistics of a layer are of the keys that the live model has there."""
    store, hook = workspace.store, key_hook(layer)
    if not store.exists or not store.live_overrides():
        return ()
    live, base = (
        workspace.handle.hook_digest(hook, manifest) for manifest in (store.manifest(), store.base().manifest)
    )
    if live == base:
        return ()
    return (
        f"statistics of layer {layer} are the base model's: live edits below it have moved its keys since",
    )


def key_layer(workspace: Workspace, settings: Any) -> int:
    """Where requests are screened: the kit's layer, or the highest that these settings edit if it is not among them."""
    named = getattr(settings, "layers", None) or (getattr(settings, "layer", workspace.kit.layer),)
    return workspace.kit.layer if workspace.kit.layer in named else max(named)


def placed(
    workspace: Workspace, scores: Sequence[Score], key_layer: int, layers: Sequence[int], many: bool
) -> tuple[Score, ...]:
    """Scores with their percentiles among the bank's edits, where they can be compared with them.

    The bank holds single edits of one layer: keys of another layer, and sums over several `layers` or over many
    requests, have no place among them.
    """
    bank = workspace.kit.preop_bank
    if bank is None:
        return tuple(scores)
    comparable = {
        "key": key_layer == bank.layer,
        "delta": tuple(layers) == (bank.layer,) and not many,
        "rehearsal": not many,
    }
    return tuple(with_percentiles([one], bank)[0] if comparable.get(one.stage) else one for one in scores)
