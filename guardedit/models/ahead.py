"""Reading a prompt ahead: what higher blocks make of it, before an edit below them acts.

A *twin* of the base model's lower part shares every parameter and buffer and has no hooks but its own: what it reads is
what the model says without activation edits, and no recording, patching or resuming of the pass at hand notices it.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from guardedit.errors import BadRequestError
from guardedit.models.hooks import HookPoint, StopForward, is_input, is_skipped, module_in

if TYPE_CHECKING:
    from guardedit.models.handle import ModelHandle

_TAKEN = ("input_ids", "attention_mask", "position_ids", "cache_position", "token_type_ids")
"""What the twin is given of a pass."""
_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
"""Ends of the names under which torch keeps a module's hooks."""


@dataclass(eq=False)
class _Keep:
    """Hook of the twin; an object, so that a deep copy has one of its own. Ends the pass where nothing is left."""

    ahead: Ahead
    point: HookPoint

    def __call__(self, _: nn.Module, args: Any, *rest: Any) -> None:
        if is_input(self.point):
            found = args[0] if args else rest[0]["hidden_states"]
        else:
            found = rest[0][0] if isinstance(rest[0], tuple) else rest[0]
        seen = self.ahead.seen[threading.get_ident()]
        seen[self.point] = found.detach()
        if len(seen) == len(self.ahead.points):
            raise StopForward


@dataclass(eq=False)
class Ahead:
    """The twin and where it is read."""

    points: tuple[HookPoint, ...]
    twin: Any = None
    seen: dict[int, dict[HookPoint, Tensor]] = field(default_factory=dict)
    """By thread: two may read at once."""

    @torch.no_grad()
    def read(self, given: Mapping[str, Any], cache: Any) -> dict[HookPoint, Tensor]:
        """The activations of a pass with these arguments; `cache` is a filled one, which stays as it is.

        Raises BadRequestError where a place was not reached.
        """
        taken = {name: given[name] for name in _TAKEN if given.get(name) is not None}
        found = self.seen[threading.get_ident()] = {}
        try:
            if cache is None:
                self.twin(**taken, use_cache=False)
            else:
                self.twin(**taken, past_key_values=copy.deepcopy(cache), use_cache=True)
        except StopForward:
            pass
        finally:
            del self.seen[threading.get_ident()]
        if len(found) < len(self.points):
            raise BadRequestError(
                "a gate that reads above its edit was not reached: a model whose blocks are run by other code "
                "(spread over devices) cannot be read ahead; use a gate at the edit's layer (gate_depth 0)"
            )
        return found


def ahead_of(handle: ModelHandle, points: Collection[HookPoint]) -> Ahead | None:
    """A reader of the points in the handle's model; None where there are none."""
    if not points:
        return None
    found = Ahead(tuple(sorted(points)))
    blocks = handle.model.get_submodule(handle.architecture.layers)
    shared: dict[int, nn.Module] = {}
    depth = max(point.layer for point in points) + 1
    found.twin = _twin(handle.model.base_model, blocks, depth, shared)
    for point in found.points:
        module = module_in(shared[id(handle.block(point.layer))], handle.architecture, point)
        if is_input(point):
            module.register_forward_pre_hook(_Keep(found, point), with_kwargs=True)
        else:
            module.register_forward_hook(_Keep(found, point))
    return found


def _twin(module: nn.Module, blocks: nn.Module, depth: int, made: dict[int, nn.Module]) -> nn.Module:
    """The module with the same parameters and buffers, children of its own, no hooks; `depth` blocks of `blocks`."""
    if id(module) in made:
        return made[id(module)]
    twin = made[id(module)] = module.__class__.__new__(module.__class__)
    state = {name: value for name, value in vars(module).items() if not name.startswith("_activation")}
    if is_skipped(module):
        del state["forward"]
    state |= {name: OrderedDict() for name in state if name.endswith(_HOOKS)}
    children = list(module._modules.items())[: depth if module is blocks else None]
    state["_modules"] = {
        name: None if child is None else _twin(child, blocks, depth, made) for name, child in children
    }
    state["training"] = False
    vars(twin).update(state)
    return twin
