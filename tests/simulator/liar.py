"""A malicious member: an honest agent that for a while also says what no agent would say (F31).

Its lies are made of the rows, rumors and questions of the run. They travel as bytes, as all that a peer hears does, and are
read and judged by the real cores. What must hold: nothing but a PeerError comes out of a core, and then its state is what it
was; whatever a lie is about (`Watcher.forged`, `Watcher.slandered`) may be as the liar says, since a member is believed;
everything else must be as if nobody had lied. Not told are the lies that meshq does not claim to withstand (docs/security.md):
votes given twice, vectors that cover what nobody wrote, counters of gossip at their very end, other runs of a peer.
"""

from collections.abc import Callable
from dataclasses import replace
from math import nan
from typing import TYPE_CHECKING, Final

from meshq import codec
from meshq.config import SYNC_ROWS_MAX
from meshq.errors import PeerError
from meshq.gossip.member import Liveness, Member
from meshq.gossip.wire import COUNT_MAX, GossipOnly, Packet, Rumor
from meshq.ids import LEDGER_EPOCH_MAX, ActorId, Dot, Epoch, Fence, PeerId, TaskId, actor_id
from meshq.ledger.effects import (
    Answer,
    Ask,
    GrantReply,
    GrantRequest,
    Push,
    PushReply,
    Question,
    SyncCompare,
    SyncOffer,
    SyncOpen,
    SyncPage,
    SyncPull,
)
from meshq.ledger.grants import ASKS_MAX
from meshq.ledger.reconcile import RANGES_MAX
from meshq.ledger.row import REGISTER_MAX, Cancel, Claim, Ended, Fact, Lost, NumberRegister, Row, Started, TextRegister
from meshq.ledger.settings import SETTINGS_MAX, Settings
from meshq.ledger.transfer import decode_answer, decode_question
from meshq.task import EndKind, Needs, Outcome, TaskSpec
from meshq.web.peer_api import GRANTS_BYTES_MAX, PUSH_BYTES_MAX

if TYPE_CHECKING:
    from tests.simulator.mesh_peer import MeshPeer
    from tests.simulator.simulation import Simulation

PAUSES: Final = (0.02, 0.4)
EPOCH_AWAY: Final = 7_777  # of the actor that the lies are written as: the honest half of the liar goes on with its own
OWN_ROWS: Final = 100  # of itself, at a time
OWN_ROWS_MAX: Final = 1_000
FORGED_MAX: Final = 3  # tasks of others about which lies are told
TWISTED: Final = 0.4  # of its answers
SLANDERS_MAX: Final = 20  # each costs its victim a refutation, of which there is one a second


class Liar:
    """The lies of one peer. They end with its agent, or when their time is over."""

    def __init__(self, mesh: "Simulation", peer: "MeshPeer", until: float) -> None:
        self._mesh = mesh
        self._peer = peer
        self._until = until
        self._rng = mesh.world.rng_for(f"{peer.name}/liar")
        self._run = peer.run
        self._actor = actor_id(peer.id, peer.core.ledger_epoch + EPOCH_AWAY)
        self._seq = 0
        self._forged: dict[TaskId, None] = {}
        self._slanders = 0
        self._lie()

    @property
    def lies(self) -> bool:
        """Whether it lies now."""
        return self._run == self._peer.run and self._peer.running and self._mesh.world.now < self._until

    def _lie(self) -> None:
        if not self.lies or self._mesh.faults.calm:
            return
        kinds = (
            self._many_rows, self._huge_row, self._own_rows, self._own_rows, self._writes_of_others, self._from_the_future,
            self._epochs, self._epochs, self._settings, self._positions, self._claims_that_are_none, self._forge,
            self._question, self._question, self._grants, self._unasked, self._packet, self._packet, self._packet,
        )  # fmt: skip
        others = [peer for peer in self._mesh.running() if peer is not self._peer]
        if others:
            self._rng.choice(kinds)(self._rng.choice(others))
        self._peer.later(self._rng.uniform(*PAUSES), self._lie)

    # ---- how a lie gets there

    def _tell(self, target: "MeshPeer", what: str, hear: Callable[["MeshPeer"], object]) -> None:
        """As a request over TLS: the target knows who speaks."""
        self._mesh.happened["lies"] += 1
        self._mesh.happened[f"lies: {what}"] += 1
        self._mesh.world.trace(self._peer.name, "lies", what, target.name)
        self._peer.ask(target.id, lambda asked, answer: self._heard(asked, what, hear), lambda _: None, lambda: None)

    def _heard(self, target: "MeshPeer", what: str, hear: Callable[["MeshPeer"], object]) -> None:
        """A core may refuse by a PeerError and stays as it was, or take it; anything else would end the agent."""
        before = target.state()
        try:
            hear(target)
        except PeerError:
            self._mesh.happened["lies refused"] += 1
            if target.state() != before:
                self._mesh.watcher.fail(f"F31: {target.name} has refused {what}, and is changed by it")
        except AssertionError:
            raise
        except Exception as error:  # whatever it is, it must not come from what another peer says
            self._mesh.watcher.fail(f"F31: {what} has ended the agent on {target.name}: {error!r}")
        else:
            self._mesh.happened["lies taken"] += 1

    def _push(self, target: "MeshPeer", what: str, push: Push, *, refused: bool | None = None) -> None:
        """`refused`: whether its rows must be; None: as may be."""
        data = codec.encode(push)

        def judge(reply: object) -> None:
            assert isinstance(reply, PushReply)
            if refused is not None and bool(reply.refused) is not refused:
                self._mesh.watcher.fail(f"F31: of {what} {target.name} refused {reply.refused}")
            for task in reply.refused:
                self._mesh.happened["lies refused"] += 1
                self._mesh.world.trace(target.name, "refuses", task)

        def hear(asked: "MeshPeer") -> None:
            asked.serve_push(self._peer.id, codec.decode(Push, data, bytes_max=PUSH_BYTES_MAX), judge)

        self._tell(target, what, hear)

    # ---- rows

    def _row(self, *facts: Fact, actor: ActorId | None = None, **more: object) -> Row:
        """A well-formed task of the liar, that nobody can ever run."""
        self._seq += 1
        birth = Dot(self._actor, self._seq)
        dots = []
        for fact in facts:
            self._seq += 1
            dots.append((Dot(self._actor, self._seq), fact))
        spec = TaskSpec(
            name="lie", argv=("lie.py",), submitted_by="liar", submitted_at=0.0, submitted_peer=self._peer.id,
            queue="default", needs=Needs(gpus=99),
        )  # fmt: skip
        row = Row(
            birth=birth, spec=spec, vector={self._actor: self._seq}, facts=tuple(dots),
            queue=TextRegister(1, self._actor, spec.queue), position=NumberRegister(1, self._actor, 1),
            priority=NumberRegister(1, self._actor, 0),
        )  # fmt: skip
        row = replace(row, **more)  # type: ignore[arg-type]  # a test's shorthand
        self._mesh.watcher.forged[row.task] = None
        return row

    def _dots(self, *rows: Row) -> tuple[Dot, ...]:
        return tuple(Dot(self._actor, seq) for row in rows for seq in range(row.birth.seq, row.vector[self._actor] + 1))

    def _many_rows(self, target: "MeshPeer") -> None:
        row = self._row()
        self._push(target, "too many rows", Push(number=1, rows=(row,) * (SYNC_ROWS_MAX + 1), dots=()))

    def _huge_row(self, target: "MeshPeer") -> None:
        row = self._row()
        huge = replace(row, spec=replace(row.spec, argv=("x" * 1_100_000,)))
        self._push(target, "a huge row", Push(number=2, rows=(huge,), dots=(row.birth,)), refused=True)

    def _own_rows(self, target: "MeshPeer") -> None:
        """Rows that break no rule, and are many: each is over, so that nobody ever has to look at it again."""
        if self._seq >= 2 * OWN_ROWS_MAX:
            return
        rows = [self._row(Cancel(by="liar")) for _ in range(OWN_ROWS)]
        self._push(target, "many rows", Push(number=3, rows=tuple(rows), dots=self._dots(*rows)), refused=False)

    def _writes_of_others(self, target: "MeshPeer") -> None:
        """Dots of somebody else, above all that it has written."""
        victim = self._somebody()
        actor = actor_id(victim.id, victim.core.ledger_epoch)
        last = victim.core.vector.get(actor, 0)
        ahead = [Dot(actor, last + step) for step in range(1, 4)]
        row = self._row(Cancel(by="liar"))
        row = replace(row, vector={**row.vector, actor: last + 3})
        self._push(target, "writes of others", Push(number=4, rows=(row,), dots=(*self._dots(row), *ahead)))

    def _from_the_future(self, target: "MeshPeer") -> None:
        claim = Dot(self._actor, self._seq + 2)
        seen = {self._actor: self._seq + 1}
        row = self._row(
            Claim(attempt=999_999, peer=self._peer.id, seen=seen, at=1e15), Started(claim=claim, at=nan),
            Ended(claim=claim, outcome=Outcome(kind=EndKind.SUCCEEDED, exit_code=0, ended_at=-1e300)),
        )  # fmt: skip
        self._push(target, "stamps of the future", Push(number=5, rows=(row,), dots=self._dots(row)))

    def _epochs(self, target: "MeshPeer") -> None:
        """What the target is said to have been, and to have written since: it walks to the end of its epochs, or not."""
        victim = self._rng.choice((target, self._somebody()))
        mine = victim.core.ledger_epoch
        ahead = self._rng.choice((LEDGER_EPOCH_MAX, LEDGER_EPOCH_MAX - 2**20, mine + 256 * 2**20, mine + 2**20, mine + 1))
        row = self._row(Cancel(by="liar"))
        said = {actor_id(victim.id, min(ahead, LEDGER_EPOCH_MAX)): 1, actor_id(victim.id, mine): REGISTER_MAX}
        self._push(target, "epochs of others", Push(number=6, rows=(replace(row, vector={**row.vector, **said}),), dots=()))

    def _settings(self, target: "MeshPeer") -> None:
        self._seq += 1
        last = REGISTER_MAX if (sound := self._rng.random() < 0.5) else 2**60
        name = "queue/nowhere/paused"
        entries = {name: TextRegister(last, self._actor, "liar")}
        if not sound and self._rng.random() < 0.5:
            entries = {f"queue/q{number}/paused": TextRegister(1, self._actor, "x") for number in range(SETTINGS_MAX + 1)}
        self._mesh.watcher.settings_forged = True
        settings = Settings(entries, {self._actor: self._seq})
        self._push(target, "settings", Push(number=7, rows=(), dots=(Dot(self._actor, self._seq),), settings=settings))

    def _positions(self, target: "MeshPeer") -> None:
        place = self._rng.choice((REGISTER_MAX, -REGISTER_MAX, REGISTER_MAX + 1))
        row = self._row()
        row = replace(row, position=NumberRegister(REGISTER_MAX, self._actor, place))
        push = Push(number=8, rows=(row,), dots=self._dots(row))
        self._push(target, "positions", push, refused=place > REGISTER_MAX)

    def _claims_that_are_none(self, target: "MeshPeer") -> None:
        row = self._row(Cancel(by="liar"))
        wrong: tuple[Fact, ...] = (
            Ended(claim=Dot(self._actor, 2**40), outcome=Outcome(kind=EndKind.FAILED, exit_code=1, ended_at=0.0)),
            Lost(claim=Dot(actor_id(target.id, 1), 1)), Claim(attempt=0, peer=self._peer.id, seen={}),
            Claim(attempt=1, peer=target.id, seen={}), Claim(attempt=-5, peer=self._peer.id, seen={}),
        )  # fmt: skip
        fact = self._rng.choice(wrong)
        self._seq += 1
        bad = replace(row, facts=(*row.facts, (Dot(self._actor, self._seq), fact)), vector={self._actor: self._seq})
        self._push(target, "claims that are none", Push(number=9, rows=(bad,), dots=self._dots(bad)), refused=True)

    def _forge(self, target: "MeshPeer") -> None:
        """A fact about somebody's task, as it could be: that a claim which runs was lost."""
        known = [row for row in self._peer.core.tasks() if self._mesh.watcher.read(row).live and not row.voters]
        if not known or len(self._forged) >= FORGED_MAX:
            return
        row = self._rng.choice(known)
        self._forged[row.task] = self._mesh.watcher.forged[row.task] = None
        self._seq += 1
        claim = next(iter(self._mesh.watcher.read(row).live))
        dot = Dot(self._actor, self._seq)
        facts = tuple(sorted((*row.facts, (dot, Lost(claim=claim, reason="so says the liar"))), key=lambda item: item[0]))
        forged = replace(row, facts=facts, vector={**row.vector, dot.actor: dot.seq})
        self._push(target, "losses", Push(number=10, rows=(forged,), dots=(dot,)))

    # ---- questions and answers

    def _question(self, target: "MeshPeer") -> None:
        run = target.core._donor._run
        wrong: tuple[Question, ...] = (
            SyncOpen(number=1, buckets=b"x"), SyncOpen(number=-1, buckets=b"x" * 100_000),
            SyncPull(number=2, run=run, vector={actor_id(target.id, 1): -5}, at=2**50),
            SyncPull(number=2, run=run, vector={ActorId("nobody"): 2**60}, at=-1), SyncPull(number=2, run=run + 1, vector={}),
            SyncCompare(number=3, run=run, prefixes=("a",) * (RANGES_MAX + 1)),
            SyncCompare(number=3, run=run, prefixes=("no range!", "")),
            SyncCompare(number=3, run=run, wanted=(("", b"x"),), tasks=(TaskId("none"),)),
            SyncCompare(number=3, run=run, tasks=(TaskId("x"),) * 10_000),
        )  # fmt: skip
        data = codec.encode(self._rng.choice(wrong))
        self._tell(target, "questions", lambda asked: asked.serve_sync(self._peer.id, decode_question(data), lambda told: None))

    def _grants(self, target: "MeshPeer") -> None:
        claims = [fold.claimed for peer in self._mesh.peers.values() for fold in peer.machine.folders.values()]
        others = [each for each in claims if not each.fence.split(".")[1].startswith(self._peer.id[:26])]
        fence = self._rng.choice(others).fence if others else Fence("1.x.1")
        task = self._rng.choice(others).task if others else TaskId("none")
        asks = (Ask(task=task, fence=self._rng.choice((fence, Fence("no fence"), Fence("0." + fence)))),)
        wrong = (
            GrantRequest(number=1, seconds=30.0, asks=asks), GrantRequest(number=1, seconds=nan, asks=()),
            GrantRequest(number=1, seconds=1e9, asks=()), GrantRequest(number=1, seconds=30.0, asks=asks * (ASKS_MAX + 1)),
        )  # fmt: skip
        data = codec.encode(self._rng.choice(wrong))

        def hear(asked: "MeshPeer") -> None:
            asked.serve_grants(self._peer.id, codec.decode(GrantRequest, data, bytes_max=GRANTS_BYTES_MAX), lambda told: None)
            self._mesh.watcher.fail(f"F31: {asked.name} votes for what is not the liar's")

        self._tell(target, "votes", hear)

    def _unasked(self, target: "MeshPeer") -> None:
        """Answers to questions that nobody has asked."""
        liar, number = self._peer.id, self._rng.choice((0, -1, 2**40))
        reply = GrantReply(number=number, granted=tuple(target.machine.folders)[-3:])
        told = SyncOffer(number=number, run=1, vector={actor_id(target.id, target.core.ledger_epoch): 2**40})
        row = self._row()

        def hear(asked: "MeshPeer") -> None:
            before = asked.core.vector
            asked.feed(asked.core.handle_grant_reply(asked.now, liar, reply))
            asked.feed(asked.core.handle_sync_answer(asked.now, liar, told))
            asked.feed(asked.core.handle_sync_failed(asked.now, liar, number))
            asked.feed(asked.core.handle_push_failed(asked.now, liar, number))
            asked.feed(asked.core.handle_push_reply(asked.now, liar, PushReply(number=number, rows=(row,))))
            after = asked.core.vector  # claims and ends of its own may have been due
            if {actor: seq for actor, seq in after.items() if not actor.startswith(asked.id[:26])} != {
                actor: seq for actor, seq in before.items() if not actor.startswith(asked.id[:26])
            }:
                self._mesh.watcher.fail(f"F31: {asked.name} believes answers to what it never asked")

        self._tell(target, "answers unasked", hear)

    def twist(self, asker: PeerId, told: Answer) -> Answer:
        """What it says to a question that somebody has really asked."""
        if not self.lies or self._rng.random() > TWISTED or not self._mesh.peers[asker].running:
            return told
        self._mesh.happened["lies: answers"] += 1
        number, epoch = told.number, self._mesh.peers[asker].core.ledger_epoch
        far: dict[ActorId, int] = {actor_id(asker, epoch): 2**50, actor_id(asker, LEDGER_EPOCH_MAX): 1}
        wrong: tuple[Answer, ...] = (
            SyncOffer(number=number, run=7, yours=far), SyncOffer(number=number, run=7, vector=far, parts=(1,)),
            SyncOffer(number=number, run=7, vector={ActorId("nobody"): -1}), SyncPage(number=number, at=-1, last=False),
            SyncOffer(number=number, run=7, yours={actor_id(asker, epoch): 2**50}), replace(told, number=number + 1),
            SyncPage(number=number, rows=(b"garbage", b"")), SyncPage(number=number, below=True),
        )  # fmt: skip
        return decode_answer(codec.encode(self._rng.choice(wrong)))

    # ---- gossip

    def _packet(self, target: "MeshPeer") -> None:
        """By UDP, where whoever has the key may name any sender."""
        victim = self._somebody()
        if victim.gossip.swim is None:
            return
        sender = self._rng.choice((self._peer, victim))
        member = victim.gossip.core.me
        rumors, what = self._rumors(member)
        if what == "metadata" or self._slanders < SLANDERS_MAX:
            self._slanders += what != "metadata"
            told = Packet(sender.id, Epoch(sender.gossip.epoch), GossipOnly(), rumors)
            data = codec.encode(told) if self._rng.random() < 0.9 else self._rng.randbytes(self._rng.randrange(1_500))
            self._mesh.happened["lies"] += 1
            self._mesh.happened[f"lies: {what}"] += 1
            self._mesh.world.trace_bytes(b"liar", data)
            self._mesh.network.send(
                self._peer.name, target.name, target.when_awake, lambda: self._hear_packet(target, what, data)
            )

    def _rumors(self, member: Member) -> tuple[tuple[Rumor, ...], str]:
        observers = tuple(f"observer{number}" for number in range(8))
        match self._rng.randrange(6):
            case 0:
                return (Rumor(replace(member, liveness=Liveness.DEAD), observers),), "deaths"
            case 1:
                gone = self._rng.choice((Liveness.SUSPECT, Liveness.LEFT))
                return (Rumor(replace(member, liveness=gone), observers),), "deaths"
            case 2:
                self._mesh.watcher.slandered[member.peer] = None
                jump = self._rng.choice((member.incarnation + 1_000, COUNT_MAX))
                return (Rumor(replace(member, liveness=Liveness.DEAD, incarnation=jump), observers),), "incarnations"
            case 3:
                self._mesh.watcher.slandered[member.peer] = None
                return (Rumor(replace(member, epoch=Epoch(member.epoch + self._rng.randrange(1, 1_000)))),), "epochs"
            case 4:
                return (Rumor(replace(member, name="x" * 10_000)),), "metadata"
            case _:
                return (Rumor(replace(member, addresses=member.addresses * 500), observers * 50, -1),), "metadata"

    def _hear_packet(self, target: "MeshPeer", what: str, data: bytes) -> None:
        if target.gossip.swim is None:
            return
        gossip, before = target.gossip.swim, target.gossip.swim.members()
        try:
            effects = gossip.handle_packet(target.now, data, self._peer.gossip.address)
        except PeerError:
            self._mesh.happened["lies refused"] += 1
            if gossip.members() != before:
                self._mesh.watcher.fail(f"F31: {target.name} has refused {what}, and is changed by it")
        else:
            self._mesh.happened["lies taken"] += 1
            target.gossip.perform(effects)

    def _somebody(self) -> "MeshPeer":
        """Another one that runs, if there is any."""
        others = [peer for peer in self._mesh.running() if peer is not self._peer]
        return self._rng.choice(others or [self._peer])
