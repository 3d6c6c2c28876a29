"""How much this peer may send, whatever goes wrong: token buckets, so that a sick peer cannot storm the network.

Two buckets, of packets to one address and of bytes to all together. What the failure detector needs (pings and what
answers them) counts in the first only: a peer that is busy with telling news must not look dead for it. What is over the
limit is dropped and counted; gossip repairs that as it repairs any loss.
"""

from collections import OrderedDict
from typing import Final

from meshq.config import MEMBERS_MAX
from meshq.gossip.allowance import Allowance
from meshq.gossip.member import Address

PACKETS_PER_SECOND: Final = 50.0  # to one address; an idle mesh of a thousand needs less than one
PACKETS_BURST: Final = 100.0
BYTES_PER_SECOND: Final = 125_000.0  # 1 Mbit/s; an idle mesh of 600 with telemetry needs a fifth of it
BYTES_BURST: Final = 512_000.0
TARGETS_MAX: Final = 2 * MEMBERS_MAX


class Throttle:
    """All that leaves this peer by UDP or as a stream."""

    def __init__(self, now: float) -> None:
        self._bytes = Allowance(BYTES_PER_SECOND, BYTES_BURST, now)
        self._packets: OrderedDict[Address | str, Allowance] = OrderedDict()

    def admits(self, now: float, target: Address | str, size: int, *, vital: bool) -> bool:
        """May a packet of `size` bytes go to the target (an address or, over TCP, a peer) now?"""
        bucket = self._packets.get(target)
        if bucket is None:
            bucket = self._packets[target] = Allowance(PACKETS_PER_SECOND, PACKETS_BURST, now)
            if len(self._packets) > TARGETS_MAX:
                self._packets.popitem(last=False)
        return bucket.left(now) and (vital or self._bytes.take(now, size)) and bucket.take(now)
