"""Plain words for a report: numbers, units, metric names, and text that cannot hide anything."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime

from guardedit.records import Decision, Outcome, Scope, Verdict

# Letters and marks that draw nothing although Unicode calls them letters, marks or symbols.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")


def _hidden(character: str) -> bool:
    if character == " ":
        return False
    category = unicodedata.category(character)
    selector = "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
    return category[0] == "C" or category in ("Zl", "Zp", "Zs") or character in _BLANK or selector


def visible(text: str) -> str:
    """The text with every character that a reader could not see, or that reorders others, as its code point."""
    return "".join(f"⟨U+{ord(c):04X}⟩" if _hidden(c) else c for c in text)


def excerpt(text: str, limit: int = 90) -> str:
    """Text from a corpus on one line: line breaks as ⏎, tabs as ⇥, the rest as `visible`, the end kept."""
    line = visible(text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", "⇥"))
    return line if len(line) <= limit else "…" + line[-(limit - 1) :]


def mixed_scripts(text: str) -> str | None:
    """A remark when letters of several scripts stand together, as in a Latin word with one Cyrillic letter."""
    letters = [c for c in text if c.isalpha() and not _hidden(c)]
    scripts = sorted({unicodedata.name(c, "UNKNOWN").split()[0] for c in letters})
    if len(scripts) < 2 or "LATIN" not in scripts:
        return None
    foreign = [c for c in letters if not unicodedata.name(c, "UNKNOWN").startswith("LATIN")]
    points = ", ".join(f"{c} U+{ord(c):04X}" for c in dict.fromkeys(foreign))
    return f"“{visible(text)}” mixes letters of several scripts ({points}): look-alikes are possible."


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits; "not measured" for None or a value that is not finite."""
    if value is None or not math.isfinite(value):
        return "not measured"
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.{digits}g}"


def quantity(value: float | None, unit: str, digits: int = 4) -> str:
    """A number as a person reads it: shares and probabilities in percent, other units behind the number."""
    if value is None or not math.isfinite(value):
        return "not measured"
    if unit in ("share", "probability"):
        return percent(value, digits)
    suffix = {"nats": " nats", "ratio": "", "count": "", "position": "", "": ""}.get(unit, f" {unit}")
    return _powers(number(value, digits)) + suffix


def percent(value: float, digits: int = 3) -> str:
    """A share in percent, with as many digits as it needs."""
    if value == 0 or abs(value) >= 0.001:
        return f"{100 * value:.{digits}g} %"
    return _powers(f"{100 * value:.2g}") + " %"


def _powers(text: str) -> str:
    if "e" not in text:
        return text
    mantissa, exponent = text.split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def short(digest: str | None) -> str:
    """The first twelve hexadecimal digits of a digest."""
    return "none" if digest is None else digest.removeprefix("sha256:")[:12]


def when(stamp: str) -> str:
    """An ISO 8601 time in UTC, to the second; anything else as it is."""
    try:
        at = datetime.fromisoformat(stamp)
    except ValueError:
        return visible(stamp)
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if at.tzinfo else visible(stamp)


@dataclass(frozen=True)
class Sign:
    """A verdict for eye and ear: an icon, a word and the name of a colour; never the colour alone."""

    icon: str
    word: str
    tone: str


VERDICTS: dict[Verdict, Sign] = {
    "pass": Sign("✓", "kept", "good"),
    "fail": Sign("✗", "broken", "bad"),
    "inconclusive": Sign("?", "cannot tell", "unsure"),
}

OUTCOMES: dict[Outcome, Sign] = {
    "committed": Sign("✓", "Committed", "good"),
    "auto-approved": Sign("✓", "Approved by the policy", "good"),
    "needs-approval": Sign("?", "Waits for a person", "unsure"),
    "held": Sign("?", "Held for a person", "unsure"),
    "blocked": Sign("✗", "Blocked", "bad"),
    "rolled-back": Sign("↶", "Rolled back", "bad"),
    "rejected": Sign("✗", "Rejected", "bad"),
    "stale": Sign("✗", "Out of date", "bad"),
    "expired": Sign("✗", "Expired", "bad"),
    "superseded": Sign("→", "Replaced by another plan", "unsure"),
}

SCOPES: dict[Scope, str] = {
    "target": "the fact itself",
    "entailed": "what follows from it",
    "subject": "the same subject, other facts",
    "near": "other subjects of the kind",
    "namesake": "made-up bearers of the name",
    "far": "unrelated text",
    "model": "the model",
}

KINDS = {
    "intended": "intended",
    "spill": "spill (intended concept, elsewhere)",
    "collateral": "collateral (other concept)",
}

_SCORES = {
    "key_leakage": "Sharing of the subject's key (1 / kᵀC⁻¹k)",
    "key_near_interference": "Overlap of the key with neighbours' keys",
    "key_norm": "Length of the subject's key",
    "subject_position": "Position of the subject's last token",
    "sae_view": "Share of the key that the SAE misses",
    "neuron_polysemanticity": "Concepts per neuron of the key (naive)",
    "neuron_entropy_twin": "Spread of those neurons over kinds of text",
    "key_participation": "Concepts that make up the key",
    "conflict_old_nats": "Surprise at the old answer today (−log P)",
    "conflict_new_nats": "Surprise at the new answer today (−log P)",
    "overwritten_belief": "How firmly the old answer is held, over several wordings",
    "leakage": "Movement of ordinary text (leakage)",
    "leakage_share": "Movement of ordinary text, relative",
    "leakage_tail": "Movement of the most affected 1 % of tokens",
    "near_interference": "Movement of neighbours",
    "protected_interference_facts": "Movement of protected facts",
    "protected_interference_python": "Movement of protected Python code",
    "protected_interference_prose": "Movement of protected prose",
    "latent_leak": "Concept energy that the write picks up (latent leak)",
    "latent_leak_count": "Concepts that share that energy",
    "leakage_explained": "Share of the leakage that the SAE explains",
    "delta_norm_ratio": "Size of the change beside its weights",
    "rehearsed_subject_kl": "Rehearsed: same subject, answers moved",
    "rehearsed_subject_lost_top1": "Rehearsed: same subject, answers lost",
    "expected_far_kl": "Expected from edits like it: ordinary text moved",
    "expected_near_kl": "Expected from edits like it: other subjects moved",
    "expected_subject_kl": "Expected from edits like it: same subject moved",
    "harm_probability": "Probability of damage as in the worst tenth of such edits",
    "rehearsed_near_kl": "Rehearsed: other subjects, answers moved",
    "rehearsed_near_lost_top1": "Rehearsed: other subjects, answers lost",
    "rehearsed_namesake_kl": "Rehearsed: made-up bearers of the name, answers moved",
    "rehearsed_namesake_lost_top1": "Rehearsed: made-up bearers of the name, answers lost",
    "rehearsed_entailed_kl": "Rehearsed: consequences moved",
    "rehearsed_p_new": "Rehearsed: probability of the new answer",
    "rehearsed_p_old": "Rehearsed: probability of the old answer",
    "target_p_new": "Probability of the new answer",
    "target_p_old": "Probability of the old answer",
    "target_p_new_before": "Probability of the new answer, before",
    "target_p_old_before": "Probability of the old answer, before",
    "target_success": "Prompts that took the new answer",
    "paraphrase_success": "Other wordings that took it",
    "subject_kl": "Same subject, other facts: answers moved",
    "subject_lost_top1": "Same subject, other facts: answers lost",
    "near_kl": "Other subjects: answers moved",
    "near_lost_top1": "Other subjects: answers lost",
    "namesake_kl": "Made-up bearers of the name: answers moved",
    "namesake_lost_top1": "Made-up bearers of the name: answers lost",
    "entailed_kl": "Consequences: answers moved",
    "entailed_lost_top1": "Consequences: answers that changed",
    "distractor_lost_top1": "Other subjects, new fact in front: answers lost",
    "distractor_kept_before": "The same: answers that survived it before",
    "distractor_kept_after": "The same: answers that survive it now",
    "far_kl": "Unrelated text: next words moved (worst kind)",
    "far_lost_top1": "Unrelated text: most likely next word changed",
    "perplexity_ratio": "Perplexity after / before (worst kind)",
    "drifted_latents_subject": "Concepts that drifted: same subject",
    "drifted_latents_near": "Concepts that drifted: other subjects",
    "drifted_latents_far": "Concepts that drifted: unrelated text",
    "spill_mass": "Firing of the target's concepts elsewhere",
    "sae_validity": "Whether the autoencoders still see the model",
    "raw_shift": "Change of raw activations (largest)",
    "sequences": "Sequences read",
    "tokens": "Tokens read",
    "sequences_needed": "Sequences that a change must show in",
    "smallest_rate_change": "Smallest change of a firing rate",
    "smallest_rate_for_30_percent_loss": "Rarest concept whose loss by 30 % would show",
}
_FAMILIES = (
    ("far_kl_", "Next words moved: "),
    ("perplexity_ratio_", "Perplexity after / before: "),
    ("raw_shift_", "Change of raw activations: "),
    ("omnibus_", "Concepts moved, all together: "),
    ("energy_", "Distance of concept profiles: "),
)
"""Scores that come once a domain, scope or hook."""

GLOSSARY = (
    ("answer", "The token (a word or a piece of one) that the model thinks most likely to come next."),
    (
        "concept (latent)",
        "A direction in the model's activations that a sparse autoencoder (SAE) found; its label lists words "
        "at which it is active. Labels are hints, not proofs.",
    ),
    (
        "far, near, same subject",
        "Unrelated text; questions of the same kind about other subjects; other questions about the "
        "edited subject. None of the three should change.",
    ),
    (
        "KL (nats)",
        "How far two sets of next-word probabilities lie apart. 0 is no difference; at 0.01 a reader notices "
        "nothing; near 1 the answers are mostly others.",
    ),
    (
        "intended, spill, collateral",
        "How a watched concept drifted: as the edit means it to; the edit's own concept, but in places that are not "
        "meant; a concept that the edit has nothing to do with.",
    ),
    (
        "made-up bearers of the name (namesakes)",
        "Subjects that end in the same word, with another first word (“Victoria Glacier” for “Hood Glacier”). The "
        "model recognises a name mostly by its last word, so real ones are moved as these are.",
    ),
    ("key", "The vector inside the model by which the edited layer recognises the subject."),
    (
        "leakage",
        "How much tokens that are not the subject are moved by the change, because they resemble its key.",
    ),
    (
        "lost answers",
        "The share of prompts or positions at which the most likely next token is another one than before.",
    ),
    ("staged copy", "The edited version while it is monitored. No program loads it before it is committed."),
    (
        "waiver",
        "A named person lifts one soft limit, with a reason and an expiry date. Hard limits cannot be waived.",
    ),
)


def score_title(name: str) -> str:
    """What a score says, in a few words; an unknown name with its underscores as spaces."""
    if name in _SCORES:
        return _SCORES[name]
    if name.startswith("lineage_"):
        return f"All edits so far: {score_title(name.removeprefix('lineage_'))}"
    for prefix, words in _FAMILIES:
        if name.startswith(prefix):
            return words + visible(name.removeprefix(prefix))
    return visible(name.replace("_", " "))


def hand(said: Decision) -> str:
    """Who decided, and what a reader has to know about that word; nothing about the policy's own."""
    if said.outcome == "auto-approved":
        return visible(said.approver)
    marks = [f"signed, key {said.key[:12]}" if said.key else "unsigned"]
    marks += ["own plan"] if said.own else []
    marks += [f"break-glass, ticket {visible(said.ticket)}"] if said.ticket else []
    return f"{visible(said.approver)} ({'; '.join(marks)})"
