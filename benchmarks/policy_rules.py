"""The rules of the shipped policies, in words; `benchmarks.write_policy` puts the numbers to them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """One rule; `limit` None takes it from the bank."""

    metric: str
    sentence: str
    why: str
    level: str = "soft"
    op: str = "<="
    limit: float | None = None
    hard_too: bool = False
    stage: str | None = None
    limit_of_many: float | None = None
    """The limit of joint plans, where it is another."""
    editors: tuple[str, ...] = ()
    """Only plans of these; none named means all."""
    source: str = "absolute"
    """Where a limit that is not the bank's comes from."""

    @property
    def id(self) -> str:
        """The metric's own name."""
        return self.metric.split("/")[1].replace("_", "-")


CHOSEN_ON = "operating point on 45 monitored edits by rome that did little"
"""Where limits about the subject after the write come from (docs/evidence.md, "The monitor")."""

PREOP = (
    Rule(
        "preop/key_leakage",
        "How widely the subject's key is shared by ordinary text is {value}; nearly all real edits stay {op} {limit}.",
        "a key that much text shares moves much text, whatever is written at it (1/(kᵀC⁻¹k))",
        stage="key",
    ),
    Rule(
        "preop/key_near_interference",
        "Other subjects of the same kind share {value} of this subject's key; nearly all real edits stay {op} {limit}.",
        "what is written at one key is read at another in this proportion (mean p² over the neighbours' keys)",
        stage="key",
        hard_too=True,
    ),
    Rule(
        "preop/leakage_share",
        "Ordinary text would be moved by {value} of the layer's own output energy; the limit is {limit}.",
        "the mean damage far from the edit follows this number",
        hard_too=True,
    ),
    Rule(
        "preop/leakage_tail",
        "One token in a hundred would be moved by {value} or more; the limit is {limit}.",
        "damage sits in the tail, not in the mean",
        hard_too=True,
    ),
    Rule(
        "preop/near_interference",
        "Facts of the same kind about other subjects would be moved by {value}; the limit is {limit}.",
        "neighbours are where a single edit hurts most outside its subject",
        hard_too=True,
    ),
    Rule(
        "preop/protected_interference_facts",
        "Well-known facts that must stay would be moved by {value}; the limit is {limit}.",
        "the protected bank: facts",
    ),
    Rule(
        "preop/protected_interference_python",
        "Python code would be moved by {value}; the limit is {limit}.",
        "the protected bank: code",
    ),
    Rule(
        "preop/protected_interference_prose",
        "Everyday prose would be moved by {value}; the limit is {limit}.",
        "the protected bank: prose",
    ),
    Rule(
        "preop/latent_leak",
        "The concepts that the write picks up carry {value} of energy with them; the limit is {limit}.",
        "the polysemanticity of the write: how much of which concepts' energy its read-out direction picks up",
    ),
    Rule(
        "preop/delta_norm_ratio",
        "The update has {value} times the norm of the weight; the limit is {limit}.",
        "a runaway update destroys a model at once (the collapse of the published ROME)",
        hard_too=True,
    ),
    Rule(
        "preop/rehearsed_subject_kl",
        "Rehearsed on other questions about the same subject, the answers move by {value} nats; the limit is {limit}.",
        "the subject's other facts share its key: what happens to them can only be rehearsed",
    ),
    Rule(
        "preop/rehearsed_near_kl",
        "Rehearsed on the same question about other subjects, the answers move by {value} nats; the limit is {limit}.",
        "neighbours, rehearsed",
    ),
    Rule(
        "preop/rehearsed_namesake_kl",
        "Rehearsed on made-up subjects that end in the same word, answers move by {value} nats; "
        "above {limit} look closer.",
        "shown, not binding: three of four ordinary edits do it, and near damage falls on real bearers of the name",
        level="advisory",
        limit=1.0,
    ),
    Rule(
        "preop/rehearsed_p_new",
        "Rehearsed, the model gives the new answer a probability of {value}; at least {limit} is asked for.",
        "an edit that does not take is damage without a use",
        op=">=",
        limit=0.2,
    ),
    Rule(
        "preop/subject_position",
        "The subject ends at token {value} of the prompt, counted from 0; {limit} or later is asked for.",
        "this tokenizer adds no token in front, and what stands first in a text has a key unlike any other",
        op=">=",
        limit=1.0,
    ),
    Rule(
        "preop/sae_view",
        "The SAE leaves {value} of this key unexplained; above {limit} its names for concepts say little.",
        "how far the list of concepts can be trusted",
        level="advisory",
    ),
)

POSTOP = (
    Rule(
        "postop/target_success",
        "The new answer beats the old one in {value} of the edited prompts; {limit} is asked for.",
        "an edit that does not take is undone",
        level="hard",
        op=">=",
        limit=1.0,
        limit_of_many=0.9,
    ),
    Rule(
        "postop/paraphrase_success",
        "The new answer beats the old one in {value} of the other wordings; at least {limit} is asked for.",
        "a fact that holds in one wording only is a fact about a wording",
        level="soft",
        op=">=",
        limit=0.5,
    ),
    Rule(
        "postop/far_kl",
        "On unrelated text the predictions moved by {value} nats a token in the worst domain; the limit is {limit}.",
        "a hundredth of a nat is about one per cent in perplexity: more would be felt in everything",
        level="hard",
        limit=0.01,
    ),
    Rule(
        "postop/far_lost_top1",
        "On unrelated text {value} of the most likely next words changed; the limit is {limit}.",
        "two words in a hundred",
        level="hard",
        limit=0.02,
    ),
    Rule(
        "postop/perplexity_ratio",
        "Text became {value} times as hard to predict in the worst domain; the limit is {limit}.",
        "one and a half per cent in the worst of four domains: ordinary edits stay below",
        level="hard",
        limit=1.015,
    ),
    Rule(
        "postop/near_lost_top1",
        "The same question about other subjects lost {value} of its answers; the limit is {limit}.",
        "one neighbour in five",
        level="hard",
        limit=0.2,
    ),
    Rule(
        "postop/near_kl",
        "The same question about other subjects moved by {value} nats; the limit is {limit}.",
        "a quarter of a nat: an answer of 90 % keeps about 70 %",
        level="hard",
        limit=0.25,
    ),
    Rule(
        "postop/namesake_lost_top1",
        "Made-up subjects that end in the same word lost {value} of their answers; "
        "above {limit} a reviewer should look.",
        "shown, not binding: ordinary edits move most bearers of the name",
        level="advisory",
        limit=0.5,
    ),
    Rule(
        "postop/subject_kl",
        "Other questions about the same subject moved by {value} nats; the limit is {limit}.",
        "the first multiple of 0.1 that, with the next rule, at most one in twenty edits that did little goes beyond",
        level="hard",
        limit=1.9,
        source=CHOSEN_ON,
    ),
    Rule(
        "postop/subject_lost_top1",
        "Other questions about the same subject lost {value} of their answers; the limit is {limit}.",
        "two fifths of what else is said about the subject must stand",
        level="hard",
        limit=0.6,
        source=CHOSEN_ON,
    ),
    Rule(
        "postop/lineage_far_kl",
        "Against the first version, all edits together moved unrelated text by {value} nats; the limit is {limit}.",
        "many small edits must not add up unseen",
        level="hard",
        limit=0.05,
    ),
    Rule(
        "postop/lineage_perplexity_ratio",
        "Against the first version, text became {value} times as hard to predict; the limit is {limit}.",
        "many small edits must not add up unseen",
        level="hard",
        limit=1.05,
    ),
    Rule(
        "postop/drifted_latents_far",
        "On unrelated text {value} concepts fire differently than before; above {limit} a reviewer should look.",
        "shown, not binding: no study yet ties a number of drifted latents to harm",
        level="advisory",
        limit=0.0,
    ),
    Rule(
        "postop/sae_validity",
        "Reconstruction of edited activations changed by a factor of {value}; above {limit} the SAE is in doubt.",
        "shown, not binding: an SAE that no longer fits cannot bear witness, but nothing that binds rests on its word",
        level="advisory",
        limit=1.1,
    ),
)
