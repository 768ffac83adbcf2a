"""Both sides of the comparison: the reference's activations (computed once, cached on disk) and the edited model's.

The edited side starts at the lowest edited layer with the reference's own hidden states, so layers below are computed
once; that they really are the same is checked on a sample and by the digest of the parameters below. From layer 0 on
nothing is taken over: an edit that starts there may touch the embeddings too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from guardedit.drift import cache as cache_files
from guardedit.drift.behaviour import TargetBelief, beliefs
from guardedit.drift.cache import Recorded, numeric_environment
from guardedit.drift.probes import ProbeSet, Rows, last_positions
from guardedit.errors import BadRequestError, StatisticsMismatchError
from guardedit.models.handle import ModelHandle, preserved, tensor_digest
from guardedit.models.hooks import HookPoint, record, resume
from guardedit.models.installed import whole_from
from guardedit.records import digest_of, is_activation

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""

Batch = tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]
OUTLIER = 5.0
"""Tokens whose reference norm at a hook exceeds this many medians are left out of the latents' statistics there."""


@dataclass(frozen=True)
class BaseSide:
    """The reference version's side of every probe."""

    layer: int
    hook_names: tuple[str, ...]
    model_digest: str
    below_digest: str
    """Digest of the parameters below `layer`."""
    head: nn.Module
    """The reference's unembedding: the module itself, or a copy where the edit to be measured touches it."""
    head_digest: str
    probes_digest: str
    recorded: dict[str, list[Recorded]]
    """By rows' name: "far", scopes, "distractor"."""
    norm_limits: dict[str, float]
    """By hook name: tokens with a larger reference norm are outliers."""
    environment: str
    far_from_cache: bool
    beliefs: tuple[TargetBelief, ...]
    """What the reference thinks of each target."""


def monitored_hooks(n_layers: int, layer: int) -> tuple[str, ...]:
    """Where drift of an edit at `layer` is watched: its MLP output, three layers up, and at two thirds of the depth."""
    later = sorted({min(layer + 3, n_layers - 1), max(layer, 2 * n_layers // 3)})
    return (f"blocks.{layer}.hook_mlp_out", *(f"blocks.{index}.hook_resid_post" for index in later))


def usable_hooks(handle: ModelHandle, layer: int, hook_names: Sequence[str]) -> tuple[str, ...]:
    """Those of the hooks that an edit at `layer` can move: its own key space, and all below, cannot."""
    key_space = HookPoint.parse(f"blocks.{layer}.mlp.hook_post", handle.n_layers)
    points = {name: HookPoint.parse(name, handle.n_layers) for name in hook_names}
    return tuple(
        sorted((name for name, point in points.items() if point > key_space), key=points.__getitem__)
    )


@torch.no_grad()
def base_side(
    handle: ModelHandle,
    probes: ProbeSet,
    layer: int,
    hook_names: Sequence[str] = (),
    *,
    cache: Path | None = None,
    changed: Collection[str] = (),
    progress: Progress | None = None,
) -> BaseSide:
    """Run the reference model (as `handle` is now) over all probes.

    `layer`: lowest layer that an edit to be measured touches. `hook_names`: hooks that SAEs watch, for one
    `saes.keys()`; those that cannot move are dropped, and without any the default places are recorded. `cache`: folder
    for the far side (`cache_folder() / "drift"`); None computes it anew. A damaged cache file is computed again.
    `changed`: parameters that will be another version's before the measurement (a staged copy's): the unembedding is
    copied where it is among them. With activation edits installed, it may start lower: see `whole_from`.
    """
    layer = whole_from(handle, layer)
    hooks = usable_hooks(handle, layer, hook_names) or monitored_hooks(handle.n_layers, layer)
    model_digest = handle.digest()
    with preserved(handle):
        far, cached = _far_side(handle, probes.far, layer, hooks, model_digest, cache, progress)
        recorded = {"far": far}
        for name, rows in probes.prompts.items():
            recorded[name] = list(_reference(handle, rows, layer, hooks, progress))
        believed = tuple(beliefs(handle, probes.targets))
    head = _kept_head(handle, _head(handle), changed)
    return BaseSide(
        layer=layer,
        hook_names=hooks,
        model_digest=model_digest,
        below_digest=below_digest(handle, layer),
        head=head,
        head_digest=_module_digest(head),
        probes_digest=probes.digest,
        recorded=recorded,
        norm_limits={name: _norm_limit(probes.far, far, name) for name in hooks},
        environment=numeric_environment(handle),
        far_from_cache=cached,
        beliefs=believed,
    )


def _far_side(
    handle: ModelHandle,
    rows: Rows,
    layer: int,
    hooks: Sequence[str],
    model_digest: str,
    cache: Path | None,
    progress: Progress | None,
) -> tuple[list[Recorded], bool]:
    """The reference's far side, and whether it came from the cache."""
    if cache is None:
        return list(_reference(handle, rows, layer, hooks, progress)), False
    path = cache_files.far_path(cache, model_digest, layer, hooks, rows.digest, numeric_environment(handle))
    known = cache_files.load(path, len(rows.batches), hooks)
    if known is not None:
        return known, True
    far = list(_reference(handle, rows, layer, hooks, progress))
    cache_files.save(path, far)
    return far, False


def below_digest(handle: ModelHandle, layer: int) -> str:
    """Digest of all parameters that the input of block `layer` depends on."""
    return handle.hook_digest(f"blocks.{layer}.hook_resid_pre")


def reference_head(handle: ModelHandle, base: BaseSide, changed: Collection[str]) -> nn.Module:
    """The unembedding that made the reference's logits; a copy where `changed` is about to touch it.

    Not a copy otherwise: equal weights at another address can differ in a product's last bits.
    """
    if _module_digest(base.head) != base.head_digest:
        raise StatisticsMismatchError(
            "the reference's unembedding has changed since its side was recorded; record the reference side again"
        )
    return _kept_head(handle, base.head, changed)


def _kept_head(handle: ModelHandle, head: nn.Module, changed: Collection[str]) -> nn.Module:
    own = {id(parameter) for parameter in head.parameters()}
    weights = [name for name in changed if not is_activation(name)]
    touched = any(id(handle.model.get_parameter(name)) in own for name in weights)
    return copy.deepcopy(head) if touched else head


def edited_head(handle: ModelHandle, base: BaseSide, reference: nn.Module) -> nn.Module:
    """The edited model's unembedding; the reference's own module where the two have the same bytes."""
    head = _head(handle)
    return reference if _module_digest(head) == base.head_digest else head


def edited_side(
    handle: ModelHandle, base: BaseSide, rows: Rows, progress: Progress | None = None
) -> Iterator[tuple[Batch, Recorded, Recorded]]:
    """(batch, reference, edited) for each batch of `rows`, one at a time: the edited side is never kept."""
    for index, (batch, before) in enumerate(zip(rows.batches, base.recorded[rows.name], strict=True)):
        start = resume(handle, base.layer, before.resid.to(handle.dtype)) if base.layer else nullcontext()
        with start:
            acts, hidden = _forward(handle, batch, base.hook_names)
        final = hidden[_compared(rows.name, batch[1])].float()
        yield batch, before, Recorded(before.resid, final, {name: act.float() for name, act in acts.items()})
        if progress is not None:
            progress(f"edited side, {rows.name}", (index + 1) / len(rows.batches))


def same_below(handle: ModelHandle, base: BaseSide, rows: Rows, n_batches: int = 2) -> bool:
    """Whether the edited model computes bit for bit the reference's input of block `layer`, on the first batches."""
    name = f"blocks.{base.layer}.hook_resid_pre"
    pairs = list(zip(rows.batches, base.recorded[rows.name], strict=True))[:n_batches]
    for (input_ids, mask), before in pairs:
        with record(handle, [name], stop=True) as seen:
            handle.hidden(input_ids, mask)
        if not torch.equal(seen[name].float(), before.resid):
            return False
    return True


def _reference(
    handle: ModelHandle, rows: Rows, layer: int, hooks: Sequence[str], progress: Progress | None
) -> Iterator[Recorded]:
    name = f"blocks.{layer}.hook_resid_pre"
    for index, batch in enumerate(rows.batches):
        acts, hidden = _forward(handle, batch, (name, *hooks))
        final = hidden[_compared(rows.name, batch[1])].float()
        yield Recorded(acts[name].float(), final, {hook: acts[hook].float() for hook in hooks})
        if progress is not None:
            progress(f"reference side, {rows.name}", (index + 1) / len(rows.batches))


def _forward(handle: ModelHandle, batch: Batch, hooks: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    with record(handle, hooks) as seen:
        hidden = handle.hidden(*batch)
    return seen, hidden


def _compared(name: str, mask: Tensor) -> Tensor:
    return mask.bool() if name == "far" else last_positions(mask)


def _norm_limit(rows: Rows, recorded: Sequence[Recorded], hook: str) -> float:
    """Five times the median norm over real tokens; the first token of a row is an attention sink and not counted."""
    norms = [
        side.acts[hook].norm(dim=-1)[used(mask)]
        for (_, mask), side in zip(rows.batches, recorded, strict=True)
    ]
    return OUTLIER * float(torch.cat(norms).median())


def used(mask: Tensor) -> Tensor:
    """Real tokens but the first of each row, (batch, seq) boolean."""
    kept = mask.bool().clone()
    kept[:, 0] = False
    return kept


def _head(handle: ModelHandle) -> nn.Module:
    head: nn.Module = handle.model.get_submodule(handle.architecture.unembedding)
    return head


def _module_digest(module: nn.Module) -> str:
    return digest_of({name: tensor_digest(parameter) for name, parameter in module.named_parameters()})


def check_layers(base: BaseSide, layers: Sequence[int]) -> None:
    """Raises BadRequestError for an edit below the layer that the reference side was recorded for."""
    if layers and min(layers) < base.layer:
        raise BadRequestError(
            f"the edit touches layer {min(layers)}, but the reference side starts at layer {base.layer}; "
            f"record it with layer={min(layers)}"
        )
