"""What the tests of gossip say about their subjects, and only that."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from hypothesis import strategies as st

from meshq import codec
from meshq.gossip import wire
from meshq.gossip.effects import Effect, Send
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.swim import PROFILES, Routine, Swim, SwimConfig
from meshq.gossip.wire import Ack, GossipOnly, Message, Packet, Ping, PingRequest, Record, Rumor, SyncRequest
from meshq.ids import Epoch, PeerId
from tests.simulator.gossip_peer import peer_for

ALIVE, SUSPECT, DEAD, LEFT = Liveness.ALIVE, Liveness.SUSPECT, Liveness.DEAD, Liveness.LEFT


def address(name: str) -> Address:
    return Address(f"10.0.0.{ord(name[0])}", 7733)


def member(
    name: str,
    liveness: Liveness = ALIVE,
    *,
    epoch: int = 1,
    incarnation: int = 0,
    addresses: tuple[Address, ...] | None = None,
) -> Member:
    return Member(
        peer=peer_for(name), epoch=Epoch(epoch), incarnation=incarnation, liveness=liveness,
        name=name, addresses=(address(name),) if addresses is None else addresses, version="0.1.0",
    )  # fmt: skip


def swim(name: str, *others: Member, now: float = 0.0, config: SwimConfig = PROFILES["lan"], seed: int = 0) -> Swim:
    """A core that knows the others, has nothing left to tell about them, and owes nobody a push/pull soon."""
    core = Swim(member(name), config, Random(seed), now)
    for other in others:
        core.handle_packet(now, packet(other.name, rumors=(Rumor(other),)), address(other.name))
    for other in others:
        core._beliefs.queue.discard(other.peer)
    core._due[Routine.SYNC] = now + config.sync_interval
    return core


def packet(
    sender: str,
    message: Message | None = None,
    *,
    rumors: tuple[Rumor, ...] = (),
    digest: bytes = b"",
    records: tuple[Record, ...] = (),
    epoch: int = 1,
) -> bytes:
    return codec.encode(Packet(peer_for(sender), Epoch(epoch), message or GossipOnly(), rumors, digest, records))


@dataclass(frozen=True)
class Sent:
    """A `Send` that can be read."""

    address: Address
    message: Message
    rumors: tuple[Rumor, ...] = ()
    records: tuple[Record, ...] = ()
    digest: bytes = b""


def readable(effects: Sequence[Effect]) -> list[Effect | Sent]:
    """The effects, with their packets decoded."""
    return [_sent(effect) if isinstance(effect, Send) else effect for effect in effects]


def _sent(send: Send) -> Sent:
    read = wire.read_packet(send.packet)
    return Sent(send.address, read.message, read.rumors, read.records, read.digest)


def sent(effects: Sequence[Effect]) -> list[Sent]:
    return [each for each in readable(effects) if isinstance(each, Sent)]


def said_of(effects: Sequence[Effect], name: str) -> list[Member]:
    """What all packets together say of this peer."""
    return [rumor.member for each in sent(effects) for rumor in each.rumors if rumor.member.peer == peer_for(name)]


def run_until(core: Swim, until: float) -> list[Effect]:
    """Let the core time out whenever it wants to, in an otherwise silent world."""
    effects: list[Effect] = []
    while core.deadline() <= until:
        effects += core.handle_timeout(core.deadline())
    return effects


NAMES = st.text(alphabet="abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=63)
ADDRESSES = st.builds(
    Address,
    host=st.one_of(st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(str)),
    port=st.integers(1, 65_535),
)


def members(name: st.SearchStrategy[str]) -> st.SearchStrategy[Member]:
    """Members with all fields drawn; small numbers, so that equal ones happen."""
    return st.builds(
        lambda who, epoch, incarnation, liveness, label, addresses, version: replace(
            member(who), epoch=Epoch(epoch), incarnation=incarnation, liveness=liveness,
            name=label, addresses=addresses, version=version,
        ),
        name,
        st.integers(0, 3),
        st.integers(0, 3),
        st.sampled_from(Liveness),
        NAMES,
        st.lists(ADDRESSES, max_size=8, unique=True).map(tuple),
        st.sampled_from(["", "0.1.0", "12.34.56.dev7"]),
    )  # fmt: skip


PEERS = st.sampled_from("abcdef").map(peer_for)
RUMORS = st.builds(
    Rumor,
    member=members(st.sampled_from("abcdef")),
    observers=st.lists(PEERS.map(wire.observer), max_size=3, unique=True).map(tuple),
    gone_seconds=st.integers(0, 700_000),
)
RECORDS = st.builds(
    Record,
    peer=PEERS,
    epoch=st.integers(0, 3).map(Epoch),
    version=st.integers(0, 1000),
    age_ms=st.integers(0, 10**7),
    data=st.binary(max_size=1000),
)
MESSAGES = st.one_of(
    st.builds(wire.Ping, number=st.integers(0, 2**32 - 1), target=PEERS),
    st.builds(wire.Ack, number=st.integers(0, 2**32 - 1)),
    st.builds(wire.PingRequest, number=st.integers(0, 2**32 - 1), target=PEERS),
    st.builds(wire.Nack, number=st.integers(0, 2**32 - 1)),
    st.just(GossipOnly()),
)


def peer(name: str) -> PeerId:
    return peer_for(name)


def first_ping(core: Swim) -> tuple[float, Sent]:
    """Let the core begin its first probe; when, and what it sent."""
    while True:
        now = core.deadline()
        for each in sent(core.handle_timeout(now)):
            if isinstance(each.message, Ping):
                return now, each


def number_of(each: Sent) -> int:
    assert isinstance(each.message, Ping | PingRequest)
    return each.message.number


def sync_request(sender: str, *rumors: Rumor, records: tuple[Record, ...] = ()) -> bytes:
    return wire.fill_sync(SyncRequest, member(sender), rumors, records)


def answer_all(core: Swim, until: float) -> list[Effect]:
    """Time passes while everybody answers each ping at once; an answer alone does not clear a suspect."""
    effects: list[Effect] = []
    while core.deadline() <= until:
        now = core.deadline()
        new = core.handle_timeout(now)
        effects += new
        for each in sent(new):
            name = chr(int(each.address.host.split(".")[-1]))
            if isinstance(each.message, Ping):
                effects += core.handle_packet(now, packet(name, Ack(each.message.number)), each.address)
    return effects


def pack_digest(entries: Sequence[wire.DigestEntry]) -> bytes:
    return b"".join(wire.digest_entry(*entry) for entry in entries)


def unpack_digest(digest: bytes) -> list[wire.DigestEntry]:
    return [wire.read_entry(entry) for entry in wire.split_digest(digest)]
