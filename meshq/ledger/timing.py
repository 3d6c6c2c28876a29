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
    join_max: float = 600.0  # for the first sync, while rows come: 200,000 of them over a poor line
    quorum_window: float = 600.0  # members alive within it are counted when a peer asks whether it is cut off
    backoff_max: float = 600.0  # longer in a row that fills; a full one (100 peers: in 3 days) is not tried again: `fullness`
    grant_ttl: float = 30.0  # of a vote under `--on-isolation stop`; failover of such tasks takes so much longer
    grant_renew: float = 5.0  # three renewals in a row may fail before the shim begins to stop the task


LAN: Final = LedgerConfig()
WAN: Final = LedgerConfig(  # detection alone takes about 20 s at 5 s probes
    grace=20.0, ack_patience=2.0, grant_ttl=60.0, grant_renew=10.0
)  # fmt: skip
FAST: Final = LedgerConfig(grace=2.0, validation_max=10.0, grant_ttl=15.0, grant_renew=2.0)
