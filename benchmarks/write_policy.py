"""Write the shipped policies: pre-op limits are percentiles of the bank of real edits and what the risk model says,
post-op limits are absolute harm.

    python -m benchmarks.write_policy guardedit/assets/smollm2-135m

Prints the table of docs/limits.md. The rules are in
benchmarks/policy_rules.py; the numbers of the pre-op ones come from preop_bank.json, the
limits of the probability of harm from the table of operating points in docs/evidence.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.policy_rules import POSTOP, PREOP, Rule
from guardedit.gate.policy import load_policy
from guardedit.gate.reference import ReferenceBank
from guardedit.pipeline.expecting import RISK_MODELS
from guardedit.pipeline.kit import PREOP_BANK, read_kit, write_kit
from guardedit.pipeline.levels import POLICIES, POLICY, STANDARD
from guardedit.risk.calibration import RiskModel

SOFT_SHARE, HARD_FACTOR = 0.975, 2.0
"""A soft limit stops about one real edit in forty by itself; a hard one starts at twice the largest of the bank."""


@dataclass(frozen=True)
class Level:
    """How careful a policy is."""

    harm: float
    """Limit of the probability of harm."""
    percentiles: str
    """Level of the rules whose limit is a percentile of ordinary edits."""


LEVELS = {
    "strict": Level(0.15, "soft"),
    STANDARD: Level(0.25, "soft"),
    "permissive": Level(0.3, "advisory"),
}
"""Operating points on the edits of docs/evidence.md."""


CHOSEN_ON = "operating point on 122 measured edits by rome, seen again on 118 later ones"
"""Where the limits of the probability of harm come from (docs/limits.md, "Three levels")."""
Line = tuple[str, float, str, str, str | None]
"""id, limit, level, source, and the plans that the rule is for."""


def limits(rule: Rule, bank: ReferenceBank) -> list[Line]:
    """One line, or a soft and a hard one, or one for single and one for joint plans.

    What many requests do to everything else adds up. Twice the largest single edit is a hard limit for single edits
    only; a joint plan beyond the soft one goes to a person, and to the absolute limits after the write.
    """
    if rule.limit is not None and rule.limit_of_many is not None:
        many = (f"{rule.id}-of-many", rule.limit_of_many, rule.level, rule.source, "many")
        return [(rule.id, rule.limit, rule.level, rule.source, "one"), many]
    if rule.limit is not None:
        return [(rule.id, rule.limit, rule.level, rule.source, None)]
    soft = rounded(bank.quantile(rule.metric, SOFT_SHARE))
    where = f"p{SOFT_SHARE * 100:g} of n={len(bank.values[rule.metric])} real edits by {bank.editor}, seed {bank.seed}"
    found: list[Line] = [(rule.id, soft, rule.level, where, None)]
    if rule.hard_too:
        top = rounded(HARD_FACTOR * max(bank.values[rule.metric]))
        source = f"{HARD_FACTOR:g} x the largest of the same {bank.n} edits"
        found.append((f"{rule.id}-hard", top, "hard", source, None if rule.stage == "key" else "one"))
    return found


def rounded(value: float) -> float:
    """Two significant digits: more would pretend to be known."""
    return float(f"{value:.2g}")


def rule_text(rule: Rule, line: Line) -> str:
    """One [[rule]] table."""
    name, limit, level, source, plans = line
    fields: dict[str, Any] = {
        "id": name,
        "metric": rule.metric,
        "op": rule.op,
        "limit": limit,
        "level": level,
        "sentence": rule.sentence,
        "why": rule.why,
        "source": source,
    }
    fields |= {"stage": rule.stage} if rule.stage else {}
    fields |= {"plans": plans} if plans else {}
    fields |= {"editors": list(rule.editors)} if rule.editors else {}
    # JSON's strings, numbers and lists are TOML's.
    return "\n".join(["[[rule]]", *(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in fields.items())])


def harm_rule(level: Level, models: Sequence[RiskModel]) -> tuple[Rule, Line]:
    """The limit of what the kit's risk models say, for the editors that have one."""
    editors = tuple(sorted(one.editor for one in models))
    rule = Rule(
        "preop/harm_probability",
        "Of edits with such scores a share of {value} does damage as ROME's worst tenth does; the limit is {limit}.",
        "the one number that catches most of the harmful edits for the fewest people asked",
        editors=editors,
    )
    return rule, (rule.id, level.harm, "soft", CHOSEN_ON, "one")


def rules_of(level: Level, bank: ReferenceBank, models: Sequence[RiskModel]) -> list[tuple[Rule, Line]]:
    """All rules of one level."""
    found = []
    for rule in (*PREOP, *POSTOP):
        for line in limits(rule, bank):
            name, limit, usual, source, plans = line
            percentile = usual == "soft" and source.startswith("p")
            found.append((rule, (name, limit, level.percentiles if percentile else usual, source, plans)))
    before = [one for one in found if one[0].metric.startswith("preop/")]
    return [*before, *([harm_rule(level, models)] if models else []), *found[len(before) :]]


def write_level(path: Path, name: str, rules: Sequence[tuple[Rule, Line]]) -> None:
    """One policy file."""
    head = f'version = 1\nname = "{name}"\n\n[defaults]\non_soft_fail = "needs-approval"\n'
    path.parent.mkdir(exist_ok=True)
    path.write_text(head + "\n" + "\n\n".join(rule_text(*one) for one in rules) + "\n", encoding="utf-8")


def main() -> None:
    """Write the levels and kit.json, print the standard one's table."""
    folder = Path(sys.argv[1])
    bank = ReferenceBank.load(folder / PREOP_BANK)
    models = [RiskModel.load(path) for path in sorted((folder / RISK_MODELS).glob("*.json"))]
    for name, level in LEVELS.items():
        path = folder / POLICY if name == STANDARD else folder / POLICIES / f"{name}.toml"
        write_level(path, f"{bank.model}-{name}", rules_of(level, bank, models))
    kit = read_kit(folder / "kit.json")
    write_kit(folder, layer=kit["layer"], hparams=kit["hparams"])
    out = ["| rule | metric | limit | level | where the number comes from |", "|---|---|---|---|---|"]
    for rule, (name, limit, level_of, source, plans) in rules_of(LEVELS[STANDARD], bank, models):
        of = {"one": " (one request)", "many": " (joint plans)"}.get(plans or "", "")
        of += f" ({', '.join(rule.editors)})" if rule.editors else ""
        out.append(
            f"| {name} | `{rule.metric}` | {rule.op} {limit:g} | {level_of}{of} | {source}: {rule.why} |"
        )
    digests = [f"Digest: `{load_policy(folder / POLICY).digest}`", ""]
    sys.stdout.write("\n".join([*out, "", *digests]))


if __name__ == "__main__":
    main()
