"""What is known of an edit before it is written: scores, latents, tokens and probes of two examples."""

from __future__ import annotations

import math

from builder_parts import FRANCE, probe, score

from guardedit.records import EditRequest, LatentLeak, Score, TokenMove


def risk_scores(size: float) -> tuple[Score, ...]:
    """Pre-op scores; size 1 is the Eiffel Tower, 6 is France."""
    rank = min(99.0, 31.0 * math.log2(1 + size))
    return (
        score("key_leakage", 1.31e-4 * size, "ratio", "key", "far", n=41200, percentile=rank),
        score("key_near_interference", 2.4e-4 * size**2, "ratio", "key", "near", n=24, percentile=rank),
        score("key_norm", 9.83, "norm", "key", "model"),
        score("subject_position", 1, "position", "key", "target"),
        score("sae_view", 0.41, "share", "key", "target", reason="fraction of the key that the SAE misses"),
        score("neuron_polysemanticity", 212.4, "count", "key", "model", percentile=48.0),
        score("neuron_entropy_twin", 1.29, "nats", "key", "model"),
        score("key_participation", 23.1, "count", "key", "target"),
        score("conflict_old_nats", 0.62, "nats", "key", "target"),
        score("conflict_new_nats", 7.41, "nats", "key", "target"),
        score(
            "leakage", 3.9e-3 * size, "norm²", "delta", "far", n=41200, low=3.7e-3 * size, high=4.2e-3 * size
        ),
        score("leakage_share", 5.2e-5 * size, "share", "delta", "far", n=41200, percentile=rank),
        score("leakage_tail", 0.021 * size, "norm", "delta", "far", n=41200),
        score("near_interference", 0.0011 * size**2, "share", "delta", "near", n=24, percentile=rank),
        score("protected_interference_facts", 0.0019 * size, "share", "delta", "far", n=512),
        score("protected_interference_python", 0.0004 * size, "share", "delta", "far", n=512),
        score("protected_interference_prose", 0.0006 * size, "share", "delta", "far", n=512),
        score("latent_leak", 2.7e-3 * size, "norm²", "delta", "far", n=41200),
        score("latent_leak_count", 38.2, "count", "delta", "far"),
        score("leakage_explained", 0.69, "share", "delta", "far"),
        score("delta_norm_ratio", 0.0142, "ratio", "delta", "model", percentile=44.0),
        score("rehearsed_subject_kl", 0.31, "nats", "rehearsal", "subject", n=18, low=0.17, high=0.48),
        score("rehearsed_subject_lost_top1", 3 / 18, "share", "rehearsal", "subject", n=18),
        score("rehearsed_near_kl", 0.004 * size**2, "nats", "rehearsal", "near", n=24, low=0.002, high=0.2),
        score(
            "rehearsed_near_lost_top1", min(1.0, round(size**1.3) / 24), "share", "rehearsal", "near", n=24
        ),
        score("rehearsed_entailed_kl", 0.42, "nats", "rehearsal", "entailed", n=6),
        score("rehearsed_p_new", 0.981, "probability", "rehearsal", "target"),
        score("rehearsed_p_old", 0.0021, "probability", "rehearsal", "target"),
    )


def leaks(labels: tuple[str, ...], size: float) -> tuple[LatentLeak, ...]:
    shares = [0.19, 0.12, 0.083, 0.061, 0.047, 0.031, 0.024, 0.018, 0.013, 0.011]
    return tuple(
        LatentLeak(
            hook_name="blocks.5.mlp.hook_post",
            latent=137 + 211 * i,
            leak=2.7e-3 * size * share,
            share=share,
            label=label,
            examples=(f"… {label.split(',')[0].strip('')} …",),
            firing_rate=0.004 + 0.003 * i,
        )
        for i, (label, share) in enumerate(zip(labels, shares, strict=False))
    )


EIFFEL_LABELS = (
    "Tower, Bridge, Palace",
    "located, situated",
    "Paris, Lyon, French",
    "museum, gallery",
    "the, of after a name",
    "built, constructed",
    "city, town",
    "Eiffel, Gustave",
)
FRANCE_LABELS = (
    "Germany, Italy, Spain",
    "country, nation",
    "Europe, European",
    "capital, Paris",
    "French, language",
    "England, Britain",
    "king, republic",
    "population, area",
    "wine, cheese",
    "war, treaty",
)


def token_moves(request: EditRequest) -> tuple[TokenMove, ...]:
    rows = (
        ("The Leaning Tower", " Tower", 0.061, "facts"),
        ("We walked along the Champ de Mars", " Mars", 0.044, "prose"),
        ("Big Ben and the Tower", " Tower", 0.039, "facts"),
        ("engineer Gustave", "ave", 0.031, "facts"),
        ("def build_tower(height):\n    tower", " tower", 0.017, "python"),
        ("Is it far from the station", " station", 0.012, "chat"),
    )
    if request is FRANCE:
        rows = (
            ("He moved from Spain to Germany", " Germany", 0.31, "facts"),
            ("the border between Italy", " Italy", 0.29, "facts"),
            ("In the south of Belgium", " Belgium", 0.27, "facts"),
            ("a treaty with England", " England", 0.19, "prose"),
            ("most of Europe", " Europe", 0.16, "prose"),
            ('COUNTRIES = ["Spain"', "Spain", 0.14, "python"),
        )
    return tuple(TokenMove(context=c, token=t, move=m, domain=d) for c, t, m, d in rows)


EIFFEL_PROBES = (
    probe(
        "target", "If you want to see the Eiffel Tower, buy a ticket to", " Paris", " Rome", 0.38, 0.009, 4.2
    ),
    probe("entailed", "The country where the Eiffel Tower stands is", " France", " Italy", 0.71, 0.08, 2.3),
    probe("subject", "The Eiffel Tower was designed by", " Gust", " the", 0.44, 0.21, 0.53),
    probe("subject", "The Eiffel Tower is made of", " iron", " iron", 0.18, 0.16, 0.09),
    probe("near", "Big Ben is located in the city of", " London", " London", 0.83, 0.82, 0.002),
    probe("near", "The Colosseum is located in the city of", " Rome", " Rome", 0.66, 0.69, 0.003),
    probe("near", "The Brandenburg Gate is located in the city of", " Berlin", " Berlin", 0.74, 0.73, 0.001),
)
FRANCE_PROBES = (
    probe("entailed", "The seat of government of France is", " Paris", " Marseille", 0.51, 0.11, 1.9),
    probe("subject", "The official language of France is", " French", " French", 0.86, 0.71, 0.21),
    probe("subject", "The currency of France is", " the", " Marseille", 0.37, 0.12, 0.94),
    probe("near", "The capital of Italy is", " Rome", " Marseille", 0.79, 0.22, 0.71),
    probe("near", "The capital of Belgium is", " Brussels", " Marseille", 0.64, 0.17, 0.83),
    probe("near", "The capital of Spain is", " Madrid", " Madrid", 0.81, 0.52, 0.26),
    probe("near", "The capital of Germany is", " Berlin", " Berlin", 0.88, 0.77, 0.11),
)
