"""Passes that show hooks, or compute, only a part of each row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import POINTS, HookPoint, Replace, attach, on_input, on_output
from guardedit.models.installed import registry_of


@contextmanager
def last_position_only(handle: ModelHandle) -> Iterator[None]:
    """Let the last block's MLP compute each row's last position alone and put out zeros elsewhere.

    For passes of which the last position is all that is read: behind the last block no position looks at another.
    Hooks that are entered later see the zeros. With an activation edit installed, all positions are computed.
    """
    if registry_of(handle) is not None:
        yield
        return
    mlp = handle.block(handle.n_layers - 1).get_submodule(handle.architecture.mlp)
    before: list[int] = []

    def cut(activation: Tensor) -> Tensor:
        before[:] = [activation.shape[1] - 1]
        return activation[:, -1:]

    with ExitStack() as stack:
        stack.callback(mlp.register_forward_pre_hook(on_input(cut), with_kwargs=True).remove)
        pad = on_output(lambda output: nn.functional.pad(output, (0, 0, before[0], 0)))
        stack.callback(mlp.register_forward_hook(pad).remove)
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
