"""Record, replace and resume activations of a plain Hugging Face model: context managers, no wrapper model.

Hook names are TransformerLens' canonical ones:

    blocks.{L}.hook_resid_pre    (batch, seq, d_model)   input of block L
    blocks.{L}.hook_attn_out     (batch, seq, d_model)   what attention L adds to the residual stream
    blocks.{L}.mlp.hook_post     (batch, seq, d_in)      input of the down projection: the space of edit keys
    blocks.{L}.mlp.out.hook_out  (batch, seq, d_model)   output of the down projection: the space of edit values
    blocks.{L}.hook_mlp_out      (batch, seq, d_model)   what MLP L adds to the residual stream
    blocks.{L}.hook_resid_post   (batch, seq, d_model)   output of block L

Where a family has a norm behind attention or MLP (Gemma 2, OLMo 2), what is added to the residual stream is that
norm's output; the space of edit values lies before it.

Hooks that are entered later see what earlier ones made of the activation: `patch` then `record` records the
patched one. Every context manager leaves the model without a trace, also when its body raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from guardedit.errors import BadRequestError

if TYPE_CHECKING:
    from guardedit.models.architectures import Architecture
    from guardedit.models.handle import ModelHandle

Replace = Callable[[Tensor], Tensor]

# In the order in which a block computes them. In parallel blocks (GPT-J, GPT-NeoX) attention and MLP do not depend on
# each other; attention comes first there too.
POINTS = (
    "hook_resid_pre",
    "hook_attn_out",
    "mlp.hook_post",
    "mlp.out.hook_out",
    "hook_mlp_out",
    "hook_resid_post",
)
_INPUTS = frozenset({"hook_resid_pre", "mlp.hook_post"})
_PATTERN = re.compile(r"blocks\.(\d+)\.(.+)")


class StopForward(Exception):
    """Ends a forward pass that has all needed activations; swallowed by the `record` that raised it."""


@dataclass(frozen=True, order=True)
class HookPoint:
    """A parsed hook name. Sorting follows the order of computation."""

    layer: int
    rank: int

    @classmethod
    def parse(cls, hook_name: str, n_layers: int) -> HookPoint:
        """Read a canonical hook name; raises BadRequestError for an unknown point or layer."""
        match = _PATTERN.fullmatch(hook_name)
        if match is None or match[2] not in POINTS:
            allowed = ", ".join(f"blocks.{{L}}.{point}" for point in POINTS)
            raise BadRequestError(f"unknown hook name {hook_name!r}; use one of {allowed}")
        if int(match[1]) >= n_layers:
            raise BadRequestError(f"{hook_name!r}: the model has layers 0 to {n_layers - 1}")
        return cls(int(match[1]), POINTS.index(match[2]))

    @property
    def point(self) -> str:
        """The name inside the block, `mlp.hook_post` for one."""
        return POINTS[self.rank]


def key_hook(layer: int) -> str:
    """Hook name of the space that edit keys of `layer` live in."""
    return f"blocks.{layer}.mlp.hook_post"


def rewrite_hook(layer: int) -> str:
    """Hook name of what the down projection of `layer` puts out: where a solved update adds ΔW x."""
    return f"blocks.{layer}.mlp.out.hook_out"


def mlp_hook(layer: int) -> str:
    """Hook name of what the MLP of `layer` adds to the residual stream."""
    return f"blocks.{layer}.hook_mlp_out"


@contextmanager
def record(
    handle: ModelHandle, hook_names: Sequence[str], *, stop: bool = False, detach: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Collect activations, each (batch, seq, d), of the last forward pass made inside the block.

    With `stop`, the forward pass ends as soon as every one of them was seen: the rest of the `with` body is
    skipped, so make the model call its last line. With `detach=False` gradients stay attached. All lie on
    `handle.device`, also those of a model that is spread over devices.
    Raises BadRequestError on leaving if a hook never saw a forward pass (an empty record is not a result).
    """
    points = {name: HookPoint.parse(name, handle.n_layers) for name in hook_names}
    if not points:
        raise BadRequestError("record needs at least one hook name")
    seen: dict[str, Tensor] = {}
    device, halt = handle.device, StopForward()

    def watcher(name: str) -> Replace:
        def watch(activation: Tensor) -> Tensor:
            seen[name] = (activation.detach() if detach else activation).to(device)
            if stop and len(seen) == len(points):
                raise halt
            return activation

        return watch

    with ExitStack() as stack:
        for name, point in points.items():
            stack.callback(attach(handle, point, watcher(name)).remove)
        try:
            yield seen
        except StopForward as raised:
            if raised is not halt:
                raise
    missing = [name for name in points if name not in seen]
    if missing:
        raise BadRequestError(f"nothing was recorded at {', '.join(missing)}: no forward pass reached it")


@contextmanager
def patch(handle: ModelHandle, hook_name: str, fn: Replace) -> Iterator[None]:
    """Replace an activation (batch, seq, d) by `fn(activation)` in every forward pass inside the block.

    `fn` returns a new tensor of the same shape; it must not write into the one it is given.
    """
    point = HookPoint.parse(hook_name, handle.n_layers)

    def replace(activation: Tensor) -> Tensor:
        result = fn(activation)
        if result.shape != activation.shape:
            raise BadRequestError(
                f"a patch of {hook_name} gave shape {list(result.shape)}, expected {list(activation.shape)}"
            )
        return result.to(activation.device)

    hook = attach(handle, point, replace)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def patch_embedding(handle: ModelHandle, fn: Replace) -> Iterator[None]:
    """Replace the token embedding's output (batch, seq, d_model) by `fn(output)` in every pass inside the block.

    What a family adds or scales after it (learned positions, a norm) comes on top. `fn` returns a new tensor.
    """
    module = handle.model.get_submodule(handle.architecture.embedding)
    hook = module.register_forward_hook(on_output(fn))
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class _Skip:
    """Stands in for the forward of a block that `resume` skips: hands its input on."""

    returns_tuple: bool

    def __call__(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor, None]:
        return (hidden_states, None) if self.returns_tuple else hidden_states


@contextmanager
def resume(handle: ModelHandle, layer: int, hidden: Tensor) -> Iterator[None]:
    """Start forward passes at block `layer` with `hidden` (batch, seq, d_model); gradients flow from it.

    Call the model with the input_ids and attention_mask that `hidden` was recorded with: they still set
    positions and the mask. Blocks below `layer` do nothing, and recording inside them raises BadRequestError.
    """
    HookPoint.parse(f"blocks.{layer}.hook_resid_pre", handle.n_layers)
    skipped = [handle.block(index) for index in range(layer)]
    if any(is_skipped(block) for block in skipped):
        raise BadRequestError("resume cannot be nested in another resume")
    with ExitStack() as stack:
        for block in skipped:
            stack.callback(_put_back, block, vars(block).get("forward"))
            vars(block)["forward"] = _Skip(handle.architecture.returns_tuple)
        stack.enter_context(patch(handle, f"blocks.{layer}.hook_resid_pre", lambda _: hidden))
        yield


def _put_back(block: nn.Module, forward: Any) -> None:
    """Undo what `resume` did to a block, which may have had a forward of its own (accelerate gives it one)."""
    if forward is None:
        del vars(block)["forward"]
    else:
        vars(block)["forward"] = forward


def module_at(handle: ModelHandle, point: HookPoint) -> nn.Module:
    """The module whose input or output is the activation."""
    return module_in(handle.block(point.layer), handle.architecture, point)


def module_in(block: nn.Module, row: Architecture, point: HookPoint) -> nn.Module:
    """The same inside a block of a family."""
    paths = {
        "hook_attn_out": row.post_attention_norm or row.attention,
        "mlp.hook_post": row.rewrite_module,
        "mlp.out.hook_out": row.rewrite_module,
        "hook_mlp_out": row.post_mlp_norm or row.mlp,
    }
    path = paths.get(point.point)
    return block if path is None else block.get_submodule(path)


def is_input(point: HookPoint) -> bool:
    """Whether the activation is what `module_at` is given, not what it puts out."""
    return point.point in _INPUTS


def is_skipped(module: nn.Module) -> bool:
    """Whether `resume` lets the module hand its input on, so that its activations do not exist."""
    return isinstance(vars(module).get("forward"), _Skip)


def attach(handle: ModelHandle, point: HookPoint, fn: Replace, *, first: bool = False) -> Any:
    """Register `fn` at the point, behind all others or before them, and return torch's removable handle."""
    module = module_at(handle, point)
    if is_input(point):
        return module.register_forward_pre_hook(on_input(fn), prepend=first, with_kwargs=True)
    return module.register_forward_hook(on_output(fn), prepend=first)


def on_input(fn: Replace) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A forward pre-hook that hands `fn` what the module is given."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        _refuse_skipped(module)
        if args:
            return (fn(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": fn(kwargs["hidden_states"])}

    return hook


def on_output(fn: Replace) -> Callable[..., Any]:
    """A forward hook that hands `fn` what the module puts out."""

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        _refuse_skipped(module)
        # Attention modules return (output, weights); blocks and MLPs return a tensor.
        return (fn(output[0]), *output[1:]) if isinstance(output, tuple) else fn(output)

    return hook


def _refuse_skipped(module: nn.Module) -> None:
    if is_skipped(module):
        raise BadRequestError(
            "this block is skipped by resume(): its activations do not exist in this forward pass"
        )
