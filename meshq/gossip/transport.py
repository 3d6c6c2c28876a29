"""The UDP shell of gossip: a socket, a timer, and the core between them.

It decides nothing. It opens what arrives and hands it to the core, carries out the effects, and calls the core when its
deadline has come. Two things it does on its own, because they concern this machine alone: it drops packets of sources that send
rubbish, and it watches whether its own event loop is held up, and tells the core, which then distrusts itself.

The socket is read in a loop whenever it is readable: one wake-up drains many packets (measured at 3 times the rate of asyncio's
datagram protocol). An idle shell wakes for the core's deadlines and four times a second for the watch.
"""

import asyncio
import contextlib
import logging
import socket
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, assert_never

from meshq.config import PACKET_BYTES_MAX, PACKET_BYTES_MIN, UNAUTHENTICATED_PER_SECOND, UNAUTHENTICATED_SOURCES_MAX
from meshq.errors import MeshqError, PeerError, TaskFailed
from meshq.gossip.allowance import Allowance
from meshq.gossip.effects import Effect, MemberChanged, ProbeFailed, RecordChanged, Refuted, Send, Sync
from meshq.gossip.member import Address
from meshq.gossip.swim import KnownPeer, Swim

log = logging.getLogger("meshq.gossip")

RECEIVE_BUFFER_BYTES: Final = 4 * 2**20  # rides out a stall of a second in a mesh of hundreds, where the kernel allows it
PACKETS_PER_WAKEUP: Final = 128  # then others get their turn; the socket stays readable
WATCH_INTERVAL: Final = 0.25
SYNCS_MAX: Final = 16  # under way at a time; one more fails at once and is tried again later
LEAVE_SECONDS: Final = 1.0  # in which a leaver still passes on that it left

COUNTERS: Final = (
    "received", "sent", "send_failed", "too_short", "too_long", "unopened", "throttled", "malformed", "syncs_refused", "stalls",
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
        sock.setblocking(False)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


class Gatekeeper:
    """Which sources may still try to be opened: one that never sent a good packet has a ration of bad ones.

    Keyed by host for strangers, so that changing the port does not help; who has sent a good packet from a port is known by
    host and port and always heard, so that a stranger on its machine cannot silence it. Both lists are bounded.
    """

    def __init__(self) -> None:
        self._proven: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._strangers: OrderedDict[str, Allowance] = OrderedDict()

    def admits(self, now: float, source: tuple[str, int]) -> bool:
        if source in self._proven:
            return True
        stranger = self._strangers.get(source[0])
        return stranger is None or stranger.left(now)

    def proved(self, source: tuple[str, int]) -> None:
        """A packet from there was good."""
        self._proven[source] = None
        self._proven.move_to_end(source)
        if len(self._proven) > UNAUTHENTICATED_SOURCES_MAX:
            self._proven.popitem(last=False)

    def failed(self, now: float, source: tuple[str, int]) -> None:
        """A packet from there did not open."""
        if source[0] not in self._strangers:
            rate = float(UNAUTHENTICATED_PER_SECOND)
            self._strangers[source[0]] = Allowance(rate, rate, now)
            if len(self._strangers) > UNAUTHENTICATED_SOURCES_MAX:
                self._strangers.popitem(last=False)
        self._strangers.move_to_end(source[0])
        self._strangers[source[0]].take(now)


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
        sync: Callable[[Sync], Awaitable[bytes]],
        on_effect: Callable[[Effect], None],
        clock: Callable[[], float],
    ) -> None:
        """`open` returns None for what was not sealed by a member. `sync` raises MeshqError if nobody answers.
        `on_effect` gets all effects but `Send` and `Sync`."""
        self.core = core
        self._socket = sock
        self._mapped = sock.family == socket.AF_INET6
        self._seal = seal
        self._open = open
        self._sync = sync
        self._on_effect = on_effect
        self._clock = clock
        self._gate = Gatekeeper()
        self._counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
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
        await asyncio.gather(*syncs, return_exceptions=True)

    def join(self, seeds: Sequence[Address]) -> None:
        self.perform(self.core.join(self._clock(), seeds))

    def remember(self, known: Sequence[KnownPeer]) -> None:
        self.perform(self.core.remember(self._clock(), known))

    def publish(self, record: bytes) -> None:
        self.perform(self.core.publish(self._clock(), record))

    def rename(self, name: str) -> None:
        self.perform(self.core.rename(self._clock(), name))

    def readdress(self, addresses: Sequence[Address]) -> None:
        self.perform(self.core.readdress(self._clock(), addresses))

    async def leave(self) -> None:
        """Tell everybody, and go on telling for a second in case some of it gets lost."""
        self.perform(self.core.leave(self._clock()))
        await asyncio.sleep(LEAVE_SECONDS)

    def handle_sync_request(self, data: bytes) -> bytes:
        """Another peer's push/pull, as it arrived over TCP; the answer to it. MalformedData: state unchanged."""
        reply, effects = self.core.handle_sync_request(self._clock(), data)
        self.perform(effects)
        return reply

    def perform(self, effects: Sequence[Effect]) -> None:
        """Carry out effects of the core, in order, and set the timer anew."""
        for effect in effects:
            match effect:
                case Send():
                    self._send(effect)
                case Sync():
                    self._start_sync(effect)
                case MemberChanged() | RecordChanged() | ProbeFailed() | Refuted():
                    self._on_effect(effect)
                case _:
                    assert_never(effect)
        self._arm()

    def stats(self) -> dict[str, int]:
        """All counters, of this shell and of the core, and the health score."""
        core = {f"core_{name}": count for name, count in sorted(self.core.counters.items())}
        return {**self._counters, **core, "health": self.core.health}

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
        effects = self.core.handle_stall(now, late)
        if late > 1.0:
            self._counters["stalls"] += 1
            log.warning("the agent was held up for %.1f s: its suspicions of others start anew", late)
        if effects:
            self.perform(effects)

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
        if not self._gate.admits(now, source):
            self._counters["throttled"] += 1
            return
        plain = self._open(data)
        if plain is None:
            self._counters["unopened"] += 1
            self._gate.failed(now, source)
            return
        self._gate.proved(source)
        try:
            effects = self.core.handle_packet(now, plain, self._address(source))
        except PeerError as error:
            self._counters["malformed"] += 1
            log.debug("packet of %s: %s", source[0], error)
            return
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
            log.debug("packet to %s: %s", send.address, error)

    def _start_sync(self, sync: Sync) -> None:
        if not self._running or len(self._syncs) >= SYNCS_MAX:
            self._counters["syncs_refused"] += 1
            self.core.handle_sync_failed(self._clock(), sync.address)
            return
        task = asyncio.get_running_loop().create_task(self._do_sync(sync), name=f"gossip sync {sync.address}")
        self._syncs.add(task)
        task.add_done_callback(self._syncs.discard)

    async def _do_sync(self, sync: Sync) -> None:
        try:
            reply = await self._sync(sync)
            effects = self.core.handle_sync_reply(self._clock(), reply)
        except MeshqError as error:
            log.debug("sync with %s: %s", sync.address, error)
            effects = self.core.handle_sync_failed(self._clock(), sync.address)
        except Exception:
            log.exception("bug: sync with %s", sync.address)
            effects = self.core.handle_sync_failed(self._clock(), sync.address)
        if self._running:
            self.perform(effects)
