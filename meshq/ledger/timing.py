"""How long the ledger waits for what, as one value that a mesh's profile chooses."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerConfig:
    """Seconds throughout. The defaults are those of the LAN profile."""

    grace: float = 8.0  # a peer dead for so long has lost its claims; a task's own `lease` goes before it
    claim_slot: float = 0.150  # rank r bids r slots later; Nomad and HyperQueue need no such slot: they have a server
    claim_jitter: float = 0.030
    claims_per_batch: int = 32
    ack_patience: float = 1.0  # a claim starts after so long without all acks, or after 4 x p99 of the acks' time
    lost_slot: float = 1.0  # rank r declares a claim lost r slots later
    sync_min: float = 1.0
    sync_max: float = 5.0
    sync_idle: float = 15.0  # after three syncs in a row that brought nothing
    sync_timeout: float = 10.0
    stall_max: float = 5.0  # a longer stall (or one longer than the grace) must be answered by re-validation
    validation_max: float = 30.0  # without any answer for so long (TCP is blocked, UDP is not) a peer goes on unvalidated
    quorum_window: float = 600.0  # members alive within it are counted when a peer asks whether it is cut off
    backoff_max: float = 600.0  # a week of them stays within what a row may hold


LAN: Final = LedgerConfig()
WAN: Final = LedgerConfig(grace=20.0, ack_patience=2.0)  # detection alone takes about 20 s at 5 s probes
FAST: Final = LedgerConfig(grace=2.0, validation_max=10.0)
