"""A gossip shell alone in some network, which sends packets of full size to addresses and says what came of it.

`python -m tests.gossip.lone_shell BIND TARGET…`: BIND is an address or empty, each TARGET an IP address at which this same
shell may or may not be heard. Prints its counters as JSON.
"""

import asyncio
import json
import sys
import time
from random import Random

from meshq.gossip.effects import Send, Sync
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.swim import PROFILES, Swim
from meshq.gossip.transport import GossipShell, open_socket
from meshq.gossip.wire import PACKET_PLAIN_BYTES_MAX, SEAL_BYTES_MAX
from meshq.ids import Epoch, PeerId
from tests.simulator.gossip_peer import peer_for

LIMIT = 5.0


async def nobody(sync: Sync) -> tuple[PeerId, bytes]:
    raise ConnectionError


async def no_stream(peer: PeerId, packet: bytes) -> tuple[bytes, ...]:
    raise ConnectionError


async def main(bind: str, *targets: str) -> None:
    sock = open_socket(bind, 0)
    port = sock.getsockname()[1]
    me = Member(peer=peer_for("a"), epoch=Epoch(1), incarnation=0, liveness=Liveness.ALIVE, name="a", addresses=())
    shell = GossipShell(
        Swim(me, PROFILES["lan"], Random(0), time.monotonic()), sock, seal=lambda plain: plain + bytes(SEAL_BYTES_MAX),
        open=lambda sealed: None, sync=nobody, stream=no_stream, on_effect=lambda effect: None, clock=time.monotonic,
    )  # fmt: skip
    shell.start()
    shell.perform([Send(Address(target, port), bytes(PACKET_PLAIN_BYTES_MAX)) for target in targets])
    deadline = time.monotonic() + LIMIT
    while shell.stats()["received"] < shell.stats()["sent"]:
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.01)
    print(json.dumps(shell.stats()))
    await shell.stop()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
