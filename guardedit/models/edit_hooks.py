"""The hooks through which a model's registry of activation edits works.

They are objects and not functions: a deep copy of the model then gets hooks of its own registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from guardedit.models.hooks import HookPoint, is_input, is_skipped, module_at

if TYPE_CHECKING:
    from guardedit.models.handle import ModelHandle
    from guardedit.models.installed import Registry


@dataclass(eq=False)
class Begin:
    """Pre-hook of the base model."""

    registry: Registry

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.registry.begin(module, args, kwargs)


@dataclass(eq=False)
class End:
    """Hook behind the base model, also where its pass is broken off."""

    registry: Registry

    def __call__(self, _: nn.Module, __: Any, output: Any) -> None:
        self.registry.end(output)


@dataclass(eq=False)
class Input:
    """Hook on what a module is given."""

    registry: Registry
    point: HookPoint

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_skipped(module):
            return None
        given = args[0] if args else kwargs["hidden_states"]
        changed = self.registry.at(self.point, given, given)
        if changed is given:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})


@dataclass(eq=False)
class Output:
    """Hook on what a module puts out."""

    registry: Registry
    point: HookPoint

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if is_skipped(module):
            return None
        first: Tensor = output[0] if isinstance(output, tuple) else output
        given: Tensor = args[0] if args else kwargs["hidden_states"]
        changed = self.registry.at(self.point, first, given)
        if changed is first:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


@dataclass(eq=False)
class Generate:
    """Stands before a model's `generate` and tells the passes inside where the prompt ends."""

    registry: Registry
    model: Any
    before: Callable[..., Any] | None
    """A `generate` that the model object had of its own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        thread = self.registry.thread
        outer, thread.prompt_width = thread.prompt_width, _prompt_width(args, kwargs)
        try:
            own = self.before
            return own(*args, **kwargs) if own else type(self.model).generate(self.model, *args, **kwargs)
        finally:
            thread.prompt_width = outer


def _prompt_width(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Columns of the prompt that `generate` is called with; without one it begins with a single token."""
    for given in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(given, Tensor):
            return int(given.shape[1])
    return 1


def attach_at(handle: ModelHandle, point: HookPoint, registry: Registry) -> Any:
    """Register the registry at a point, in front of all other hooks, and return torch's removable handle."""
    module = module_at(handle, point)
    if is_input(point):
        return module.register_forward_pre_hook(Input(registry, point), prepend=True, with_kwargs=True)
    return module.register_forward_hook(Output(registry, point), prepend=True, with_kwargs=True)
