"""A home's policy owners have agreed to the policy that is to judge, or nothing goes ahead. No torch."""

from __future__ import annotations

from guardedit.errors import NeedsApprovalError
from guardedit.gate.rules import Policy
from guardedit.pipeline.history import History
from guardedit.pipeline.signing import trust

HOW = "`guardedit policy sign FILE --key NAME` is a policy owner's word on it (docs/approvals.md)"


def require_policy(workspace: History, policy: Policy) -> None:
    """Refuse a policy that the home's policy owners have not agreed to.

    Asked where the policy is a team's and the home has a policy owner, and of every policy as soon as one was accepted:
    a file that calls itself "solo" is no way around. NeedsApprovalError says what is missing.
    """
    known = trust(workspace)
    if not (known.policies.any or (known.owned and policy.profile == "team")):
        return
    problem = known.policies.problem(policy.digest, policy.policy_owners, known.revoked)
    if problem is not None:
        raise NeedsApprovalError(f"policy {policy.name} ({policy.digest[:19]}…): {problem}; {HOW}")
