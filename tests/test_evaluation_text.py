"""Fluency and consistency by hand, and generated text that is the model's own."""

from __future__ import annotations

import math

import pytest
import torch
from evaluation_helpers import spoken

from guardedit.evaluation.asking import holds
from guardedit.evaluation.fluency import consistency, fluency, n_gram_entropy, words
from guardedit.evaluation.generation import continuations, texts
from guardedit.models.handle import ModelHandle


def test_n_gram_entropy_by_hand() -> None:
    # "a b a b a": bigrams ab, ba, ab, ba -> 1 bit; trigrams aba, bab, aba -> 2/3 and 1/3.
    thirds = 2 / 3 * math.log2(3 / 2) + 1 / 3 * math.log2(3)
    expected = 100 * (2 / 3 * 1.0 + 4 / 3 * thirds) / 2
    assert n_gram_entropy("a b a b a") == pytest.approx(expected)


def test_different_words_have_the_entropy_of_a_uniform_draw() -> None:
    text = " ".join(f"w{i}" for i in range(18))  # 17 bigrams, 16 trigrams
    assert n_gram_entropy(text) == pytest.approx(100 * (2 / 3 * math.log2(17) + 4 / 3 * 4) / 2)


def test_a_text_that_repeats_itself_is_less_fluent_and_a_short_one_has_no_value() -> None:
    varied, stuck = "one two three four five six seven", "one two one two one two one"
    assert (n_gram_entropy(varied) or 0) > (n_gram_entropy(stuck) or 0)
    assert n_gram_entropy("no no no no no no") == 0.0
    assert n_gram_entropy("two words") is None
    assert fluency(["two words"]) is None
    assert fluency([varied, "two words"]) == n_gram_entropy(varied)


def test_punctuation_counts_as_words() -> None:
    assert words("Well, it's 3.5!") == ["Well", ",", "it", "'", "s", "3", ".", "5", "!"]


def test_consistency_is_a_cosine_of_tf_idf_vectors() -> None:
    corpus = ["paris france river", "rome italy river"]
    assert consistency(["paris france river"], ["paris france river"], corpus) == pytest.approx(1.0)
    assert consistency(["rome italy"], ["paris france"], corpus) == 0.0
    # Of the three texts, two hold "paris", one "rome" and all "river"; smoothed idf is ln((1 + 3) / (1 + df)) + 1.
    paris, rome, river = math.log(4 / 3) + 1, math.log(4 / 2) + 1, 1.0
    by_hand = river**2 / (math.hypot(rome, river) * math.hypot(paris, river))
    found = consistency(["rome river"], ["paris river"], ["paris river", "rome river"])
    assert found == pytest.approx(by_hand)
    assert consistency([], ["x"], corpus) is None
    assert consistency(["x"], [], corpus) is None


@pytest.mark.parametrize(
    ("text", "answers", "found"),
    [
        (" Paris, of course.", ("Paris",), True),
        ("It is in PARIS", ("London", "paris"), True),
        ("Parisian life", ("Paris",), False),
        ("the New  York, Times", ("New York Times",), True),
        ("York New", ("New York",), False),
        ("anything", ("?!",), False),
        ("anything", (), False),
    ],
)
def test_an_answer_is_found_as_whole_words(text: str, answers: tuple[str, ...], found: bool) -> None:
    assert holds(text, answers) is found


def test_greedy_text_is_what_the_model_says_one_token_at_a_time(tiny: ModelHandle) -> None:
    prompts = ["The Eiffel Tower is", "Marie Curie was born in Warsaw and", "Berlin"]
    together = continuations(tiny, prompts, 5)
    for prompt, text in zip(prompts, together, strict=True):
        ids = tiny.encode([prompt])["input_ids"]
        new: list[int] = []
        for _ in range(5):
            with torch.no_grad():
                new.append(
                    int(
                        tiny.model(torch.cat([ids, torch.tensor([new], dtype=torch.long)], 1))
                        .logits[0, -1]
                        .argmax()
                    )
                )
            if new[-1] == tiny.tokenizer.eos_token_id:
                break
        assert text == tiny.tokenizer.decode(new, skip_special_tokens=True)


def test_greedy_text_begins_with_a_target_that_is_greedy(tiny_llama: ModelHandle) -> None:
    prompt, said = spoken(tiny_llama)
    assert continuations(tiny_llama, [prompt], 1)[0].strip() == said


def test_sampled_text_is_seeded_keeps_its_prompt_and_its_length(tiny_llama: ModelHandle) -> None:
    prompts = ["The capital of Italy is", "Berlin is"]
    state = torch.get_rng_state()
    once, again, other = (texts(tiny_llama, prompts, seed, length=20) for seed in (1, 1, 2))
    assert once == again != other
    assert torch.equal(torch.get_rng_state(), state)
    for prompt, text in zip(prompts, once, strict=True):
        assert text.startswith(prompt)
        assert len(tiny_llama.encode([prompt])["input_ids"][0]) < 20
