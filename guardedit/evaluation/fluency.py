"""Whether generated text still reads like text, and like text about the new object (Meng et al. 2022, appendix B)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

_WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""Length of the n-gram -> weight; the weighted entropies are averaged over the two lengths."""


def words(text: str) -> list[str]:
    """Words, and punctuation marks one by one."""
    return re.findall(r"\w+|[^\w\s]", text)


def n_gram_entropy(text: str) -> float | None:
    """Weighted mean of the entropies of a text's bigrams and trigrams, in hundredths of a bit as papers print it.

    (2/3·H₂ + 4/3·H₃) / 2 · 100. A text that repeats itself has few different n-grams and so a low value. None for a
    text of fewer than three words.
    """
    tokens = words(text)
    if len(tokens) < max(_WEIGHTS):
        return None
    weighted = [weight * _entropy_bits(tokens, n) for n, weight in _WEIGHTS.items()]
    return 100 * fmean(weighted)


def fluency(texts: Sequence[str]) -> float | None:
    """Mean `n_gram_entropy` of the texts that are long enough to have one."""
    known = [value for text in texts if (value := n_gram_entropy(text)) is not None]
    return fmean(known) if known else None


def _entropy_bits(tokens: Sequence[str], n: int) -> float:
    counts = Counter(tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1))
    total = sum(counts.values())
    return sum(count / total * math.log2(total / count) for count in counts.values())


def consistency(texts: Sequence[str], references: Sequence[str], corpus: Sequence[str]) -> float | None:
    """Cosine of the TF-IDF vectors of all texts together and all references together, 0 to 1; None without either.

    `corpus`: texts that document frequencies are counted in, the references of every case of the run.
    """
    if not texts or not references:
        return None
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectoriser = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b").fit([*corpus, *references])
    rows = vectoriser.transform([" ".join(texts), " ".join(references)])
    return float(rows[0].multiply(rows[1]).sum())
