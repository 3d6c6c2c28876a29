"""The shell of gossip: a UDP socket, packets over TCP, a timer, and the core between them.

It decides nothing. It opens what arrives and hands it to the core, carries out the effects, and calls the core when its
deadline has come. Two things it does on its own, because they concern this machine alone: it drops packets of sources that
send rubbish or too much (`Gatekeeper`), and it watches whether its own event loop is held up, and tells the core, which
then distrusts itself, and the agent, whose leases depend on it.

The socket is read in a loop whenever it is readable: one wake-up drains many packets (measured at 3 times the rate of asyncio's
datagram protocol). An idle shell wakes for the core's deadlines and four times a second for the watch.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, assert_never

from meshq.config import PACKET_BYTES_MAX, PACKET_BYTES_MIN
from meshq.errors import MeshqError, PeerError, TaskFailed
from meshq.gossip import streams
from meshq.gossip.effects import (
    Answer,
    Cloned,
    Effect,
    MemberChanged,
    NoteHeard,
    ProbeFailed,
    RecordChanged,
    Refuted,
    Send,
    Stream,
    Sync,
    TransportChanged,
)
from meshq.gossip.gatekeeper import Gatekeeper, Rations
from meshq.gossip.member import Address
from meshq.gossip.streams import Streams
from meshq.gossip.swim import KnownPeer, Swim
from meshq.ids import PeerId

log = logging.getLogger("meshq.gossip")

RECEIVE_BUFFER_BYTES: Final = 4 * 2**20  # rides out a stall of a second in a mesh of hundreds, where the kernel allows it
PACKETS_PER_WAKEUP: Final = 128  # then others get their turn; the socket stays readable
WATCH_INTERVAL: Final = 0.25
STALL_SECONDS: Final = 1.0  # what the agent hears of: leases are not trusted any more
SYNCS_MAX: Final = 16  # under way at a time; one more fails at once and is tried again later
STREAMED_PER_SECOND: Final = 100.0  # packets of one peer over TCP: twice what a peer sends to one other (`throttle`)
SYNCED_PER_SECOND: Final = 1.0  # push/pulls of one peer: thirty times what one sends, and each may cost 50 ms
BURST_SECONDS: Final = 10.0  # of the two
LEAVE_SECONDS: Final = 1.0  # in which a leaver still passes on that it left

# Linux's numbers for what Python's `socket` has no names for.
IP_MTU_DISCOVER: Final = 10
IPV6_MTU_DISCOVER: Final = 23
PMTUDISC_PROBE: Final = 3
SO_MEMINFO: Final = 55
MEMINFO: Final = struct.Struct("9I")

COUNTERS: Final = (
    "received", "sent", "send_failed", "too_short", "too_long", "unopened", "throttled", "flooded", "malformed", "bugs",
    "syncs_refused", "stalls", *streams.COUNTERS,
)  # fmt: skip


def open_socket(host: str, port: int) -> socket.socket:
    """A UDP socket for the shell. An empty host means all addresses of this machine, IPv6 too where there is any.

    TaskFailed if the address cannot be had.
    """
    host = host or ("0.0.0.0" if _no_ipv6() else "::")
    try:
        return _bound(socket.AF_INET6 if ":" in host else socket.AF_INET, host, port)
    except OSError as error:
        hint = "choose another port with --port, or stop what uses this one"
        raise TaskFailed(f"cannot listen on UDP {host} port {port}: {error.strerror or error}", hint) from None


def _no_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::", 0))
    except OSError:
        return True
    return False


def _bound(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        with contextlib.suppress(OSError):  # best effort: the kernel caps it
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        _forbid_fragments(sock)
        sock.setblocking(False)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


def _forbid_fragments(sock: socket.socket) -> None:
    """Set DF: firewalls drop fragments, and one that is lost loses the packet.

    PROBE, and not DO, as in QUIC: the kernel then ignores what it heard of the path's MTU, which a stranger can forge (one ICMP
    packet that claims 552 bytes would stop us for ten minutes). Our packets fit every path that IPv6 permits; on one that is
    still narrower they are lost, and the probes over TCP find out.
    """
    with contextlib.suppress(OSError):  # another system than Linux fragments: nothing worse
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_PROBE)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_PROBE)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DONTFRAG, 1)


def _kernel_drops(sock: socket.socket) -> int:
    """Packets for which the socket had no room, because this process did not read in time."""
    try:
        return int(MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMINFO.size))[-1])
    except (OSError, struct.error):  # it is closed, or the kernel is older than 4.12
        return 0


class GossipShell:
    """One peer's gossip on a real network. `start` and `stop` it inside a running event loop.

    Commands carry out what the core answers before they return. All of it runs in the loop's own thread.
    """

    def __init__(
        self,
        core: Swim,
        sock: socket.socket,
        *,
        seal: Callable[[bytes], bytes],
        open: Callable[[bytes], bytes | None],
        sync: Callable[[Sync], Awaitable[tuple[PeerId, bytes]]],
        stream: streams.Ask,
        on_effect: Callable[[Effect], None],
        clock: Callable[[], float],
        on_stall: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """`open` returns None for what was not sealed by a member. `sync` (who answered, as its certificate says, and the
        answer) and `stream` (a packet to a peer, over TCP; the packets of the answer) raise MeshqError if nobody answers.
        `on_effect` gets all effects that are not carried out here. `on_stall` hears for how long this process just stood
        still, if that was longer than STALL_SECONDS."""
        self.core = core
        self._socket = sock
        self._mapped = sock.family == socket.AF_INET6
        self._seal = seal
        self._open = open
        self._sync = sync
        self._on_effect = on_effect
        self._clock = clock
        self._on_stall = on_stall
        self._gate = Gatekeeper()
        self._streamed = Rations(STREAMED_PER_SECOND, STREAMED_PER_SECOND * BURST_SECONDS)
        self._synced = Rations(SYNCED_PER_SECOND, SYNCED_PER_SECOND * BURST_SECONDS)
        self._counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self._streams = Streams(stream, self._stream_answered, self._stream_failed, self._counters)
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._watched_at = 0.0
        self._syncs: set[asyncio.Task[None]] = set()
        self._running = False

    def start(self) -> None:
        assert not self._running
        self._running = True
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket, self._read)
        self._watched_at = self._clock()
        self._watch = loop.call_later(WATCH_INTERVAL, self._look_at_the_clock)
        self._arm()

    async def stop(self) -> None:
        """Close the socket and end what is under way. Nothing is announced: see `leave`."""
        if not self._running:
            return
        self._running = False
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        for timer in (self._timer, self._watch):
            if timer is not None:
                timer.cancel()
        syncs = list(self._syncs)
        for task in syncs:
            task.cancel()
        await asyncio.gather(*syncs, self._streams.stop(), return_exceptions=True)

    def join(self, seeds: Sequence[Address]) -> None:
        self.perform(self.core.join(self._clock(), seeds))

    def remember(self, known: Sequence[KnownPeer]) -> None:
        self.perform(self.core.remember(self._clock(), known))

    def publish(self, record: bytes) -> None:
        self.perform(self.core.publish(self._clock(), record))

    def rename(self, name: str, named: int = 0) -> None:
        self.perform(self.core.rename(self._clock(), name, named))

    def readdress(self, addresses: Sequence[Address]) -> None:
        self.perform(self.core.readdress(self._clock(), addresses))

    async def leave(self) -> None:
        """Tell everybody, and go on telling for a second in case some of it gets lost."""
        self.perform(self.core.leave(self._clock()))
        await asyncio.sleep(LEAVE_SECONDS)

    def refused(self, peer: PeerId) -> None:
        """A TCP connection to the peer was refused or reset: it may be gone."""
        if self._running:
            self.perform(self.core.handle_refused(self._clock(), peer))

    def asked_by_tcp(self, peer: PeerId, answered: bool) -> None:
        """A request of whatever kind to the peer was answered, or got nowhere."""
        self.core.handle_tcp(peer, answered)

    def handle_sync_request(self, peer: PeerId, data: bytes) -> bytes:
        """A push/pull, as it arrived over TCP from this peer; the answer to it. PeerError: state unchanged."""
        now = self._clock()
        self._check_ration(now, self._synced, peer)
        reply, effects = self.core.handle_sync_request(now, peer, data)
        self.perform(effects)
        return reply

    def handle_stream(self, peer: PeerId, data: bytes) -> bytes:
        """A packet, as it arrived over TCP from this peer; the answer to it. PeerError: state unchanged."""
        now = self._clock()
        self._check_ration(now, self._streamed, peer)
        effects = self.core.handle_stream_packet(now, peer, data)
        answers = [effect.packet for effect in effects if isinstance(effect, Answer)]
        self._counters["answers_dropped"] += max(0, len(answers) - streams.ANSWERS_MAX)
        self.perform([effect for effect in effects if not isinstance(effect, Answer)])
        return streams.write_answer(answers[: streams.ANSWERS_MAX])

    def _check_ration(self, now: float, rations: Rations, peer: PeerId) -> None:
        if not rations.take(now, peer):
            self._counters["flooded"] += 1
            raise PeerError("too much gossip: slow down")

    def perform(self, effects: Sequence[Effect]) -> None:
        """Carry out effects of the core, in order, and set the timer anew."""
        for effect in effects:
            match effect:
                case Send():
                    self._send(effect)
                case Stream():
                    self._start_stream(effect)
                case Sync():
                    self._start_sync(effect)
                case (
                    MemberChanged() | RecordChanged() | NoteHeard() | ProbeFailed() | Refuted() | TransportChanged() | Cloned()
                ):
                    self._on_effect(effect)
                case Answer():
                    raise AssertionError("an answer, and nobody asked")
                case _:
                    assert_never(effect)
        self._arm()

    def stats(self) -> dict[str, int]:
        """All counters, of this shell and of the core, and the health score."""
        core = {f"core_{name}": count for name, count in sorted(self.core.counters.items())}
        return {**self._counters, "kernel_drops": _kernel_drops(self._socket), **core, "health": self.core.health}

    def _arm(self) -> None:
        if not self._running:
            return
        deadline = self.core.deadline()
        if self._timer is not None:
            if deadline == self._armed_for:
                return
            self._timer.cancel()
        self._armed_for = deadline
        self._timer = asyncio.get_running_loop().call_later(max(0.0, deadline - self._clock()), self._time_out)

    def _time_out(self) -> None:
        self._timer = None
        self.perform(self.core.handle_timeout(self._clock()))

    def _look_at_the_clock(self) -> None:
        """Late by more than usual: this loop, or the whole machine, was held up."""
        now = self._clock()
        late = now - self._watched_at - WATCH_INTERVAL
        self._watched_at = now
        self._watch = asyncio.get_running_loop().call_later(WATCH_INTERVAL, self._look_at_the_clock)
        self.perform(self.core.handle_stall(now, late))
        if late > STALL_SECONDS:
            self._counters["stalls"] += 1
            log.warning("this process stood still for %.1f s: its suspicions of others start anew", late)
            self._on_stall(late)

    def _read(self) -> None:
        for _ in range(PACKETS_PER_WAKEUP):
            try:
                data, source = self._socket.recvfrom(PACKET_BYTES_MAX + 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:  # an ICMP error of an earlier send
                log.debug("reading from the gossip socket: %s", error)
                return
            self._receive(data, (source[0], source[1]))

    def _receive(self, data: bytes, source: tuple[str, int]) -> None:
        self._counters["received"] += 1
        now = self._clock()
        if len(data) < PACKET_BYTES_MIN or len(data) > PACKET_BYTES_MAX:
            self._counters["too_short" if len(data) < PACKET_BYTES_MIN else "too_long"] += 1
            return
        refusal = self._gate.refuses(now, source)
        if refusal is not None:
            self._counters[refusal] += 1
            return
        plain = self._open(data)
        if plain is None:
            self._counters["unopened"] += 1
            self._gate.failed(now, source)
            return
        if not self._gate.proved(now, source):
            self._counters["flooded"] += 1
            return
        self._handle(now, plain, source)

    def _handle(self, now: float, plain: bytes, source: tuple[str, int]) -> None:
        try:
            effects = self.core.handle_packet(now, plain, self._address(source))
        except PeerError as error:
            self._counters["malformed"] += 1
            log.debug("packet of %s: %s", source[0], error)
        except Exception:
            self._counters["bugs"] += 1
            log.exception("bug: packet of %s", source[0])
        else:
            self.perform(effects)

    def _address(self, source: tuple[str, int]) -> Address:
        host, port = source
        return Address(host.removeprefix("::ffff:") if self._mapped and "." in host else host, port)

    def _send(self, send: Send) -> None:
        host, port = send.address.host, send.address.port
        if self._mapped and ":" not in host:
            host = f"::ffff:{host}"
        try:
            self._socket.sendto(self._seal(send.packet), (host, port))
            self._counters["sent"] += 1
        except OSError as error:  # no route, a full buffer, the wrong family: as good as lost on the way
            self._counters["send_failed"] += 1
            self._counters[f"send_failed {errno.errorcode.get(error.errno or 0, 'otherwise')}"] += 1
            log.debug("packet to %s: %s", send.address, error)

    def _start_stream(self, stream: Stream) -> None:
        if self._running:
            self._streams.send(stream)

    def _stream_answered(self, peer: PeerId, packets: tuple[bytes, ...]) -> None:
        for packet in packets:
            try:
                effects = self.core.handle_stream_answer(self._clock(), peer, packet)
            except PeerError as error:
                self._counters["answers_refused"] += 1
                log.debug("answer of %s: %s", peer[:8], error)
            else:
                self.perform(effects)

    def _stream_failed(self, peer: PeerId) -> None:
        self.perform(self.core.handle_stream_failed(self._clock(), peer))

    def _start_sync(self, sync: Sync) -> None:
        if not self._running or len(self._syncs) >= SYNCS_MAX:
            self._counters["syncs_refused"] += 1  # which says nothing of the peer
            return
        task = asyncio.get_running_loop().create_task(self._do_sync(sync), name=f"gossip sync {sync.address}")
        self._syncs.add(task)
        task.add_done_callback(self._syncs.discard)

    async def _do_sync(self, sync: Sync) -> None:
        try:
            peer, reply = await self._sync(sync)
            effects = self.core.handle_sync_reply(self._clock(), peer, reply)
        except MeshqError as error:
            log.debug("sync with %s: %s", sync.address, error)
            effects = self.core.handle_sync_failed(self._clock(), sync.peer)
        except Exception:
            log.exception("bug: sync with %s", sync.address)
            effects = self.core.handle_sync_failed(self._clock(), sync.peer)
        if self._running:
            self.perform(effects)
