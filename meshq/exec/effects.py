"""All that the worker core may ask its shell to do."""

from dataclasses import dataclass

from meshq.ids import Fence
from meshq.task import Claimed, Outcome


@dataclass(frozen=True, slots=True)
class FetchSource:
    """Get the objects of the claim's source from whoever has them and check them out into the attempt's folder.

    Report with `handle_source_ready` or `handle_preparation_failed`.
    """

    claimed: Claimed


@dataclass(frozen=True, slots=True)
class BuildEnvironment:
    """Have the claim's environment ready; report with `handle_environment_ready` or `handle_preparation_failed`."""

    claimed: Claimed


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start the shim of this attempt; report with `handle_spawned`, later `handle_exited`."""

    claimed: Claimed
    python: str  # the environment's interpreter; empty for a plain command
    gpus: tuple[int, ...]  # indices of the GPUs that are given to it


@dataclass(frozen=True, slots=True)
class Signal:
    """Tell the shim to stop its task (SIGTERM, after a grace SIGKILL)."""

    fence: Fence
    reason: str


@dataclass(frozen=True, slots=True)
class Collect:
    """List the outputs of the attempt that ended; report with `handle_collected`."""

    fence: Fence


@dataclass(frozen=True, slots=True)
class Discard:
    """The attempt's folder may be cleared, except for its log and outputs."""

    fence: Fence


@dataclass(frozen=True, slots=True)
class Slow:
    """Preparing this attempt takes a while: tell the ledger, which tells the people."""

    fence: Fence


@dataclass(frozen=True, slots=True)
class Ready:
    """Source and environment are there: the attempt can start at once."""

    fence: Fence


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """The attempt is over; its slot and GPUs are free."""

    fence: Fence
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class CapacityChanged:
    """Free slots, cores, memory or GPUs changed: publish telemetry."""


Effect = FetchSource | BuildEnvironment | Spawn | Signal | Collect | Discard | Slow | Ready | AttemptEnded | CapacityChanged
