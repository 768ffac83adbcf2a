"""Every error that guardedit raises on purpose, and the exit code each one ends the command line with.

    GuardeditError                      2   bad input or usage
    ├── BadRequestError                 2   a request that cannot be understood
    ├── MissingModelError               2   the model's files are not on this machine
    ├── BadModelError                   2   NaN, infinity or a broken tensor in a model
    ├── UnknownArchitectureError        2   no row of the architecture table fits
    ├── TooFewTokensError               2   statistics asked of too little text
    ├── MissingStatisticsError          2   second moments or SAEs that a plan needs are not there
    ├── PolicyError                     2   a policy file that cannot be read, or a metric it names is unknown
    ├── NotFoundError                   2   no such plan, edit or record
    ├── StorageError                    2   no space left, not writable
    ├── SolveError                      2   the editor found no usable solution (not finite, no convergence)
    ├── BlockedError                    3   the policy stops the plan
    ├── NeedsApprovalError              4   a person has to decide first
    ├── RolledBackError                 5   the monitor refused the staged copy
    ├── IntegrityError                  6   bytes are not those that were recorded
    │   └── StatisticsMismatchError     6   statistics or an SAE that belong to other weights
    ├── LockedError                     7   somebody else is editing this model
    ├── StaleError                      8   the plan was made for another state, or has expired
    │   └── OutOfOrderError             8   a later edit on the same tensor must be undone first
    └── HeldError                       9   the monitor could not decide

`TrackingError` is not in the tree's exit codes: MLflow being away never ends a command.
"""

from __future__ import annotations


class GuardeditError(Exception):
    """Base of all; the message names the thing, its value, what is allowed and what to do next."""

    exit_code: int = 2


class BadRequestError(GuardeditError):
    """A request that cannot be understood."""


class MissingModelError(GuardeditError):
    """The model's files are not on this machine."""


class BadModelError(GuardeditError):
    """A model with a tensor that cannot be worked with."""


class UnknownArchitectureError(GuardeditError):
    """No row of the architecture table fits the model."""


class TooFewTokensError(GuardeditError):
    """Statistics asked of too little text."""


class MissingStatisticsError(GuardeditError):
    """Second moments, SAEs or a reference bank that a plan needs are not there."""


class PolicyError(GuardeditError):
    """A policy that cannot be read."""


class NotFoundError(GuardeditError):
    """No such plan, edit or record."""


class StorageError(GuardeditError):
    """The store cannot be written."""


class SolveError(GuardeditError):
    """The editor found no usable solution."""


class BlockedError(GuardeditError):
    """The policy stops the plan."""

    exit_code = 3


class NeedsApprovalError(GuardeditError):
    """A person has to decide before the plan may be applied."""

    exit_code = 4


class RolledBackError(GuardeditError):
    """The monitor refused the staged copy; the live model was never touched."""

    exit_code = 5


class IntegrityError(GuardeditError):
    """Bytes are not those that were recorded."""

    exit_code = 6


class StatisticsMismatchError(IntegrityError):
    """Statistics or an SAE that belong to other weights, another width or another hook."""


class LockedError(GuardeditError):
    """Somebody else is editing this model."""

    exit_code = 7


class StaleError(GuardeditError):
    """The plan was made for another state of the model, the SAEs or the policy, or has expired."""

    exit_code = 8


class OutOfOrderError(StaleError):
    """A later edit on the same tensor must be undone first."""


class HeldError(GuardeditError):
    """The monitor could not decide; a person must."""

    exit_code = 9


class TrackingError(Exception):
    """MLflow could not be reached or refused a call; recorded, never fatal."""
