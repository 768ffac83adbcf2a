"""Text in, rows of tokens out; and text sampled from the model itself."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES

from guardedit.errors import BadRequestError
from guardedit.models.corpus import MIN_ROW, corpus_digest, read_texts, sample_texts, tokenise_chunks
from guardedit.models.handle import ModelHandle

TEXTS = [" ".join(SENTENCES), SENTENCES[0], "too short", "   "]


def test_every_format_gives_the_same_texts(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": text, "id": 1}) for text in SENTENCES) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (tmp_path / "a.txt").write_text("one text\nof two lines")
    assert (
        list(read_texts(tmp_path / "a.jsonl")) == list(read_texts(tmp_path / "a.jsonl.xz")) == list(SENTENCES)
    )
    assert list(read_texts(tmp_path / "a.txt")) == ["one text\nof two lines"]


@pytest.mark.parametrize("line", ['{"txt": "a"}', '{"text": 3}', '["a"]', "not json"])
def test_a_line_without_text_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(BadRequestError, match=r"a\.jsonl line 2"):
        list(read_texts(tmp_path / "a.jsonl"))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text")
    for name, complaint in (("a.csv", "jsonl"), ("b.txt", "no text file")):
        with pytest.raises(BadRequestError, match=complaint):
            list(read_texts(tmp_path / name))


def test_rows_hold_each_text_in_order_and_nothing_else(tiny_llama: ModelHandle) -> None:
    rows = [
        ids[mask.bool()].tolist()
        for batch in tokenise_chunks(tiny_llama, TEXTS, length=32, batch_size=3)
        for ids, mask in zip(*batch, strict=True)
    ]
    expected = []
    for text in TEXTS:
        ids = tiny_llama.tokenizer(text)["input_ids"]
        pieces = [ids[start : start + 32] for start in range(0, len(ids), 32)]
        expected += [piece for piece in pieces if len(piece) >= MIN_ROW]
    assert rows == expected and len(rows) > 3


def test_a_corpus_has_one_digest_and_it_notices_one_token(tiny_llama: ModelHandle) -> None:
    def digest(texts: list[str], length: int = 32) -> str:
        return corpus_digest(tokenise_chunks(tiny_llama, texts, length))

    assert digest(TEXTS) == digest(TEXTS)
    assert len({digest(TEXTS), digest(TEXTS[::-1]), digest(TEXTS, 33), digest([TEXTS[0] + "."])}) == 4


def test_a_row_length_the_model_cannot_take_is_refused(tiny_llama: ModelHandle) -> None:
    for length in (MIN_ROW - 1, 257):
        with pytest.raises(BadRequestError, match="16 to 256"):
            list(tokenise_chunks(tiny_llama, TEXTS, length))


def test_the_same_seed_samples_the_same_texts_and_leaves_no_trace(tiny: ModelHandle) -> None:
    rng = torch.get_rng_state()
    first = sample_texts(tiny, 5, 12, seed=1, batch_size=2)
    assert torch.equal(torch.get_rng_state(), rng)
    torch.manual_seed(99)
    assert sample_texts(tiny, 5, 12, seed=1, batch_size=2) == first
    assert sample_texts(tiny, 5, 12, seed=2, batch_size=2) != first
    assert len(first) == 5


def test_cold_sampling_is_greedy_decoding(every_family: ModelHandle) -> None:
    """Against a greedy loop without cache or padding: the cache, the positions and the padding are right."""
    prompts = ["The capital of France is", "Alan"]
    texts = sample_texts(every_family, 4, 10, seed=0, prompts=prompts, temperature=1e-6)
    assert texts[:2] == texts[2:]
    for prompt, text in zip(prompts, texts, strict=False):
        ids = every_family.encode([prompt])["input_ids"]
        for _ in range(10):
            with torch.no_grad():
                ids = torch.cat([ids, every_family.model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) == every_family.tokenizer.eos_token_id:
                break
        assert text == every_family.tokenizer.decode(ids[0], skip_special_tokens=True)
        assert text.startswith(prompt)
