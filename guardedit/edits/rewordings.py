"""Shorter wordings of a prompt by rule: a value that answers to them is not tied to one sentence.

A small model cannot paraphrase, but what makes a prompt ask for its relation is in few of its words; leaving others out
gives prompts that still ask for it.
"""

from __future__ import annotations


def rewordings(prompt: str) -> tuple[str, ...]:
    """Up to four prompts made of the words behind the `{}` of `prompt`, each with one `{}`; none where nothing follows.

    The second half of the words, the last word alone, every second word counted from the last, and all of them behind
    "About {}:".
    """
    at = prompt.index("{}") + 2
    head, words = prompt[:at], prompt[at:].split()
    if not words or not prompt[at:].startswith(" "):
        return ()
    every_second = words[(len(words) - 1) % 2 :: 2]
    made = [
        f"{head} {' '.join(words[len(words) // 2 :])}",
        f"{head}, {words[-1]}",
        f"{head} {' '.join(every_second)}",
        f"About {{}}: {' '.join(words)}",
    ]
    return tuple(text for text in dict.fromkeys(made) if text != prompt)
