"""What an editor may draw on beside model, requests and its own settings: one value, so all editors have one shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from guardedit.edits.gate_shelf import GateShelf
from guardedit.edits.remedi_map import RemediMap
from guardedit.edits.value_shelf import ValueShelf
from guardedit.errors import MissingStatisticsError, StatisticsMismatchError
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.models.statistics import SecondMoment
from guardedit.records import EditRequest
from guardedit.saes.checkpoints import Sae

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""


@dataclass(frozen=True)
class SolveInputs:
    """Statistics, SAEs and history of one model."""

    second_moments: Mapping[str, SecondMoment] = field(default_factory=dict)
    """By hook name of a key space."""
    seed: int = 0
    """Of everything that is sampled."""
    saes: Mapping[str, Sae] = field(default_factory=dict)
    """By hook name; an editor that can use them says so where there are none."""
    earlier: tuple[EditRequest, ...] = ()
    """Requests of the edits that are live, oldest first: what a sequential editor must leave alone."""
    progress: Progress | None = None
    values: ValueShelf | None = None
    """Values that were found before, by any editor that asks for the same ones."""
    gates: GateShelf | None = None
    """Gates that were fitted before, to the same prompts."""
    maps: Mapping[str, RemediMap] = field(default_factory=dict)
    """REMEDI's maps, by hook name."""

    def moment(self, handle: ModelHandle, layer: int) -> SecondMoment:
        """The second moment of the layer's key space.

        Raises MissingStatisticsError without one, StatisticsMismatchError with another hook's or another width's.
        """
        name, width = key_hook(layer), handle.d_in(layer)
        if name not in self.second_moments:
            raise MissingStatisticsError(
                f"no second moment for {name}; there is one for {sorted(self.second_moments) or 'no layer'}. "
                f"Collect it with `guardedit stats collect --layer {layer}`"
            )
        moment = self.second_moments[name]
        if (moment.hook_name, moment.width) != (name, width):
            raise StatisticsMismatchError(
                f"the second moment given for {name} (width {width}) is of {moment.hook_name}, width {moment.width}"
            )
        return moment

    def map_of(self, handle: ModelHandle, layer: int) -> RemediMap:
        """REMEDI's map of a layer's output.

        Raises MissingStatisticsError without one, StatisticsMismatchError with one of another width.
        """
        name = f"blocks.{layer}.hook_resid_post"
        if name not in self.maps:
            raise MissingStatisticsError(
                f"no REMEDI map for {name}; there is one for {sorted(self.maps) or 'no layer'}. Train it with "
                f"`guardedit remedi train FACTS --layer {layer}`"
            )
        found = self.maps[name]
        if found.card.d_model != handle.d_model:
            raise StatisticsMismatchError(
                f"the REMEDI map of {name} is {found.card.d_model} wide, {handle.name} is {handle.d_model}; train one "
                "for this model"
            )
        return found

    def tell(self, what: str, share: float) -> None:
        """Report progress, where anybody listens."""
        if self.progress is not None:
            self.progress(what, share)
