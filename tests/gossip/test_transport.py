"""Real shells on real sockets of 127.0.0.1."""

import asyncio
import hashlib
import hmac
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from random import Random

import pytest

from meshq import codec
from meshq.config import PACKET_BYTES_MAX, UNAUTHENTICATED_PER_SECOND
from meshq.errors import TaskFailed, Unreachable
from meshq.gossip.effects import Effect, MemberChanged, RecordChanged, Refuted, Sync
from meshq.gossip.gatekeeper import (
    ANY_PER_SECOND,
    BURST_SECONDS,
    GOOD_PER_SECOND,
    GOOD_PER_SECOND_AND_HOST,
    SOURCES_MAX,
    Gatekeeper,
)
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.streams import read_answer
from meshq.gossip.swim import PROFILES, Swim
from meshq.gossip.transport import GossipShell, open_socket
from meshq.gossip.wire import Rumor, SyncReply
from meshq.ids import Epoch, PeerId
from tests.gossip.builders import packet, peer

KEY = b"k" * 32
LIMIT = 20.0


def seal(plain: bytes) -> bytes:
    """As long as the real seal, and as hard for a stranger."""
    return hmac.digest(KEY, plain, hashlib.sha256) + bytes(16) + plain


def unseal(sealed: bytes) -> bytes | None:
    tag, plain = sealed[:32], sealed[48:]
    return plain if hmac.compare_digest(tag, hmac.digest(KEY, plain, hashlib.sha256)) else None


class Lab:
    """Shells that sync with each other by a call instead of TLS."""

    def __init__(self) -> None:
        self.shells: dict[Address, GossipShell] = {}
        self.effects: dict[str, list[Effect]] = {}
        self.stalls: list[float] = []

    def start(
        self, name: str, *, host: str = "127.0.0.1", clock: Callable[[], float] = time.monotonic, epoch: int = 1
    ) -> GossipShell:
        sock = open_socket(host, 0)
        port = sock.getsockname()[1]
        address = Address("127.0.0.1", port)
        me = Member(
            peer=peer(name), epoch=Epoch(epoch), incarnation=0, liveness=Liveness.ALIVE, name=name, addresses=(address,)
        )
        core = Swim(me, PROFILES["fast"], Random(port), clock())
        self.effects[name] = []
        shell = GossipShell(
            core, sock, seal=seal, open=unseal, on_effect=self.effects[name].append, clock=clock,
            sync=lambda sync: self.sync(peer(name), sync), stream=lambda to, packet: self.stream(peer(name), to, packet),
            on_stall=self.stalls.append,
        )  # fmt: skip
        self.shells[address] = shell
        shell.start()
        return shell

    async def sync(self, sender: PeerId, sync: Sync) -> tuple[PeerId, bytes]:
        await asyncio.sleep(0)
        if sync.address not in self.shells:
            raise Unreachable("nobody there")
        asked = self.shells[sync.address]
        return asked.core.me.peer, asked.handle_sync_request(sender, sync.request)

    async def stream(self, sender: PeerId, receiver: PeerId, packet: bytes) -> tuple[bytes, ...]:
        await asyncio.sleep(0)
        for shell in self.shells.values():
            if shell.core.me.peer == receiver:
                return read_answer(shell.handle_stream(sender, packet))
        raise Unreachable("nobody there")

    async def kill(self, shell: GossipShell) -> None:
        del self.shells[shell.core.me.addresses[0]]
        await shell.stop()

    async def stop(self) -> None:
        for shell in self.shells.values():
            await shell.stop()


def in_lab(test: Callable[[Lab], Coroutine[object, object, None]]) -> None:
    async def run() -> None:
        lab = Lab()
        try:
            await test(lab)
        finally:
            await lab.stop()

    asyncio.run(run())


async def until(predicate: Callable[[], bool], what: str) -> None:
    """Wait for a condition, with a limit."""
    deadline = time.monotonic() + LIMIT
    while not predicate():
        assert time.monotonic() < deadline, f"never: {what}"
        await asyncio.sleep(0.01)


def live(shell: GossipShell) -> list[str]:
    return sorted(member.name for member in shell.core.members() if member.liveness <= Liveness.SUSPECT)


def see(shells: Sequence[GossipShell], names: list[str]) -> Callable[[], bool]:
    return lambda: all(live(shell) == names for shell in shells)


@pytest.mark.slow
def test_three_shells_meet_notice_a_crash_and_part() -> None:
    async def story(lab: Lab) -> None:
        a, b, c = lab.start("a"), lab.start("b"), lab.start("c")
        b.join(a.core.me.addresses)
        c.join(a.core.me.addresses)
        await until(see([a, b, c], ["a", "b", "c"]), "everybody sees everybody")
        await lab.kill(c)
        await until(see([a, b], ["a", "b"]), "the crash is seen")
        assert {m.name: m.liveness for m in a.core.members()}["c"] is Liveness.DEAD
        await b.leave()
        await until(see([a], ["a"]), "the leave is seen")
        assert {m.name: m.liveness for m in a.core.members()}["b"] is Liveness.LEFT
        kinds = {type(effect) for effect in lab.effects["a"]}
        assert MemberChanged in kinds and a.stats()["unopened"] == 0
        a.core.check()

    in_lab(story)


def test_published_telemetry_arrives() -> None:
    async def story(lab: Lab) -> None:
        a, b = lab.start("a"), lab.start("b")
        b.join(a.core.me.addresses)
        await until(see([a, b], ["a", "b"]), "both see both")
        a.publish(b"r" * 1000)
        await until(lambda: b.core.record(peer("a")) == b"r" * 1000, "the record arrives")
        assert RecordChanged(peer("a"), b"r" * 1000) in lab.effects["b"]

    in_lab(story)


def test_a_rename_and_a_new_address_arrive() -> None:
    async def story(lab: Lab) -> None:
        a, b = lab.start("a"), lab.start("b")
        b.join(a.core.me.addresses)
        await until(see([a, b], ["a", "b"]), "both see both")
        a.rename("a2")
        a.readdress([*a.core.me.addresses, Address("10.0.0.1", 7733)])
        await until(lambda: b.core.member(peer("a")) == a.core.me, "the new name and address arrive")

    in_lab(story)


def test_a_shell_on_all_addresses_speaks_with_one_on_ipv4() -> None:
    async def story(lab: Lab) -> None:
        a, b = lab.start("a", host=""), lab.start("b")
        b.join(a.core.me.addresses)
        await until(see([a, b], ["a", "b"]), "both see both")
        await until(lambda: a.stats()["received"] > 2 and b.stats()["received"] > 2, "packets in both directions")
        assert a.core.addresses(peer("b")) == b.core.me.addresses, "no IPv4-mapped address gets out of the shell"
        assert a.stats()["send_failed"] == 0

    in_lab(story)


def test_a_seed_that_does_not_answer_is_counted_and_harmless() -> None:
    async def story(lab: Lab) -> None:
        a = lab.start("a")
        a.join([Address("127.0.0.1", 1)])
        await until(lambda: a.stats()["core_syncs_failed"] == 1, "the failure is counted")
        assert live(a) == ["a"]

    in_lab(story)


def test_a_sync_that_breaks_in_an_unexpected_way_is_logged_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    async def story(lab: Lab) -> None:
        def broken(sender: PeerId, sync: Sync) -> Awaitable[tuple[PeerId, bytes]]:
            raise ZeroDivisionError

        lab.sync = broken  # type: ignore[method-assign,assignment]  # the bug that is to be survived
        a = lab.start("a")
        with caplog.at_level(logging.ERROR, "meshq.gossip"):
            a.join([Address("127.0.0.1", 1)])
            await until(lambda: a.stats()["core_syncs_failed"] == 1, "the failure is counted")
        assert "bug: sync with 127.0.0.1:1" in caplog.text

    in_lab(story)


def test_a_seed_that_answers_in_the_name_of_who_asked_is_not_taken_for_a_clone() -> None:
    """Else one lying member could have any peer that asks it fall silent: who answers is whom its certificate names."""

    async def story(lab: Lab) -> None:
        a = lab.start("a")
        lie = Member(
            peer=peer("a"), epoch=Epoch(1), incarnation=0, liveness=Liveness.ALIVE, name="a", addresses=(), started_at=0, boot=9
        )

        async def answer(sender: PeerId, sync: Sync) -> tuple[PeerId, bytes]:
            return peer("liar"), codec.encode(SyncReply(lie, (), ()))

        lab.sync = answer  # type: ignore[method-assign]  # what the liar's port says
        a.join([Address("127.0.0.1", 1)])
        await until(lambda: a.stats()["core_syncs_failed"] == 1, "the answer is refused")
        assert not a.core.silent and a.core.clone is None

    in_lab(story)


def test_what_strangers_send_is_dropped_counted_and_never_answered() -> None:
    async def story(lab: Lab) -> None:
        a = lab.start("a")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.bind(("127.0.0.1", 0))
            stranger.setblocking(False)
            target = ("127.0.0.1", a.core.me.addresses[0].port)
            stranger.sendto(b"short", target)
            stranger.sendto(bytes(PACKET_BYTES_MAX + 1), target)
            stranger.sendto(os.urandom(200), target)
            stranger.sendto(seal(packet("b"))[:-1], target)
            stranger.sendto(seal(b"sealed by a member, but no packet"), target)
            await until(lambda: a.stats()["received"] == 5, "all arrived")
            stats = a.stats()
            assert [stats[name] for name in ("too_short", "too_long", "unopened", "malformed")] == [1, 1, 2, 1]
            with pytest.raises(BlockingIOError):
                stranger.recv(2000)
        assert live(a) == ["a"] and stats["sent"] == 0

    in_lab(story)


def test_a_flood_of_rubbish_is_not_even_opened_and_does_not_silence_members_of_the_same_machine() -> None:
    async def story(lab: Lab) -> None:
        a, b = lab.start("a"), lab.start("b")
        b.join(a.core.me.addresses)
        await until(see([a, b], ["a", "b"]), "both see both")
        await until(lambda: a.stats()["core_packets_in"] > 0, "a packet of b")
        flood = 3 * UNAUTHENTICATED_PER_SECOND
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            for _ in range(flood):
                stranger.sendto(bytes(100), ("127.0.0.1", a.core.me.addresses[0].port))
        await until(lambda: a.stats()["unopened"] + a.stats()["throttled"] == flood, "the flood is over")
        assert a.stats()["throttled"] > 0
        heard = a.stats()["core_packets_in"]
        await until(lambda: a.stats()["core_packets_in"] > heard + 3, "b is still heard")

    in_lab(story)


def test_the_gatekeeper_forgets_the_oldest_and_stays_bounded() -> None:
    gate = Gatekeeper()
    for number in range(SOURCES_MAX + 10):
        for _ in range(2):
            gate.failed(0.0, (f"host {number}", 1))
            gate.proved(0.0, (f"friend {number}", 1))
    kept = (gate._bad, gate._good, gate._good_of_host, gate._any)
    assert [len(each) for each in kept] == [SOURCES_MAX] * 4


def test_a_stranger_is_not_opened_any_more_and_a_member_of_the_same_machine_is_still_heard() -> None:
    gate = Gatekeeper()
    for _ in range(UNAUTHENTICATED_PER_SECOND):
        assert gate.refuses(0.0, ("flooder", 1)) is None
        gate.failed(0.0, ("flooder", 1))
    gate.proved(0.0, ("flooder", 7733))
    assert gate.refuses(0.0, ("flooder", 2)) == "throttled"
    assert gate.refuses(0.0, ("flooder", 7733)) is None
    assert gate.refuses(1.0, ("flooder", 2)) is None


def test_a_member_that_sends_too_much_is_heard_as_much_as_a_peer_needs_and_others_of_its_machine_too() -> None:
    gate = Gatekeeper()
    heard = sum(gate.proved(0.0, ("member", 1)) for _ in range(10_000))
    assert heard == GOOD_PER_SECOND * BURST_SECONDS
    assert gate.proved(0.0, ("member", 2))
    assert sum(gate.proved(1.0, ("member", 1)) for _ in range(10_000)) == GOOD_PER_SECOND
    ports = sum(gate.proved(0.0, ("many", port)) for port in range(500) for _ in range(100))
    assert ports == GOOD_PER_SECOND_AND_HOST * BURST_SECONDS
    assert sum(gate.refuses(0.0, ("member", 1)) is None for _ in range(20_000)) == ANY_PER_SECOND * BURST_SECONDS
    assert gate.refuses(0.0, ("member", 1)) == "flooded"


def test_a_machine_that_slept_distrusts_itself_instead_of_burying_the_others() -> None:
    async def story(lab: Lab) -> None:
        asleep = 0.0

        def clock() -> float:
            return time.monotonic() + asleep

        a, b = lab.start("a", clock=clock), lab.start("b")
        b.join(a.core.me.addresses)
        await until(see([a, b], ["a", "b"]), "both see both")
        asleep = 3600.0
        await until(lambda: a.stats()["core_stalls"] > 0, "the stall is noticed")
        await until(lambda: a.stats()["core_packets_in"] > 5, "a goes on")
        assert live(a) == ["a", "b"]
        assert not [e for e in lab.effects["a"] if isinstance(e, MemberChanged) and e.after.liveness is Liveness.DEAD]

    in_lab(story)


def test_a_process_that_stood_still_for_long_is_reported_once_and_a_short_lag_is_not() -> None:
    async def story(lab: Lab) -> None:
        now = 0.0

        def clock() -> float:
            return time.monotonic() + now

        a = lab.start("a", clock=clock)
        now = 0.6
        await until(lambda: a.stats()["core_stalls"] == 1, "the lag is noticed")
        assert lab.stalls == []
        now = 60.0
        await until(lambda: len(lab.stalls) > 0, "the stall is reported")
        assert len(lab.stalls) == 1 and 58 < lab.stalls[0] < 62

    in_lab(story)


def test_a_packet_that_meets_a_bug_is_logged_and_the_next_one_is_read(caplog: pytest.LogCaptureFixture) -> None:
    async def story(lab: Lab) -> None:
        a = lab.start("a")
        handle = a.core.handle_packet

        def broken(now: float, data: bytes, source: Address) -> list[Effect]:
            a.core.handle_packet = handle  # type: ignore[method-assign]  # the second one meets no bug
            raise ZeroDivisionError

        a.core.handle_packet = broken  # type: ignore[method-assign]  # the bug that is to be survived
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(2):
                sender.sendto(seal(packet("b")), ("127.0.0.1", a.core.me.addresses[0].port))
        with caplog.at_level(logging.ERROR, "meshq.gossip"):
            await until(lambda: a.stats()["core_packets_in"] == 1, "the second one is handled")
        assert a.stats()["bugs"] == 1 and "bug: packet of 127.0.0.1" in caplog.text

    in_lab(story)


def test_a_refused_connection_makes_the_core_look_at_once() -> None:
    async def story(lab: Lab) -> None:
        a, b = lab.start("a"), lab.start("b")
        b.join(a.core.me.addresses)
        await until(see([a, b], ["a", "b"]), "both see both")
        a.refused(peer("b"))
        a.refused(peer("nobody"))
        assert a.stats()["core_hints"] == 1

    in_lab(story)


def test_what_the_kernel_had_no_room_for_is_counted() -> None:
    async def story(lab: Lab) -> None:
        a = lab.start("a")
        a._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(100):
                sender.sendto(bytes(1_000), ("127.0.0.1", a.core.me.addresses[0].port))
        dropped = a.stats()["kernel_drops"]
        assert dropped > 50
        await until(lambda: a.stats()["received"] + dropped == 100, "the others arrive")

    in_lab(story)


def test_a_blocked_event_loop_costs_health() -> None:
    async def story(lab: Lab) -> None:
        a = lab.start("a")
        await asyncio.sleep(0)
        time.sleep(0.6)  # noqa: ASYNC251 the fault under test: somebody blocks the loop
        await until(lambda: a.core.health > 0, "the lag is noticed")

    in_lab(story)


def test_a_restart_is_seen_at_once_and_a_suspect_refutes() -> None:
    async def story(lab: Lab) -> None:
        a, b = lab.start("a"), lab.start("b")
        b.join(a.core.me.addresses)
        await until(see([a, b], ["a", "b"]), "both see both")
        await lab.kill(b)
        b = lab.start("b", epoch=2)
        b.join(a.core.me.addresses)
        await until(lambda: a.core.member(peer("b")) == b.core.me, "the new run is seen")
        statement = Member(peer=peer("b"), epoch=Epoch(2), incarnation=5, liveness=Liveness.SUSPECT, name="b", addresses=())
        b._receive(seal(packet("a", rumors=(Rumor(statement),))), ("127.0.0.1", 1))
        assert Refuted(statement) in lab.effects["b"]
        await until(lambda: a.core.member(peer("b")) == b.core.me and b.core.me.incarnation == 6, "the refutation is seen")

    in_lab(story)


def test_a_stopped_shell_does_nothing_more() -> None:
    async def story(lab: Lab) -> None:
        a = lab.start("a")
        await a.stop()
        await a.stop()
        a.join([Address("127.0.0.1", 1)])
        assert a.stats()["syncs_refused"] == 1
        assert a._socket.fileno() == -1

    in_lab(story)


def test_a_port_in_use_is_one_clear_message() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        with pytest.raises(TaskFailed, match=f"cannot listen on UDP 127.0.0.1 port {port}: Address already in use") as caught:
            open_socket("127.0.0.1", port)
    assert "--port" in caught.value.hint
