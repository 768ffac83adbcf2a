"""Tokenising, padding, scoring targets: the only place that knows of spaces, padding sides and offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guardedit.errors import BadRequestError
from guardedit.models.installed import deciding

if TYPE_CHECKING:
    from guardedit.models.handle import ModelHandle


@dataclass(frozen=True)
class Tokens:
    """One text's token ids and the (start, end) characters that each covers."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def tokenise(handle: ModelHandle, text: str) -> Tokens:
    """Tokenise one text with the tokenizer's own special tokens, but no second BOS before a written one.

    Raises BadRequestError for a text without any token.
    """
    bos = handle.tokenizer.bos_token
    written_out = bool(bos) and text.startswith(bos)
    encoded = handle.tokenizer(
        text,
        add_special_tokens=not written_out,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    if not encoded["input_ids"]:
        raise BadRequestError(f"the text {text!r} has no tokens")
    return Tokens(list(encoded["input_ids"]), [tuple(pair) for pair in encoded["offset_mapping"]])


def pad(handle: ModelHandle, rows: Sequence[Tokens], side: str = "right") -> dict[str, Tensor]:
    """Pad to one length: `input_ids`, `attention_mask` (batch, seq), `offsets` (…, 2); zeros where padded."""
    if side not in ("left", "right"):
        raise BadRequestError(f"padding side {side!r} is neither 'left' nor 'right'")
    if not rows:
        raise BadRequestError("no texts to encode")
    width = max(len(row.ids) for row in rows)
    if width > handle.context_length:
        raise BadRequestError(
            f"a text of {width} tokens is longer than the model's context of {handle.context_length}"
        )
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_id(handle), dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    offsets = torch.zeros((*shape, 2), dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row.ids)) if side == "right" else slice(width - len(row.ids), width)
        input_ids[index, where] = torch.tensor(row.ids)
        attention_mask[index, where] = 1
        offsets[index, where] = torch.tensor(row.offsets)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "offsets": offsets}
    return {name: tensor.to(handle.device) for name, tensor in batch.items()}


def pad_id(handle: ModelHandle) -> int:
    """A token id to pad with; masked everywhere, so any will do where the tokenizer names none."""
    for candidate in (handle.tokenizer.pad_token_id, handle.tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions (batch, seq) counted from each row's first real token, whichever side the padding is on."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def join(prompt: str, target: str) -> str:
    """Prompt and target with a space between, unless the prompt ends in white space, as chat templates do."""
    spaced = target.strip()
    if not spaced:
        raise BadRequestError(f"the target for prompt {prompt!r} is empty")
    return prompt + (spaced if not prompt or prompt[-1].isspace() else f" {spaced}")


def encode_pairs(handle: ModelHandle, prompts: Sequence[str], targets: Sequence[str]) -> dict[str, Tensor]:
    """`encode` of prompt plus target, right-padded, with a boolean `target_mask` (batch, seq) beside.

    The two are tokenised as one text and told apart by character offsets: tokenising the pieces alone gives
    other tokens wherever a tokenizer treats the start of a text specially.
    """
    if len(prompts) != len(targets):
        raise BadRequestError(f"{len(prompts)} prompts but {len(targets)} targets")
    batch = pad(handle, [tokenise(handle, join(p, t)) for p, t in zip(prompts, targets, strict=True)])
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=batch["offsets"].device)
    after = batch["offsets"][..., 1] > lengths[:, None]
    batch["target_mask"] = after & batch["attention_mask"].bool()
    return batch


def token_logprobs(
    handle: ModelHandle, prompts: Sequence[str], targets: Sequence[str], batch_size: int
) -> list[Tensor]:
    """Log-probabilities in nats of each target's tokens, float32; batched by length, returned in order."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]) + len(targets[index]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        batch = encode_pairs(handle, [prompts[i] for i in chunk], [targets[i] for i in chunk])
        found.update(zip(chunk, _target_logprobs(handle, batch), strict=True))
    return [found[index] for index in range(len(prompts))]


@torch.no_grad()
def _target_logprobs(handle: ModelHandle, batch: dict[str, Tensor]) -> list[Tensor]:
    """Per row, the log-probabilities of the masked tokens, each read one position earlier."""
    input_ids, mask = batch["input_ids"], batch["target_mask"]
    if bool(mask[:, 0].any()):
        raise BadRequestError("a target needs at least one token before it; give a non-empty prompt")
    with deciding(handle, batch["attention_mask"].bool() & ~mask):
        hidden = handle.hidden(input_ids, batch["attention_mask"])
    before = torch.zeros_like(mask)
    before[:, :-1] = mask[:, 1:]
    logprobs = handle.logits_at(hidden, before).float().log_softmax(-1)
    chosen = logprobs.gather(-1, input_ids[mask][:, None])[:, 0]
    return list(chosen.split(mask.sum(1).tolist()))
