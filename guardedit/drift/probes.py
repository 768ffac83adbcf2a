"""What both models read: control text (far) and the prompts of one edit (target, entailed, subject, near, namesake).

Rows are tokenised, sorted and cut into batches once, here; both sides run exactly these batches, because batch shape
and padding change the last bits of a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from guardedit.errors import BadRequestError
from guardedit.models import tokens
from guardedit.models.corpus import MIN_ROW, corpus_digest
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest, ProbePrompts, Scope, digest_of

FAR_DOMAINS = ("prose", "python", "chat", "arithmetic")
FAR_TOKENS = 8_192
FAR_TOKENS_THOROUGH = 61_440
ROW = 128
PROMPT_SCOPES: tuple[Scope, ...] = ("target", "entailed", "subject", "near", "namesake")
DISTRACTOR = "distractor"
MAX_DISTRACTORS = 48
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Rows:
    """Token rows in the batches that both sides run."""

    name: str
    """A scope, or "distractor"."""
    batches: tuple[tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]], ...]
    """input_ids and attention_mask, padded on the right."""
    domains: tuple[str, ...]
    """Per row, in batch order."""
    texts: tuple[str, ...]
    """Per row; empty strings for control text."""

    @property
    def n_rows(self) -> int:
        """Number of sequences: the unit of replication."""
        return len(self.domains)

    @property
    def n_tokens(self) -> int:
        """Number of real tokens."""
        return int(sum(int(mask.sum()) for _, mask in self.batches))

    @property
    def digest(self) -> str:
        """Digest of the token rows, their batching and their domains."""
        return digest_of(
            {"rows": corpus_digest(self.batches), "domains": list(self.domains), "name": self.name}
        )


@dataclass(frozen=True)
class Target:
    """One wording of the edited fact with what it said and shall say."""

    prompt: str
    new: str
    old: str
    paraphrase: bool


@dataclass(frozen=True)
class ProbeSet:
    """Everything that one measurement reads."""

    far: Rows
    prompts: dict[str, Rows]
    """Rows by scope, and "distractor"; scopes without a prompt are absent."""
    targets: tuple[Target, ...]
    plain_near: tuple[str, ...]
    """Near prompts, in the order of the distractor rows' texts, without the edited sentence in front."""
    seed: int
    notes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Digest of all rows and targets."""
        named = {name: rows.digest for name, rows in self.prompts.items()}
        targets = [[t.prompt, t.new, t.old, t.paraphrase] for t in self.targets]
        return digest_of({"far": self.far.digest, "prompts": named, "targets": targets})


def last_positions(mask: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """True at each row's last real token."""
    last = torch.zeros_like(mask, dtype=torch.bool)
    last[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1] = True
    return last


def build_probes(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    prompts: Sequence[ProbePrompts],
    *,
    far_tokens: int = FAR_TOKENS,
    seed: int = 0,
    far_texts: Mapping[str, Sequence[str]] | None = None,
) -> ProbeSet:
    """The probes of one edit: `prompts[i]` belongs to `requests[i]`.

    `far_texts` (domain -> texts) stands in for the shipped control text, half "test". What a request or its prompts
    name more than once is read once, and a prompt that is a target is not a bystander. `requests` must describe the
    *reference* model's answers: where `target_true` is absent, the handle as it is now is asked for its top token.
    """
    if len(requests) != len(prompts) or not requests:
        raise BadRequestError(
            f"{len(requests)} requests but {len(prompts)} sets of probe prompts; give one for each"
        )
    far, notes = far_rows(handle, far_tokens, seed, far_texts)
    scoped = _scoped(requests, prompts)
    rows = {name: prompt_rows(handle, name, texts) for name, texts in scoped.items() if texts}
    pairs = _distractors(requests, prompts, scoped["near"])
    if pairs:
        rows[DISTRACTOR] = prompt_rows(handle, DISTRACTOR, [text for text, _ in pairs])
    plain = dict(pairs)
    ordered = tuple(plain[text] for text in rows[DISTRACTOR].texts) if pairs else ()
    said = tuple(p.note for p in prompts if p.note)
    return ProbeSet(
        far, rows, _targets(handle, requests, prompts), ordered, seed, tuple(dict.fromkeys((*said, *notes)))
    )


def far_rows(
    handle: ModelHandle, n_tokens: int, seed: int, far_texts: Mapping[str, Sequence[str]] | None = None
) -> tuple[Rows, tuple[str, ...]]:
    """Control text in rows of 128 tokens, the same number of tokens from each domain, and remarks on what is short."""
    rows: list[tokens.Tokens] = []
    domains: list[str] = []
    notes: list[str] = []
    names = tuple(far_texts) if far_texts is not None else FAR_DOMAINS
    share = max(1, n_tokens // len(names))
    for domain in names:
        texts = far_texts[domain] if far_texts is not None else _control(handle, domain, share, seed)
        pieces = _pieces(handle, texts, share)
        found = sum(len(piece.ids) for piece in pieces)
        if found < 0.9 * share:
            notes.append(f"control text {domain!r} has {found} tokens, {share} were asked for")
        rows += pieces
        domains += [domain] * len(pieces)
    if not rows:
        raise BadRequestError("there is no control text: every domain is empty or shorter than 16 tokens")
    return Rows("far", _batches(handle, rows, 8), tuple(domains), ("",) * len(rows)), tuple(notes)


def _control(handle: ModelHandle, domain: str, n_tokens: int, seed: int) -> Sequence[str]:
    from guardedit.models.control import control_texts

    # Short pieces are dropped, so ask for more than is needed.
    return control_texts(handle, domain, n_tokens + n_tokens // 4 + ROW, seed, half="test")


def _pieces(handle: ModelHandle, texts: Iterable[str], n_tokens: int) -> list[tokens.Tokens]:
    """Rows of up to 128 tokens, `n_tokens` in all; short texts are joined by lines, long ones cut."""
    pieces: list[tokens.Tokens] = []
    found = 0
    for text in _joined(texts):
        whole = tokens.tokenise(handle, text)
        for start in range(0, len(whole.ids), ROW):
            width = min(ROW, n_tokens - found)
            piece = tokens.Tokens(whole.ids[start : start + width], whole.offsets[start : start + width])
            if len(piece.ids) >= MIN_ROW:
                pieces.append(piece)
                found += len(piece.ids)
            if n_tokens - found < MIN_ROW:
                return pieces
    return pieces


def _joined(texts: Iterable[str]) -> Iterable[str]:
    """Consecutive short texts (lines of arithmetic, short answers) as one text of about a row's length."""
    waiting: list[str] = []
    for text in texts:
        if text.strip():
            waiting.append(text)
        if sum(map(len, waiting)) >= ROW * _CHARACTERS_PER_TOKEN:
            yield "\n".join(waiting)
            waiting = []
    if waiting:
        yield "\n".join(waiting)


def prompt_rows(handle: ModelHandle, name: str, texts: Sequence[str]) -> Rows:
    """Prompts sorted by length into batches of 32; the order is part of the result."""
    encoded = [(tokens.tokenise(handle, text), text) for text in texts]
    encoded.sort(key=lambda pair: (len(pair[0].ids), pair[1]))
    batches = _batches(handle, [row for row, _ in encoded], 32)
    return Rows(name, batches, (name,) * len(encoded), tuple(text for _, text in encoded))


def _batches(
    handle: ModelHandle, rows: Sequence[tokens.Tokens], size: int
) -> tuple[tuple[Tensor, Tensor], ...]:
    padded = [tokens.pad(handle, rows[start : start + size]) for start in range(0, len(rows), size)]
    return tuple((batch["input_ids"], batch["attention_mask"]) for batch in padded)


def _scoped(requests: Sequence[EditRequest], prompts: Sequence[ProbePrompts]) -> dict[str, list[str]]:
    """Prompts by scope; a prompt belongs to the first scope that names it, target before all others."""
    found: dict[str, list[str]] = {name: [] for name in PROMPT_SCOPES}
    for request, probe in zip(requests, prompts, strict=True):
        found["target"] += [*request.wordings, *probe.target]
        found["entailed"] += probe.entailed
        found["subject"] += [*request.elsewhere, *probe.subject]
        found["near"] += probe.near
        found["namesake"] += probe.namesake
    taken: set[str] = set()
    for name in PROMPT_SCOPES:
        found[name] = [text for text in dict.fromkeys(found[name]) if text not in taken]
        taken.update(found[name])
    return found


def _distractors(
    requests: Sequence[EditRequest], prompts: Sequence[ProbePrompts], near: Sequence[str]
) -> list[tuple[str, str]]:
    """(edited sentence + near prompt, near prompt): CounterFact+'s test (Hoelscher-Obermaier et al. 2023)."""
    allowed = set(near)
    pairs: dict[str, str] = {}
    for request, probe in zip(requests, prompts, strict=True):
        sentence = f"{request.asked} {request.target_new.strip()}."
        pairs |= {f"{sentence} {text}": text for text in probe.near if text in allowed}
    everything = list(pairs.items())
    step = max(1, len(everything) // MAX_DISTRACTORS)
    return everything[::step][:MAX_DISTRACTORS]


def _targets(
    handle: ModelHandle, requests: Sequence[EditRequest], prompts: Sequence[ProbePrompts]
) -> tuple[Target, ...]:
    targets = []
    for request, probe in zip(requests, prompts, strict=True):
        old = request.target_true or top_answer(handle, request.filled)
        wordings = dict.fromkeys((*request.wordings, *probe.target))
        targets += [Target(text, request.target_new, old, text != request.asked) for text in wordings]
    return tuple(targets)


@torch.no_grad()
def top_answer(handle: ModelHandle, prompt: str) -> str:
    """The most likely next token that is not white space, as text."""
    batch = handle.encode([prompt])
    hidden = handle.hidden(batch["input_ids"], batch["attention_mask"])
    logits = handle.logits_at(hidden, last_positions(batch["attention_mask"]))[0]
    for token in logits.argsort(descending=True)[:50].tolist():
        text = str(handle.tokenizer.decode([token])).strip()
        if text:
            return text
    raise BadRequestError(f"the model has no answer to {prompt!r}; name target_true in the request")
