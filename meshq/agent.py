"""The agent: one process that is this machine's peer. The composition root, without rules of its own.

It makes the three cores and their shells, and carries words between them: gossip's beliefs become the ledger's views, the
ledger's claims become exec's attempts, exec's capacity becomes telemetry, which goes out by gossip. Around them stand the
peer port (mutual TLS) and the control socket.

Order at start: keys, ports, ledger, exec (which finds what an earlier run left), adoption, only then claims. At the end by
SIGTERM or Ctrl-C nothing is announced and no task is touched; `leave` ends the attempts, then says left.
"""

import asyncio
import json
import logging
import logging.handlers
import os
import random
import resource
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NoReturn, assert_never

from meshq import codec, config, control, doctor, settings
from meshq.config import Home
from meshq.errors import MeshqError, StoreError
from meshq.exec.checkout import checkout
from meshq.exec.confine import landlock_abi
from meshq.exec.environment import EnvironmentCache
from meshq.exec.objects import ObjectStore
from meshq.exec.shell import Callbacks, ExecShell
from meshq.exec.worker import WorkerConfig
from meshq.gossip import effects as gossip_effects
from meshq.gossip.discovery import own_addresses
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.profile import PROFILES
from meshq.gossip.swim import Swim
from meshq.gossip.transport import GossipShell
from meshq.ids import Epoch, Fence, PeerId, TaskId
from meshq.ledger import timing as ledger_timing
from meshq.ledger.core import Ledger
from meshq.ledger.effects import Push, PushReply, SyncPage, SyncRequest
from meshq.ledger.rendezvous import claimants
from meshq.ledger.shell import Hooks, LedgerShell
from meshq.ledger.store import Store
from meshq.machine import gpus_allowed, measure, next_epoch, open_ports, store_epoch
from meshq.meeting import Meeting
from meshq.peers import Peers, free_name
from meshq.settings import Settings
from meshq.task import Claimed, Outcome, Telemetry
from meshq.telemetry import publish
from meshq.trust import cookie, hardening, identity, keys
from meshq.trust.certificates import Credentials
from meshq.trust.seal import Opener, Sealer, key_id
from meshq.web.attempt_files import AttemptFiles
from meshq.web.changes import THE_MESH, Changes
from meshq.web.control_api import ControlApi
from meshq.web.desk import AgentHooks, Desk, MeshFacts
from meshq.web.documents import PeerFacts
from meshq.web.gate import Gate, RequestLimiter, make_runner, user_source
from meshq.web.peer_api import PUSH_BYTES_MAX, PeerApi, share_of
from meshq.web.peer_client import PeerClient
from meshq.web.transfer import Transfers

log = logging.getLogger("meshq.agent")

EXPIRE_SECONDS: Final = 3600.0
TELEMETRY_SECONDS: Final = 10.0  # design section 4; changes of capacity go out at once
WATCH_SECONDS: Final = 1.0
STALL_SECONDS: Final = 1.0
SETTLE_SECONDS: Final = 3.0  # for the first sync with a known peer before the agent calls itself ready
END_SECONDS: Final = 20.0  # for attempts to end when the agent leaves: SIGTERM, then SIGKILL after 10 s


def boottime() -> float:
    """Seconds that go on while the machine sleeps: what leases are counted by."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Agent:
    """Everything that runs in this process. Made inside a running event loop."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.settings: Settings = settings.load(home.settings)
        self._task_limits = ((resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[0]),)
        self.warnings = hardening.harden()  # raises the limit of open files: for the agent, not for tasks that use select()
        self._group = cookie.prepare_home(home, self.settings.group)
        self._key = keys.read(home.key)
        self._identity = identity.load_or_create(home.identity)
        self._me = self._identity.peer
        self._stop = asyncio.Event()
        self._failure: MeshqError | None = None
        self._draining = False
        self._counters_own: Counter[str] = Counter()
        self._views_due = False
        self._loop_tasks: set[asyncio.Task[Any]] = set()
        self._gpus_allowed = gpus_allowed(self.settings)
        self._make_ports()
        self._make_cores()
        self._make_web()

    # ---- composition

    def _make_ports(self) -> None:
        bind = self.settings.bind or ""
        self._udp, self._tcp, self.port = open_ports(bind, self.settings.port)
        self._loopback = bind.startswith("127.") or bind == "::1"

    def _addresses(self) -> tuple[Address, ...]:
        return own_addresses(self.port, self.settings.bind or "")

    def _make_cores(self) -> None:
        now = boottime()
        rng = random.Random(os.urandom(16))
        self._store = Store.open(self.home, self._me)
        stored = self._store.load()
        profile = self.settings.profile
        timing = {"lan": ledger_timing.LAN, "wan": ledger_timing.WAN, "fast": ledger_timing.FAST}[profile]
        core = Ledger(self._me, stored.ledger_epoch, timing, stored.rows, stored.vector, stored.floors, rng, now)
        core.set_wall_offset(now, time.time())
        self._ledger_core = core
        member = Member(
            peer=self._me,
            epoch=next_epoch(self.home.epoch),
            incarnation=0,
            liveness=Liveness.ALIVE,
            name=self.settings.name or settings.default_name(),
            addresses=self._addresses(),
            version=version("meshq"),
        )
        self.machine = measure(self.settings)
        self._environments = EnvironmentCache(self.home.environments, self.home.package_cache, hidden=self.home.root)
        self.exec = ExecShell(
            home=self.home,
            config=WorkerConfig(slots=self.machine.slots, cpus=self.machine.cpus, memory_bytes=self.machine.memory_bytes),
            peer_name=member.name,
            source=self._provide_source,
            environment=self._environments.ready,
            callbacks=Callbacks(
                on_ready=self._attempt_ready, on_slow=self._attempt_slow,
                on_ended=self._attempt_ended, on_capacity=self._capacity_changed,
            ),
            gpus_allowed=self._gpus_allowed,
            limits=self._task_limits,
        )  # fmt: skip
        self.peers = Peers(member, self._telemetry(), now)
        swim = Swim(member, PROFILES[profile], rng, now)
        sealer = Sealer(self._key.gossip_key, os.urandom(16))
        self._opener = Opener({key_id(self._key.gossip_key): self._key.gossip_key}, sealer.subkey_id)
        self.gossip = GossipShell(
            swim, self._udp, seal=sealer.seal, open=self._opener.open, sync=self._gossip_sync,
            on_effect=self._gossip_effect, clock=boottime,
        )  # fmt: skip
        self.meeting = Meeting(
            settings=self.settings, path=self.home.known_peers, gossip=self.gossip, peers=self.peers,
            addresses=self._addresses, clock=boottime, on_forgotten=self._views_changed,
        )  # fmt: skip

    def _make_web(self) -> None:
        credentials = Credentials(self._key, self._identity)
        self._server_context = credentials.server_context()
        self.client = PeerClient(
            credentials.client_context(), credentials.seed_context(), lambda peer: self.gossip.core.addresses(peer)
        )
        self.changes = Changes()
        self.ledger = LedgerShell(
            self._ledger_core,
            self._store,
            Hooks(
                send_push=self._send_push, send_sync=self._send_sync, on_prepare=self.exec.prepare,
                on_start=self.exec.start_attempt, on_stop=self._stop_attempt, on_change=self.changes.notify,
            ),
            boottime,
        )  # fmt: skip
        self.objects = ObjectStore(self.home.objects)
        self.files = AttemptFiles(self.home)
        self._limiter = RequestLimiter(share_of)
        self.transfers = Transfers(self.client, self.objects, self.files, self.peers.others_alive)
        self.peer_api = PeerApi(
            gossip=self.gossip, ledger=self.ledger, objects=self.objects, files=self.files, transfers=self.transfers
        )
        facts = MeshFacts(
            mesh_id=self._key.mesh_id, key=self._key.text, version=version("meshq"), port=self.port,
            home=str(self.home.root), pid=os.getpid(),
        )  # fmt: skip
        self.desk = Desk(
            facts=facts, peers=self.peers, ledger=self.ledger, objects=self.objects, transfers=self.transfers,
            changes=self.changes,
            hooks=AgentHooks(peer_facts=self._peer_facts, doctor=self._doctor, leave=self.leave),
            clock=boottime,
        )  # fmt: skip

    # ---- life

    async def run(self, ready: Callable[[Mapping[str, Any]], None]) -> None:
        """Be a peer until `leave`, SIGTERM or SIGINT. `ready` is called once, when this peer is a member."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        self._track(self.ledger.run(), "ledger", vital=True)
        fences = await self.exec.start()
        self.meeting.recall()
        self.peers.handle_own_telemetry(self._telemetry())
        self._tell_views()  # what this peer has; without it a machine that is alone could not even take its own tasks
        self.exec.adopt()  # first: the ledger may say stop at once; what exec reports reaches the core after its `adopt`
        await self.ledger.adopt(fences)
        await self._open_doors()
        await self._meet()
        vital = {
            "watch": self._watch(),
            "telemetry": self._publish_periodically(),
            "cleaning up": self._clean_up(),
            "seeds": self.meeting.ask_seeds_while_alone(),
            "snapshot": self.meeting.remember_changes(),
        }
        for name, work in vital.items():
            self._track(work, name, vital=True)
        ready(self.desk.me() | {"warnings": self.warnings, "user": hardening.user_name(os.geteuid())})
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
        self._peer_gate = Gate(peer_runner.server, self._server_context)
        self._peer_gate.start(self._tcp)
        api = ControlApi(self.desk, cookie.make_cookie(self.home, self._group), os.geteuid())
        control_runner = make_runner(api.application())
        await control_runner.setup()
        assert control_runner.server is not None
        self._control_gate = Gate(control_runner.server, None, user_source(os.geteuid(), self._group))
        self._control_gate.start(control.listen(self.home, self._group))
        self._runners = (peer_runner, control_runner)

    async def _meet(self) -> None:
        """Ask for others, and wait a moment for the first answer if there is anybody to ask."""
        self.gossip.start()
        somebody = await self.meeting.begin(tag=self._key.mdns_tag, port=self.port, loopback=self._loopback)
        self._capacity_changed()
        if somebody:
            with suppress(TimeoutError):
                async with asyncio.timeout(SETTLE_SECONDS):
                    while not self.peers.others_alive():
                        await self.changes.wait(THE_MESH, SETTLE_SECONDS)

    async def leave(self, drain: bool, seconds: float | None) -> None:
        """End the attempts (with `drain` let them end), say left, stop."""
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
        await self.gossip.leave()  # takes a second, in which the last pushes arrive
        self._stop.set()

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
        self.objects.close()
        self.home.socket.unlink(missing_ok=True)

    # ---- gossip

    def _gossip_effect(self, effect: gossip_effects.Effect) -> None:
        match effect:
            case gossip_effects.MemberChanged(_, after):
                log.info("%s (%s) is %s", after.name, after.peer[:8], after.liveness.name.lower())
                self.peers.handle_member(boottime(), after)
                self.meeting.handle_change()
                self._views_changed()
            case gossip_effects.RecordChanged(peer, record):
                self.peers.handle_record(peer, record)
                self._views_changed()
            case gossip_effects.ProbeFailed(peer):
                log.info("%s does not answer probes", self.peers.name(peer))
            case gossip_effects.Refuted(accusation):
                log.warning("this peer was held %s; refuted", accusation.liveness.name.lower())
                self._track(self._store_epoch(self.gossip.core.me.epoch), "epoch")
            case gossip_effects.Send() | gossip_effects.Sync():
                pass  # the shell's own
            case _:
                assert_never(effect)

    async def _store_epoch(self, epoch: Epoch) -> None:
        """Above the other run's, if there was one. If the disk refuses, the next start is refuted once more."""
        try:
            await asyncio.to_thread(store_epoch, self.home.epoch, epoch)
        except StoreError as error:
            log.warning("%s", error)

    def _check_name(self) -> None:
        me = self.gossip.core.me
        name = free_name(me.name, self._me, self.peers.members())
        if name != me.name:
            log.warning("another peer is called %s, too: this one is %s now", me.name, name)
            self.gossip.rename(name)

    def _views_changed(self) -> None:
        """Tell the ledger once for all that this turn of the loop brings."""
        self.changes.notify(THE_MESH)
        if not self._views_due:
            self._views_due = True
            asyncio.get_running_loop().call_soon(self._tell_views)

    def _tell_views(self) -> None:
        self._views_due = False
        self._check_name()  # here, and not while gossip still carries out the effects that brought the other name
        self.ledger.peers(self.peers.views())

    async def _gossip_sync(self, sync: gossip_effects.Sync) -> bytes:
        path, limit = "/gossip/sync", config.SYNC_BYTES_MAX
        if sync.peer is None:
            return await self.client.post_seed(sync.address, path, sync.request, answer_bytes_max=limit)
        return await self.client.post(sync.peer, path, sync.request, answer_bytes_max=limit, extra=(sync.address,))

    async def _watch(self) -> None:
        """Notice that this process did not run for a while, or that the machine slept; keep the display clock right."""
        while True:
            before = boottime()
            await asyncio.sleep(WATCH_SECONDS)
            stall = boottime() - before - WATCH_SECONDS
            self._ledger_core.set_wall_offset(boottime(), time.time())
            if stall > STALL_SECONDS:
                log.warning("this process stood still for %.1f s", stall)
                self.ledger.stalled(stall)

    async def _clean_up(self) -> None:
        """Copies that were kept long enough, and objects that no task has use for."""
        while True:
            await asyncio.to_thread(self.files.expire, time.time())
            used = [row.spec.source.commit for row in self._ledger_core.tasks() if row.spec.source.commit is not None]
            await asyncio.to_thread(self.objects.discard_unused, used, time.time())
            await asyncio.sleep(EXPIRE_SECONDS)

    # ---- ledger and exec

    async def _send_push(self, peer: PeerId, push: Push) -> PushReply:
        answer = await self.client.post(peer, "/ledger/push", codec.encode(push), answer_bytes_max=PUSH_BYTES_MAX)
        return codec.decode(PushReply, answer, bytes_max=PUSH_BYTES_MAX)

    async def _send_sync(self, peer: PeerId, request: SyncRequest) -> SyncPage:
        answer = await self.client.post(peer, "/ledger/sync", codec.encode(request), answer_bytes_max=PUSH_BYTES_MAX)
        return codec.decode(SyncPage, answer, bytes_max=PUSH_BYTES_MAX)

    async def _provide_source(self, claimed: Claimed, folder: Path) -> None:
        commit = claimed.spec.source.commit
        assert commit is not None, "exec asks only for what has a source"
        await self.transfers.fetch_source(commit, claimed.spec.submitted_peer)
        await asyncio.to_thread(checkout, self.objects, commit, folder)

    def _stop_attempt(self, fence: Fence, reason: str) -> None:
        self.exec.stop(fence, "released" if reason == "leaving" else reason)

    def _attempt_ready(self, fence: Fence) -> None:
        self.ledger.ready(fence)

    def _attempt_slow(self, fence: Fence) -> None:
        self.ledger.slow(fence)

    def _attempt_ended(self, fence: Fence, outcome: Outcome) -> None:
        self._track(self._report(fence, outcome), f"report {fence}")

    async def _report(self, fence: Fence, outcome: Outcome) -> None:
        """The end is durable first; then exec may forget it, and somebody else gets a copy of log and outputs."""
        await self.ledger.ended(fence, outcome)
        self.exec.reported(fence)
        self.changes.notify(THE_MESH)
        for opened in await asyncio.to_thread(cookie.mend_modes, self.home, self._group):
            log.warning("after attempt %s %s: others could have read it; if they may not, start a new mesh", fence, opened)
            self._counters_own["home opened to others"] += 1
        others = self.peers.others_alive() if outcome.started_at is not None else []
        if others and await self.transfers.offer_copy(fence, claimants(TaskId(fence), 1, others)) is None:
            log.warning("no other peer keeps a copy of the log and outputs of attempt %s", fence)
            self._counters_own["attempts without a copy"] += 1

    def _capacity_changed(self) -> None:
        telemetry = self._telemetry()
        self.peers.handle_own_telemetry(telemetry)
        self.ledger.capacity(telemetry)
        self.gossip.publish(codec.encode(telemetry))
        self.changes.notify(THE_MESH)

    def _telemetry(self) -> Telemetry:
        running = [attempt.claimed.task for attempt in self.exec.attempts().values()]
        return publish(
            self.settings, self.machine, self.exec.free(), self.exec.sample(), running,
            ledger_epoch=self._ledger_core.ledger_epoch, draining=self._draining, gpus_allowed=self._gpus_allowed,
        )  # fmt: skip

    async def _publish_periodically(self) -> None:
        while True:
            await asyncio.sleep(max(TELEMETRY_SECONDS, len(self.peers.members()) / 50))
            if (addresses := self._addresses()) != self.gossip.core.me.addresses:
                log.info("this machine's addresses are %s now", ", ".join(map(str, addresses)))
                self.gossip.readdress(addresses)
            self._capacity_changed()

    # ---- for the desk

    def _peer_facts(self) -> list[PeerFacts]:
        now = boottime()
        facts = []
        for member in (*self.peers.members(), *self.peers.remembered()):
            mine = member.peer == self._me
            addresses = self.gossip.core.addresses(member.peer) or member.addresses
            facts.append(
                PeerFacts(
                    member=self.gossip.core.me if mine else member,
                    address=(self._addresses() if mine else addresses or (None,))[0],
                    telemetry=self.peers.telemetry(member.peer),
                    age=0.0 if mine else self.gossip.core.record_age(now, member.peer),
                )
            )
        return facts

    async def _doctor(self) -> dict[str, object]:
        sample = self.exec.sample()
        facts = doctor.Facts(
            me=self.gossip.core.me,
            members=self.peers.members(),
            telemetry=self.peers.telemetry(self._me),
            home=self.home.root,
            uid=os.geteuid(),
            group=self.settings.group,
            mdns=self.settings.mdns,
            mdns_problem="see the agent's log" if self.meeting.counters.get("failed") else "",
            gpu_state=(sample.gpu_problem if sample else "") or "NVML sees none",
            landlock_abi=landlock_abi(),
            uv=doctor.find_uv(),
            addresses=self._addresses(),
        )
        checks = await asyncio.to_thread(doctor.examine, facts)
        return doctor.to_document(checks, self._counters())

    def _counters(self) -> dict[str, int]:
        """Everything that was refused, dropped or repeated anywhere in this process."""
        named: dict[str, Mapping[Any, int]] = {
            "agent": self._counters_own,
            "gossip": self.gossip.stats(),
            "packets": self._opener.counters,
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


def run(home: Home, ready: Callable[[Mapping[str, Any]], None]) -> None:
    """Run the agent of this home in the foreground until it is stopped. The caller holds the home's lock."""
    set_up_logging(home)

    async def go() -> None:
        await Agent(home).run(ready)

    asyncio.run(go())


def set_up_logging(home: Home) -> None:
    """Rotating files in the home; in front of a person also what is worth a warning."""
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
    root.handlers = [to_file, to_screen]


def main(arguments: list[str]) -> NoReturn:
    """`python -m meshq.agent HOME READY_FD LOCK_FD`: the agent in the background, started by `meshq join --detach`.

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
        run(home, answer)
        code = 0
    except MeshqError as error:
        answer({"error": {"code": error.code, "message": error.message, "hint": error.hint}})
        log.error("%s", error)
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
