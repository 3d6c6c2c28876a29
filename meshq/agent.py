"""The agent: one process that is this machine's peer. The composition root, without rules of its own.

It makes the three cores and their shells, and carries words between them: gossip's beliefs become the ledger's views, the
ledger's claims become exec's attempts, exec's capacity becomes telemetry, which goes out by gossip. Around them stand the
peer port (mutual TLS) and the control socket.

Order at start: keys, ports, ledger, exec (which finds what an earlier run left), adoption, only then claims. At the end by
SIGTERM or Ctrl-C nothing is announced and no task is touched; `leave` ends the attempts, then says left.
"""

import asyncio
import atexit
import json
import logging
import logging.handlers
import os
import queue
import random
import resource
import signal
import socket
import sys
import time
from asyncio import sslproto
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NoReturn

from meshq import codec, config, control, doctor, failpoints, membership, record, settings
from meshq.config import Home, Switches
from meshq.errors import MeshqError
from meshq.eventlog import EventLog
from meshq.exec.checkout import checkout
from meshq.exec.environment import EnvironmentCache
from meshq.exec.objects import ObjectStore
from meshq.exec.shell import Callbacks, ExecShell
from meshq.exec.worker import WorkerConfig
from meshq.ids import Fence, PeerId, TaskId
from meshq.ids import fence as token
from meshq.ledger import holder
from meshq.ledger import timing as ledger_timing
from meshq.ledger.core import Ledger
from meshq.ledger.effects import Answer, GrantReply, GrantRequest, Push, PushReply, Question
from meshq.ledger.rendezvous import claimants
from meshq.ledger.shell import Hooks, LedgerShell
from meshq.ledger.store import Store
from meshq.ledger.transfer import decode_answer
from meshq.machine import gpus_allowed, measure, open_ports
from meshq.membership import Membership
from meshq.settings import Settings
from meshq.task import Claimed, Outcome, Telemetry
from meshq.telemetry import publish
from meshq.trust import cookie, hardening, identity
from meshq.trust.keyholder import KeyHolder
from meshq.trust.keyring import RING_BYTES_MAX
from meshq.web.attempt_files import AttemptFiles
from meshq.web.changes import THE_MESH, Changes
from meshq.web.control_api import ControlApi
from meshq.web.desk import AgentHooks, Desk, MeshFacts
from meshq.web.gate import Gate, RequestLimiter, make_runner, user_source
from meshq.web.key_exchange import EXCHANGE_SECONDS, RING_PATH, KeyExchange
from meshq.web.key_steps import KeySteps
from meshq.web.peer_api import GRANTS_BYTES_MAX, PUSH_BYTES_MAX, PeerApi, share_of
from meshq.web.peer_client import PeerClient
from meshq.web.transfer import Transfers

log = logging.getLogger("meshq.agent")

EXPIRE_SECONDS: Final = 3600.0
TELEMETRY_SECONDS: Final = 10.0  # design section 4; changes of capacity go out at once
WALL_SECONDS: Final = 1.0
SETTLE_SECONDS: Final = 3.0  # for the first sync with a known peer before the agent calls itself ready
FINDINGS_SECONDS: Final = 1.0
DROP_SECONDS: Final = 1.0  # after a key was removed, for answers that are under way
GRANT_SECONDS: Final = 5.0  # for a voter to answer: a connection that is stuck must not cost the next renewals, too
END_SECONDS: Final = 20.0  # for attempts to end when the agent leaves: SIGTERM, then SIGKILL after 10 s


def boottime() -> float:
    """Seconds that go on while the machine sleeps: what leases are counted by."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Agent:
    """Everything that runs in this process. Made inside a running event loop."""

    def __init__(self, home: Home, switches: Switches) -> None:
        self.home = home
        failpoints.arm(switches.failpoints, str(home.deaths))
        self.settings: Settings = settings.load(home.settings)
        self._task_limits = ((resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[0]),)
        self.warnings = hardening.harden()  # raises the limit of open files: for the agent, not for tasks that use select()
        self._group = cookie.prepare_home(home, self.settings.group)
        self._identity = identity.load_or_create(home.identity)
        self.keys = KeyHolder(home.key, self._identity)
        self._me = self._identity.peer
        self._stop = asyncio.Event()
        self._failure: MeshqError | None = None
        self._draining = False
        self._counters_own: Counter[str] = Counter()
        self._loop_tasks: set[asyncio.Task[Any]] = set()
        self._gpus_allowed = gpus_allowed(self.settings)
        self._running_since = boottime()
        self._events = EventLog(home.events if switches.events else None, boottime)
        self._alive: list[str] = []  # as the event log has them
        self._results: dict[TaskId, tuple[str, str]] = {}  # as the event log has them
        sslproto.SSLProtocol.max_size = config.TLS_READ_BYTES
        self._make_ports()
        self._make_cores()
        self._make_web()

    # ---- composition

    def _make_ports(self) -> None:
        self._udp, self._tcp, self.port = open_ports(self.settings.bind or "", self.settings.port)

    def _make_cores(self) -> None:
        now = boottime()
        rng = random.Random(os.urandom(16))
        self._store = Store.open(self.home, self._me)
        stored = self._store.load()
        profile = self.settings.profile
        timing = {"lan": ledger_timing.LAN, "wan": ledger_timing.WAN, "fast": ledger_timing.FAST}[profile]
        core = Ledger(
            self._me, stored.ledger_epoch, timing, stored.rows, stored.vector, stored.floors, rng, now, stored.settings,
            stored.grants, new_actor=stored.new_actor,
        )  # fmt: skip
        core.set_wall_offset(now, time.time())
        self._ledger_core = core
        self.machine = measure(self.settings)
        self._environments = EnvironmentCache(self.home.environments, self.home.package_cache, hidden=self.home.root)
        self.exec = ExecShell(
            home=self.home,
            config=WorkerConfig(slots=self.machine.slots, cpus=self.machine.cpus, memory_bytes=self.machine.memory_bytes),
            peer_name=lambda: self.members.core.me.name,
            source=self._provide_source,
            environment=self._environments.ready,
            callbacks=Callbacks(
                on_ready=self._attempt_ready, on_slow=self._attempt_slow,
                on_ended=self._attempt_ended, on_capacity=self._capacity_changed,
            ),
            gpus_allowed=self._gpus_allowed,
            limits=self._task_limits,
            slot_for_each_gpu=self.settings.slots is None,
        )  # fmt: skip
        self.members = Membership(
            home=self.home, settings=self.settings, me=self._me, udp=self._udp, port=self.port, telemetry=Telemetry(),
            seal=self.keys.seal, open=self.keys.open, client=lambda: self.client,
            hooks=membership.Hooks(
                on_views=self._views_changed, on_note=lambda peer, note: self.ledger.note(peer, note),
                on_stall=lambda seconds: self.ledger.stalled(seconds), on_capacity=self._capacity_changed, track=self._track,
            ),
            clock=boottime, strangers=lambda: self.keys.strangers,
        )  # fmt: skip
        self.peers, self.gossip, self.meeting = self.members.peers, self.members.gossip, self.members.meeting

    def _make_web(self) -> None:
        self.client = PeerClient(
            lambda: self.keys.client_context, lambda: self.keys.seed_context,
            lambda peer: self.gossip.core.addresses(peer), self.members.refused, self.members.asked_by_tcp,
        )  # fmt: skip
        self.key_exchange = KeyExchange(holder=self.keys, peers=self.peers, ask=self._ask_for_ring)
        self.changes = Changes()
        self.ledger = LedgerShell(
            self._ledger_core,
            self._store,
            Hooks(
                send_push=self._send_push, send_sync=self._send_sync, send_grants=self._send_grants,
                on_prepare=self._prepare, on_keep=self.exec.keep, on_start=self._start_attempt,
                on_stop=self._stop_attempt, on_change=self._row_changed,
                on_note=lambda note: self.gossip.core.note(note),
            ),
            boottime,
        )  # fmt: skip
        self.objects = ObjectStore(self.home.objects)
        self.files = AttemptFiles(self.home)
        self._limiter = RequestLimiter(share_of)
        self.transfers = Transfers(self.client, self.objects, self.files, self.peers.others_alive)
        self.peer_api = PeerApi(
            gossip=self.gossip, ledger=self.ledger, objects=self.objects, files=self.files, transfers=self.transfers,
            keys=self.key_exchange,
        )  # fmt: skip
        facts = MeshFacts(version=version("meshq"), port=self.port, home=str(self.home.root), pid=os.getpid())
        self.desk = Desk(
            facts=facts, peers=self.peers, ledger=self.ledger, objects=self.objects, transfers=self.transfers,
            changes=self.changes, keys=KeySteps(self.key_exchange, self.peers),
            hooks=AgentHooks(
                peer_facts=self.members.facts, doctor=self._doctor, leave=self.leave, failure=self.client.failure,
                on_acked=lambda tasks, names: self._events.note("acked", tasks=tasks, stored_on=names),
            ),
            clock=boottime,
        )  # fmt: skip

    # ---- life

    async def run(self, ready: Callable[[Mapping[str, Any]], None]) -> None:
        """Be a peer until `leave`, SIGTERM or SIGINT. `ready` is called once, when this peer is a member."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        self._track(self.ledger.run(), "ledger", vital=True)
        measuring = self._track(self._measure(), "first look at this machine")
        fences = await self.exec.start()
        self.members.recall()
        self.peers.handle_own_telemetry(self._telemetry())
        self.members.tell_views()  # what this peer has; without it a machine that is alone could not even take its own tasks
        self.exec.adopt()  # first: the ledger may say stop at once; what exec reports reaches the core after its `adopt`
        await self.ledger.adopt(fences)
        await self._open_doors()
        await self._meet()
        vital = {
            "display clock": self._keep_the_display_clock_right(),
            "telemetry": self._publish_periodically(),
            "cleaning up": self._clean_up(),
            "meeting": self.meeting.run(),
            "keys": self.key_exchange.run(),
            "name": self.members.keep_name(),
        }
        for name, work in vital.items():
            self._track(work, name, vital=True)
        user = hardening.user_name(os.geteuid())
        self._events.note("up", peer=self._me, name=self.peers.name(self._me))
        ready(self.desk.me() | {"warnings": self.warnings, "user": user, "findings": await self._findings(measuring)})
        try:
            await self._stop.wait()
            if self._failure is not None:
                await self._give_up()
                raise self._failure
        finally:
            await self._close()

    async def _give_up(self) -> None:
        """This agent cannot go on, because the disk refuses or it met a bug. Its attempts end before it says left: nobody may
        start another one while they run (P3)."""
        for fence in list(self.exec.attempts()):
            self.exec.stop(fence, "released")
        with suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                await self._nothing_runs()
        await self.gossip.leave()

    async def _open_doors(self) -> None:
        peer_runner = make_runner(self.peer_api.application(self._limiter))
        await peer_runner.setup()
        assert peer_runner.server is not None
        self._peer_gate = Gate(peer_runner.server, self.keys.server_context)
        self._peer_gate.start(self._tcp)
        api = ControlApi(self.desk, cookie.make_cookie(self.home, self._group), os.geteuid())
        control_runner = make_runner(api.application())
        await control_runner.setup()
        assert control_runner.server is not None
        self._control_gate = Gate(control_runner.server, None, user_source(os.geteuid(), self._group))
        self._control_gate.start(control.listen(self.home, self._group))
        self._runners = (peer_runner, control_runner)
        self.keys.on_change = self._keys_changed

    async def _meet(self) -> None:
        """Ask for others, and wait a moment for the first answer if there is anybody to ask."""
        self.gossip.start()
        somebody = await self.meeting.begin(tags=lambda: self.keys.mdns_tags, port=self.port)
        self._capacity_changed()
        if somebody:
            with suppress(TimeoutError):
                async with asyncio.timeout(SETTLE_SECONDS):
                    while not self.peers.others_alive():
                        await self.changes.wait(THE_MESH, SETTLE_SECONDS)
            await self.key_exchange.settle()

    async def leave(self, drain: bool, seconds: float | None) -> list[TaskId]:
        """End the attempts (with `drain` let them end), say left, stop. What could not be ended: its processes are stuck."""
        self._draining = True
        self._capacity_changed()
        if drain:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._nothing_runs()
        await self.ledger.leave()
        with suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                await self._nothing_runs()
        stuck = [attempt.claimed.task for attempt in self.exec.attempts().values()]
        if stuck:
            log.warning("left while processes of %s still run: they could not be ended", ", ".join(stuck))
        await self.members.leave()  # takes a second, in which the last pushes arrive
        self._stop.set()
        return stuck

    async def _nothing_runs(self) -> None:
        while self.exec.attempts():
            await self.changes.wait(THE_MESH, 1.0)

    async def _close(self) -> None:
        await self.meeting.end()
        for gate in (self._control_gate, self._peer_gate):
            await gate.close()
        for runner in self._runners:
            await runner.cleanup()
        await self.exec.close()
        await self._environments.close()
        await self.gossip.stop()
        await self.transfers.close()
        await self.client.close()
        for loop_task in list(self._loop_tasks):
            loop_task.cancel()
        await asyncio.gather(*self._loop_tasks, return_exceptions=True)
        self._store.close()
        self._events.close()
        self.objects.close()
        self.home.socket.unlink(missing_ok=True)

    # ---- gossip

    def _views_changed(self) -> None:
        self.changes.notify(THE_MESH)
        self.ledger.peers(self.peers.views())
        alive = sorted(self.peers.name(peer) for peer in self.peers.others_alive())
        if alive != self._alive:
            self._alive = alive
            self._events.note("alive", peers=alive)

    async def _keep_the_display_clock_right(self) -> None:
        while True:
            self._ledger_core.set_wall_offset(boottime(), time.time())
            await asyncio.sleep(WALL_SECONDS)

    async def _clean_up(self) -> None:
        """Copies that were kept long enough, and objects that no task has use for."""
        while True:
            await asyncio.to_thread(self.files.expire, time.time())
            used = list(self._ledger_core.catalog.sources())
            await asyncio.to_thread(self.objects.discard_unused, used, time.time())
            await asyncio.sleep(EXPIRE_SECONDS)

    # ---- keys

    async def _ask_for_ring(self, peer: PeerId, body: bytes) -> bytes:
        return await self.client.post(peer, RING_PATH, body, answer_bytes_max=RING_BYTES_MAX, seconds=EXCHANGE_SECONDS)

    def _keys_changed(self) -> None:
        """New connections are of the key in use; those of removed keys end a moment later: an answer may be under way."""
        self._capacity_changed()
        self.meeting.announce_anew()
        self._track(self._drop_removed(), "connections of removed keys")

    async def _drop_removed(self) -> None:
        await self.client.renew()
        await asyncio.sleep(DROP_SECONDS)
        dropped = self._peer_gate.drop(self.keys.admits) + self.client.drop(self.keys.admits)
        if dropped:
            log.info("%d connections of removed keys were closed", dropped)

    # ---- ledger and exec

    async def _send_push(self, peer: PeerId, push: Push) -> PushReply:
        answer = await self.client.post(peer, "/ledger/push", codec.encode(push), answer_bytes_max=PUSH_BYTES_MAX)
        return codec.decode(PushReply, answer, bytes_max=PUSH_BYTES_MAX)

    async def _send_sync(self, peer: PeerId, question: Question) -> Answer:
        answer = await self.client.post(peer, "/ledger/sync", codec.encode(question), answer_bytes_max=PUSH_BYTES_MAX)
        return await asyncio.to_thread(decode_answer, answer)

    async def _send_grants(self, peer: PeerId, request: GrantRequest) -> GrantReply:
        body, most = codec.encode(request), GRANTS_BYTES_MAX
        answer = await self.client.post(peer, "/ledger/grants", body, answer_bytes_max=most, seconds=GRANT_SECONDS)
        return codec.decode(GrantReply, answer, bytes_max=most)

    async def _provide_source(self, claimed: Claimed, folder: Path) -> None:
        commit = claimed.spec.source.commit
        assert commit is not None, "exec asks only for what has a source"
        await self.transfers.fetch_source(commit, claimed.spec.submitted_peer)
        await asyncio.to_thread(checkout, self.objects, commit, folder)

    def _prepare(self, claimed: Claimed) -> None:
        self._events.note("claimed", task=claimed.task, fence=claimed.fence)
        self.exec.prepare(claimed)

    def _start_attempt(self, fence: Fence) -> None:
        self._events.note("started", fence=fence)
        self.exec.start_attempt(fence)

    def _row_changed(self, task: TaskId) -> None:
        self.changes.notify(task)
        row = self._ledger_core.row(task) if self._events.on else None
        if row is None:
            return
        reading = holder.read(row)
        fence = "" if reading.result is None else token(reading.claims[reading.result[0]].attempt, reading.result[0])
        if reading.status.final and self._results.get(task) != (reading.status.value, fence):
            self._results[task] = (reading.status.value, fence)
            self._events.note("result", task=task, status=reading.status.value, fence=fence)

    def _stop_attempt(self, fence: Fence, reason: str) -> None:
        self._events.note("stopping", fence=fence, reason=reason)
        self.exec.stop(fence, "released" if reason == "leaving" else reason)

    def _attempt_ready(self, fence: Fence) -> None:
        self.ledger.ready(fence)

    def _attempt_slow(self, fence: Fence) -> None:
        self.ledger.slow(fence)

    def _attempt_ended(self, fence: Fence, outcome: Outcome) -> None:
        self._events.note("exited", fence=fence, kind=outcome.kind.value, exit_code=outcome.exit_code)
        failpoints.reach("reported")
        self._track(self._report(fence, outcome), f"report {fence}")

    async def _report(self, fence: Fence, outcome: Outcome) -> None:
        """The end is durable first; then exec may forget it, and somebody else gets a copy of log and outputs."""
        await self.ledger.ended(fence, outcome)
        self._events.note("ended", fence=fence)
        failpoints.reach("acked")
        self.exec.reported(fence)
        self.changes.notify(THE_MESH)
        for opened in await asyncio.to_thread(cookie.mend_modes, self.home, self._group):
            log.warning(
                "after attempt %s %s: others could have read it; if they may not, change the key (`meshq key install`)",
                fence,
                opened,
            )
            self._counters_own["home opened to others"] += 1
        others = self.peers.others_alive() if outcome.started_at is not None else []
        if others and await self.transfers.offer_copy(fence, claimants(TaskId(fence), 1, others)) is None:
            log.warning("no other peer keeps a copy of the log and outputs of attempt %s", fence)
            self._counters_own["attempts without a copy"] += 1

    def _capacity_changed(self) -> None:
        telemetry = self._telemetry()
        self.peers.handle_own_telemetry(telemetry)
        self.ledger.capacity(telemetry)
        self.gossip.publish(record.pack(telemetry))
        self.changes.notify(THE_MESH)

    def _telemetry(self) -> Telemetry:
        running = [attempt.claimed.task for attempt in self.exec.attempts().values()]
        return publish(
            self.settings, replace(self.machine, slots=self.exec.slots()), self.exec.free(), self.exec.sample(), running,
            ledger_epoch=self._ledger_core.ledger_epoch, draining=self._draining, gpus_allowed=self._gpus_allowed,
            keys=self.keys.ids, ring=self.keys.digest, problem=self.members.problem, damped=self.members.damped,
            wall=time.time(),
        )  # fmt: skip

    async def _publish_periodically(self) -> None:
        while True:
            await asyncio.sleep(max(TELEMETRY_SECONDS, len(self.peers.members()) / 50))
            self._capacity_changed()

    # ---- for the desk

    async def _measure(self) -> doctor.Measured:
        return await doctor.measure(self.home.root, mdns=self.settings.mdns, bind=self.settings.bind or "")

    def _examine(self, measured: doctor.Measured) -> list[doctor.Check]:
        facts = doctor.gather(
            measured, now=boottime(), wall=time.time(), started=self._running_since, home=self.home.root,
            settings=self.settings, port=self.port, addresses=self.members.addresses(), swim=self.gossip.core,
            peers=self.peers, gossip=self.gossip.stats(), mdns_problem=self.meeting.mdns_problem, sample=self.exec.sample(),
            accepted=self._peer_gate.accepted,
            keys=doctor.key_ring(self.keys.ring.use.key, self.keys.ids, len(self.key_exchange.refusing), self.peers),
            damage=self._store.counters,
            other_meshes=self.meeting.other_meshes,
        )  # fmt: skip
        return doctor.examine(facts)

    async def _doctor(self) -> dict[str, object]:
        return doctor.to_document(self._examine(await self._measure()), self._counters())

    async def _findings(self, measuring: "asyncio.Task[doctor.Measured]") -> list[dict[str, object]]:
        """What the doctor has to say when this peer joins; being ready does not wait for it for more than a moment."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FINDINGS_SECONDS):
                await asyncio.shield(measuring)
        measured = measuring.result() if measuring.done() and not measuring.exception() else doctor.Measured()
        return doctor.findings(self._examine(measured))

    def _counters(self) -> dict[str, int]:
        """Everything that was refused, dropped or repeated anywhere in this process."""
        named: dict[str, Mapping[Any, int]] = {
            "agent": self._counters_own,
            "gossip": self.gossip.stats(),
            "packets": self.keys.counters,
            "keys": self.key_exchange.counters,
            "peer client": self.client.counters,
            "ledger": self._ledger_core.counters,
            "store": self._store.counters,
            "peer port": self._peer_gate.counters,
            "peer requests": self.peer_api.counters | {"too many at once": self._limiter.refused},
            "control socket": self._control_gate.counters,
            "peers": {"undecodable records": self.peers.undecodable_records},
            "discovery": self.meeting.counters,
        }
        return {f"{part}: {name}": count for part, counters in named.items() for name, count in counters.items() if count}

    def _track(self, work: Coroutine[Any, Any, Any], name: str, *, vital: bool = False) -> asyncio.Task[Any]:
        """Run a loop task that lives as long as the agent, or shorter. A failure is logged; that of a `vital` one ends the
        agent, which would be crippled without it."""
        loop_task = asyncio.get_running_loop().create_task(work, name=name)
        self._loop_tasks.add(loop_task)
        loop_task.add_done_callback(self._vital_ended if vital else self._loop_task_ended)
        return loop_task

    def _loop_task_ended(self, loop_task: asyncio.Task[Any]) -> None:
        self._loop_tasks.discard(loop_task)
        if not loop_task.cancelled() and (error := loop_task.exception()) is not None:
            log.error("the loop task %s failed", loop_task.get_name(), exc_info=error)

    def _vital_ended(self, loop_task: asyncio.Task[Any]) -> None:
        self._loop_task_ended(loop_task)
        if loop_task.cancelled() or self._stop.is_set():
            return
        error = loop_task.exception()
        bug = MeshqError(f"the agent met a bug in {loop_task.get_name()} and ended", f"the details are in {self.home.log}")
        self._failure = error if isinstance(error, MeshqError) else bug
        self._stop.set()


def run(home: Home, ready: Callable[[Mapping[str, Any]], None], switches: Switches) -> None:
    """Run the agent of this home in the foreground until it is stopped. The caller holds the home's lock."""
    set_up_logging(home)

    async def go() -> None:
        await Agent(home, switches).run(ready)

    asyncio.run(go())


def set_up_logging(home: Home) -> None:
    """Rotating files in the home; in front of a person also what is worth a warning. A thread writes: no disk that hangs may
    hold up the loop."""
    to_file = logging.handlers.RotatingFileHandler(
        home.log, maxBytes=config.AGENT_LOG_BYTES_MAX, backupCount=config.AGENT_LOG_FILES - 1, delay=True
    )
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_screen = logging.StreamHandler()
    to_screen.setLevel(logging.WARNING)
    to_screen.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    root = logging.getLogger("meshq")
    root.setLevel(logging.INFO)
    root.propagate = False
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    writer = logging.handlers.QueueListener(records, to_file, to_screen, respect_handler_level=True)
    writer.start()
    atexit.register(writer.stop)
    root.handlers = [logging.handlers.QueueHandler(records)]


def main(arguments: list[str]) -> NoReturn:
    """`python -m meshq.agent HOME READY_FD LOCK_FD FAILPOINTS EVENTS`: the agent in the background, for `meshq join --detach`.

    READY_FD gets one line: the ready document, or the error that kept the agent from starting.
    """
    hardening.hide_process()
    hardening.forget_settings()
    home = Home(Path(arguments[0]))
    channel = socket.socket(fileno=int(arguments[1]))
    os.set_inheritable(int(arguments[2]), False)  # the lock is this process's: a task must not keep it
    channel.set_inheritable(False)

    def answer(document: Mapping[str, Any]) -> None:
        with suppress(OSError):  # nobody waits any more
            channel.sendall(json.dumps(document).encode() + b"\n")
        channel.close()

    try:
        run(home, answer, Switches(failpoints=arguments[3], events=bool(arguments[4])))
        code = 0
    except MeshqError as error:
        answer({"error": {"code": error.code, "message": error.message, "hint": error.hint}})
        log.error("%s", error)
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
