"""The numbers of gossip, as data: three profiles, each with the precedent of what it sets.

`lan` follows memberlist's LAN settings, measured there up to thousands of members; `wan` its WAN settings; `fast` is for tests
and for labs that would rather have a false alarm than wait (a crash is noticed in about two seconds).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

DAY: Final = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SwimConfig:
    """All times in seconds."""

    probe_interval: float = 1.0
    ack_timeout: float = 0.5  # until a direct probe turns to others; less where round trips are known to be short
    ack_timeout_min: float = 0.2
    indirect_probes: int = 3
    relay_timeout_share: float = 0.8  # of `ack_timeout`: a helper gives up, and says so, before its asker does
    suspicion_multiplier: float = 4.0  # min = this x max(1, log10 N) x probe_interval
    suspicion_max_multiplier: float = 6.0  # max = this x min
    confirmations: int = 2  # independent ones that shrink a suspicion from max to min (Lifeguard's K)
    health_max: int = 7
    gossip_interval: float = 0.2
    gossip_fanout: int = 3
    retransmit_multiplier: int = 4  # a doubt is sent this x (1 + log10(N + 1)) times by each who learns it, news oftener
    direct_members_max: int = 64  # up to here everybody is told of a change at once: gossip to 3 misses some in small meshes
    sync_interval: float = 30.0
    first_sync_delay: float = 1.0  # after a member appeared first
    meet_interval: float = 1.0  # between syncs with senders that are not known
    reconnect_interval: float = 10.0
    reconnect_at_least: float = 30.0  # between tries, however few have failed (serf: 30 s)
    publish_interval: float = 0.1  # in larger meshes a new record is told to everybody by and by: so often …
    publish_batch: int = 20  # … to so many: 600 hear of it within 3 s
    digest_interval: float = 1.0
    digest_dead_after: float = 60.0  # records of the dead are left out of digests from here on
    dead_kept: float = 7 * DAY  # lab machines sleep over weekends and holidays
    left_kept: float = DAY
    stall: float = 1.0  # an event loop stopped for longer was deaf: it distrusts its suspicions
    lag: float = 0.1  # slower than this is bad health


PROFILES: Final[Mapping[str, SwimConfig]] = {
    "lan": SwimConfig(),
    "wan": SwimConfig(
        probe_interval=5.0, ack_timeout=3.0, ack_timeout_min=1.0, suspicion_multiplier=6.0,
        gossip_interval=0.5, gossip_fanout=4, sync_interval=60.0,
    ),
    "fast": SwimConfig(
        probe_interval=0.25, ack_timeout=0.1, ack_timeout_min=0.05, suspicion_multiplier=3.0, suspicion_max_multiplier=3.0,
        gossip_interval=0.1, sync_interval=10.0, first_sync_delay=0.3, reconnect_interval=2.0, reconnect_at_least=5.0,
    ),
}  # fmt: skip
