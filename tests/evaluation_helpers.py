"""What more than one test of the evaluation needs."""

from __future__ import annotations

import torch
from conftest import SENTENCES

from guardedit.models.handle import ModelHandle


def spoken(handle: ModelHandle) -> tuple[str, str]:
    """A prompt and the one-token word that the model says after it when decoding greedily."""
    for sentence in SENTENCES:
        words = sentence.split()
        for end in range(2, len(words)):
            prompt = " ".join(words[:end])
            with torch.no_grad():
                token = int(handle.model(handle.encode([prompt])["input_ids"]).logits[0, -1].argmax())
            word = handle.tokenizer.decode([token])
            if not word.startswith(" ") or not word.strip().isalnum():
                continue
            pair = handle.encode_pairs([prompt], [word])
            if pair["input_ids"][pair["target_mask"]].tolist() == [token]:
                return prompt, word.strip()
    raise LookupError("the tiny model never says a word; take another seed for it")
