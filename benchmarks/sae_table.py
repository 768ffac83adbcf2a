"""Print the table of docs/sae.md from the quality cards.

python -m benchmarks.sae_table sae_checkpoints/smollm2-135m
"""

from __future__ import annotations

import sys
from pathlib import Path

from guardedit.saes.cards import Aim, QualityCard

HEAD = (
    "hook",
    "latents",
    "tokens (samples)",
    "L0",
    "explained variance",
    "on unseen domains",
    "PCA",
    "frozen decoder",
    "loss recovered",
    "dead",
    "dense",
    "leakage explained",
)


def line(card: QualityCard) -> str:
    """One line of the table."""
    cells = (
        f"`{card.hook_name}`",
        str(card.d_sae),
        f"{card.tokens / 1e6:.2f} M ({card.samples / 1e6:.2f} M)",
        f"{card.l0:.1f}",
        shown(card.explained_variance.get("all")),
        shown(card.explained_variance.get("unseen")),
        shown(card.controls.get("pca")),
        shown(card.controls.get("frozen_decoder")),
        shown(card.ce_loss_recovered),
        shown(card.dead_share),
        shown(card.dense_share),
        shown(card.leakage_share_explained),
    )
    return "| " + " | ".join(cells) + " |"


def shown(value: float | None) -> str:
    """Three decimals, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def aims(card: QualityCard) -> list[str]:
    """One line an aim: reached or not."""
    return [
        f"| `{card.hook_name}` | {aim.name} | {aim.op} {aim.limit:g} | {shown(aim.value)} | {reached(aim)} |"
        for aim in card.aims
    ]


def reached(aim: Aim) -> str:
    """In a word."""
    return "yes" if aim.met else "no"


def main() -> None:
    """Read the cards and print the two tables."""
    folder = Path(sys.argv[1])
    cards = [
        QualityCard.model_validate_json(path.read_bytes()) for path in sorted(folder.glob("*/card.json"))
    ]
    out = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD), *(line(card) for card in cards), ""]
    out += ["| hook | aim | asked | found | reached |", "|---|---|---|---|---|"]
    out += [text for card in cards for text in aims(card)]
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
