"""Passes that show hooks, or compute, only a part of each row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor

from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import POINTS, HookPoint, Replace, attach, on_input, on_output
from guardedit.models.installed import registry_of


@contextmanager
def mlp_only_at(handle: ModelHandle, layer: int, keep: Bool[Tensor, "batch seq"]) -> Iterator[None]:
    """Let the MLP of block `layer` compute the positions in `keep` alone and put out zeros elsewhere.

    For passes that read no other: an MLP looks at one position at a time. Hooks that are entered later see the zeros.
    With an activation edit installed, all positions are computed.
    """
    if registry_of(handle) is not None:
        yield
        return
    mlp = handle.block(layer).get_submodule(handle.architecture.mlp)

    def pad(output: Tensor) -> Tensor:
        whole = output.new_zeros(*keep.shape, output.shape[-1])
        whole[keep.to(output.device)] = output[0]
        return whole

    with ExitStack() as stack:
        cut = on_input(lambda activation: activation[keep.to(activation.device)][None])
        stack.callback(mlp.register_forward_pre_hook(cut, with_kwargs=True).remove)
        stack.callback(mlp.register_forward_hook(on_output(pad)).remove)
        yield


@contextmanager
def only_from(handle: ModelHandle, start: int, layer: int) -> Iterator[None]:
    """Let hooks that were entered before, at block `layer` and above, see only the positions from `start` on.

    What they make of those goes on behind what stands before. Hooks that are entered later see whole rows, and so do
    activation edits.
    """
    registry = registry_of(handle)
    with ExitStack() as stack:
        for index in range(layer, handle.n_layers) if start else ():
            for rank in range(len(POINTS)):
                cut, join = _cut_and_join(start)
                stack.callback(attach(handle, HookPoint(index, rank), cut, first=True).remove)
                stack.callback(attach(handle, HookPoint(index, rank), join).remove)
        if registry is not None:
            registry.to_front(handle)
        yield


def _cut_and_join(start: int) -> tuple[Replace, Replace]:
    held: list[Tensor] = []

    def cut(activation: Tensor) -> Tensor:
        held[:] = [activation[:, :start]]
        return activation[:, start:]

    return cut, lambda rest: torch.cat([*held, rest], 1)
