"""Control text: two halves without a text in common, the same for the same seed, free to ship."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from guardedit.errors import BadRequestError, MissingStatisticsError
from guardedit.evaluation.readers import control_facts
from guardedit.models import tokens
from guardedit.models.control import (
    DOMAINS,
    PYTHON_FILES,
    Half,
    control_digest,
    control_texts,
    load_facts,
    next_tokens,
    prepared_folder,
)
from guardedit.models.control_making import make_control
from guardedit.models.handle import ModelHandle


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GUARDEDIT_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_halves_share_no_text(tiny_llama: ModelHandle, domain: str) -> None:
    first = control_texts(tiny_llama, domain, 8000, half="calibrate")
    second = control_texts(tiny_llama, domain, 8000, half="test")
    assert first and second
    assert not set(first) & set(second)


def test_the_halves_of_arithmetic_share_no_line_whatever_their_seeds(tiny_llama: ModelHandle) -> None:
    def lines(seed: int, half: Half) -> set[str]:
        return {
            line
            for text in control_texts(tiny_llama, "arithmetic", 4000, seed, half)
            for line in text.splitlines()
        }  # type: ignore[arg-type]

    assert not lines(0, "calibrate") & lines(5, "test")


def test_no_file_of_the_standard_library_is_in_both_halves() -> None:
    assert not set(PYTHON_FILES["calibrate"]) & set(PYTHON_FILES["test"])


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_seed_decides_the_order_and_n_how_much(tiny_llama: ModelHandle, domain: str) -> None:
    def take(n: int, seed: int = 0) -> list[str]:
        return control_texts(tiny_llama, domain, n, seed)

    few, more = take(500), take(1500)
    assert more[: len(few)] == few and len(more) > len(few)
    counts = [len(tokens.tokenise(tiny_llama, text).ids) for text in few]
    assert sum(counts) >= 500 > sum(counts[:-1])
    assert take(500, seed=1) != few == take(500)
    assert control_digest(few) == control_digest(take(500)) != control_digest(more)


def test_every_sum_of_the_arithmetic_is_right(tiny_llama: ModelHandle) -> None:
    text = "\n".join(control_texts(tiny_llama, "arithmetic", 3000))
    sums = re.findall(r"^(\d+) ([-+*]) (\d+) = (\d+)$", text, re.MULTILINE)
    boxes = re.findall(r"holds (\d+) apples, then (\d+) boxes hold (\d+)", text)
    results = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    assert len(sums) > 20 and len(boxes) > 5
    assert all(results[sign](int(a), int(b)) == int(c) for a, sign, b, c in sums)
    assert all(int(a) * int(b) == int(c) for a, b, c in boxes)


def test_chat_goes_through_the_models_own_template(tiny_llama: ModelHandle) -> None:
    for text in control_texts(tiny_llama, "chat", 500):
        assert text.startswith("<|user|>\n") and "<|assistant|>\n" in text


def test_unknown_domains_and_halves_are_refused(tiny_llama: ModelHandle) -> None:
    with pytest.raises(BadRequestError, match="poetry"):
        control_texts(tiny_llama, "poetry", 10)
    with pytest.raises(BadRequestError, match="third"):
        control_texts(tiny_llama, "prose", 10, half="third")  # type: ignore[arg-type]


def test_facts_are_complete_and_flagged() -> None:
    everything, known = load_facts(known_only=False), load_facts()
    assert 150 <= len(known) < len(everything)
    assert all(fact.known for fact in known)
    for fact in everything:
        assert fact.prompt.count("{}") == 1 and fact.subject in fact.filled and fact.answer
    assert len({(fact.subject, fact.relation) for fact in everything}) == len(everything)


def test_the_shipped_control_text_is_small_and_long_enough() -> None:
    folder = Path(str(files("guardedit") / "assets" / "smollm2-135m" / "control"))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_500_000
    rows = [json.loads(line) for line in (folder / "prose.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) >= 120 and all(len(row["text"]) > 20 for row in rows)


def test_control_text_made_for_a_model_is_the_one_it_gets(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    folder = make_control(
        tiny_llama, rounds=1, length=12, progress=lambda domain, n: told.append((domain, n))
    )
    assert folder == prepared_folder(tiny_llama)
    assert {domain for domain, _ in told} == {"prose", "chat", "facts"}
    rows = [json.loads(line)["text"] for line in (folder / "prose.jsonl").read_text("utf-8").splitlines()]
    halves = [control_texts(tiny_llama, "prose", 10**6, half=half) for half in ("calibrate", "test")]
    assert sorted(itertools.chain(*halves)) == sorted(rows)
    again = make_control(tiny_llama, tmp_path / "again", rounds=1, length=12)
    for name in ("prose.jsonl", "chat.jsonl", "facts.jsonl"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_a_model_of_another_world_is_asked_its_own_facts(tiny_llama: ModelHandle, tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    record = {
        "subject": "Oslo", "prompt": "{} is the capital of", "target_new": {"str": "Peru"},
        "target_true": {"str": "Norway"},
    }  # fmt: skip
    lines = [{"case_id": n, "requested_rewrite": {**record, "subject": f"Oslo{n}"}} for n in range(5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    named = control_facts(path, 3)
    assert len(named) == 3 and {fact.answer for fact in named} == {"Norway"}
    (top,) = next_tokens(tiny_llama, [named[0].filled])
    said = tiny_llama.tokenizer.decode([top]).strip() or "x"
    right = replace(named[0], answer=said)
    make_control(tiny_llama, rounds=1, length=4, facts=[right, *named[1:]])
    kept = load_facts(tiny_llama, known_only=False)
    assert [fact.subject for fact in kept] == [fact.subject for fact in named]
    assert kept[0].known == (said != "x")


def test_broken_control_text_says_how_to_make_it_again(tiny_llama: ModelHandle) -> None:
    folder = prepared_folder(tiny_llama)
    folder.mkdir(parents=True)
    (folder / "prose.jsonl").write_text('{"text": "whole"}\n{"text": "bro', "utf-8")
    with pytest.raises(MissingStatisticsError, match="guardedit stats control"):
        control_texts(tiny_llama, "prose", 100)
