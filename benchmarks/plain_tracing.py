"""Causal tracing in the plainest way: one restoration, one forward pass over clean and corrupted rows together.

As the protocol is published (Meng et al. 2022): row 0 is clean, the others have a corrupted subject; at the restored
token the others take row 0's state. The reference that `guardedit.models.tracing` is tested and timed against.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from guardedit.models.corrupting import noise, subject_tokens
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import patch, patch_embedding
from guardedit.models.tracing import Fact, TraceSettings, window_at, window_of

POINTS = {"residual": "hook_resid_post", "mlp": "hook_mlp_out", "attention": "hook_attn_out"}


def plain_probabilities(
    handle: ModelHandle,
    fact: Fact,
    std: float,
    settings: TraceSettings,
    token: int = 0,
    hooks: tuple[str, ...] = (),
) -> Tensor:
    """Probability of the clean row's top-1 token in every row, row 0 clean, with `hooks` restored at `token`."""
    encoded = handle.encode([fact.filled])
    first, end = subject_tokens(fact, encoded["offsets"][0])
    rows = settings.samples + 1
    ids, mask = (encoded[name].expand(rows, -1) for name in ("input_ids", "attention_mask"))

    def corrupt(embedded: Tensor) -> Tensor:
        moved = embedded.clone()
        drawn = torch.from_numpy(noise(settings, end - first, embedded.shape[-1]))
        moved[1:, first:end] += (settings.noise_factor * std * drawn).to(embedded)
        return moved

    def restore(activation: Tensor) -> Tensor:
        restored = activation.clone()
        restored[1:, token] = activation[0, token]
        return restored

    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(patch_embedding(handle, corrupt))
        for name in hooks:
            stack.enter_context(patch(handle, name, restore))
        logits = handle.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1].float()
    answer = int(logits[0].argmax())
    return logits.softmax(-1)[:, answer].double()


def plain_trace(
    handle: ModelHandle,
    fact: Fact,
    std: float,
    settings: TraceSettings,
    wanted: Callable[[str, int, int], bool] = lambda kind, token, layer: True,
) -> dict[tuple[str, int, int], float]:
    """(kind, token, layer) -> mean probability of the answer, for those that `wanted` names."""
    n_tokens = handle.encode([fact.filled])["input_ids"].shape[1]
    window = settings.window or window_of(handle.n_layers)
    found = {}
    for kind in settings.kinds:
        for layer in range(settings.every // 2, handle.n_layers, settings.every):
            span = [layer] if kind == "residual" else window_at(layer, window, handle.n_layers)
            hooks = tuple(f"blocks.{at}.{POINTS[kind]}" for at in span)
            for token in range(n_tokens):
                if wanted(kind, token, layer):
                    rows = plain_probabilities(handle, fact, std, settings, token, hooks)
                    found[kind, token, layer] = float(rows[1:].mean())
    return found
