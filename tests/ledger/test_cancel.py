"""A cancel wins over every start whose peer has received it, at whatever step of a claim and on whatever way it comes."""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import pytest

from meshq.ids import Dot, Fence, TaskId
from meshq.ledger.buckets import bucket_of
from meshq.ledger.core import Ledger
from meshq.ledger.effects import Effect, Prepare, Push, PushReply, SendPush, SendSync, Start, Stop, SyncOffer
from meshq.ledger.holder import attempts, reason, status
from meshq.ledger.row import Cancel, Claim, Lost, Row, Started, merge_vectors
from meshq.task import Claimed, EndKind, Status
from tests.ledger.builders import actor, dot, ledger, nothing_new, outcome, peer, spec, telemetry, view, views
from tests.ledger.mesh import Mesh, SimPeer
from tests.ledger.test_core import ack, only, row_in

A, B, C = peer("a"), peer("b"), peer("c")
PAIR = views(view("a"), view("b", telemetry(queues=())))
TRIO = views(view("a"), view("b", telemetry(queues=())), view("c", telemetry(queues=())))
BEFORE_PATIENCE_ENDS = 1.9  # it lasts a second, and then a claim starts without all acks


def claimed() -> tuple[Ledger, TaskId, Fence, list[Effect]]:
    """A core that has just claimed a task which another peer must still acknowledge."""
    core = ledger()
    core.adopt(0.0, [])
    [asked] = only(core.handle_peers(0.0, PAIR), SendSync)
    core.handle_sync_answer(0.0, B, nothing_new(asked))
    [task], effects = core.submit(1.0, [spec()], hold=False)
    [prepare] = only(effects, Prepare)
    return core, task, prepare.claimed.fence, effects


def preparing() -> tuple[Ledger, TaskId, Fence, list[Effect]]:
    core, task, token, effects = claimed()
    core.handle_slow(1.2, token)
    return core, task, token, effects


def ready() -> tuple[Ledger, TaskId, Fence, list[Effect]]:
    core, task, token, effects = preparing()
    assert only(core.handle_ready(1.3, token), Start) == []
    return core, task, token, effects


def acknowledged() -> tuple[Ledger, TaskId, Fence, list[Effect]]:
    core, task, token, effects = claimed()
    assert only(ack(core, 1.1, effects), Start) == []
    return core, task, token, effects


def adopted() -> tuple[Ledger, TaskId, Fence, list[Effect]]:
    """After a restart of the agent: exec still knows of the claim."""
    core, task, token, effects = claimed()
    again = ledger("a", core.tasks(), vector=core.vector)
    again.adopt(1.5, [token])
    again.handle_peers(1.5, PAIR)
    return again, task, token, effects


def cancelled_elsewhere(core: Ledger, task: TaskId) -> Row:
    """The row as another peer has it, which cancelled it without knowing of the claim."""
    born = row_in(core, task)
    at = dot("b", 1)
    vector = merge_vectors({born.birth.actor: born.birth.seq}, {at.actor: at.seq})
    return replace(born, facts=((at, Cancel(by="bob@b", at=1.0)),), vector=vector)


def by_command(core: Ledger, task: TaskId, sent: list[Effect]) -> list[Effect]:
    return core.cancel(BEFORE_PATIENCE_ENDS, task, "bob@b")


def by_push(core: Ledger, task: TaskId, sent: list[Effect]) -> list[Effect]:
    row = cancelled_elsewhere(core, task)
    return core.handle_push(BEFORE_PATIENCE_ENDS, B, Push(number=1, rows=(row,), dots=(dot("b", 1),)))[1]


def with_the_last_ack(core: Ledger, task: TaskId, sent: list[Effect]) -> list[Effect]:
    """The very message that would let the claim start says that the task is cancelled."""
    core.handle_ready(BEFORE_PATIENCE_ENDS, next(each.fence for each in core._runs._own.of(task)))
    effects: list[Effect] = []
    for effect in only(sent, SendPush):
        reply = PushReply(number=effect.push.number, rows=(cancelled_elsewhere(core, task),))
        effects += core.handle_push_reply(BEFORE_PATIENCE_ENDS, B, reply)
    return effects


def by_sync(core: Ledger, task: TaskId, sent: list[Effect]) -> list[Effect]:
    [asked] = only(core.handle_peers(BEFORE_PATIENCE_ENDS, TRIO), SendSync)
    part = bucket_of(actor("b"))
    offer = SyncOffer(number=asked.question.number, run=1, parts=(part,), vector={actor("b"): 1})
    core.handle_sync_answer(BEFORE_PATIENCE_ENDS, C, offer)
    return core.handle_sync_rows(BEFORE_PATIENCE_ENDS, C, asked.question.number + 1, [cancelled_elsewhere(core, task)])


Step = Callable[[], tuple[Ledger, TaskId, Fence, list[Effect]]]
Way = Callable[[Ledger, TaskId, list[Effect]], list[Effect]]


@pytest.mark.parametrize("way", [by_command, by_push, with_the_last_ack, by_sync])
@pytest.mark.parametrize("step", [claimed, preparing, ready, acknowledged])
def test_a_claim_that_has_not_started_ends_at_once_and_never_starts(step: Step, way: Way) -> None:
    if (step, way) == (acknowledged, with_the_last_ack):
        return  # the last ack has been there before
    core, task, token, sent = step()
    effects = way(core, task, sent)
    assert only(effects, Stop) == [Stop(token, "cancelled")]
    assert only(effects, Start) == []
    later = [*core.handle_ready(3.0, token), *core.handle_timeout(30.0)]
    later += core.handle_ended(31.0, token, outcome(EndKind.CANCELLED))
    assert (only(later, Start), only(later, Prepare)) == ([], [])
    [attempt] = attempts(row_in(core, task))
    assert (attempt.status, attempt.started_at) == ("cancelled", None)
    assert (status(row_in(core, task)), reason(row_in(core, task))) == (Status.CANCELLED, "cancelled by bob@b")
    core.check()


@pytest.mark.parametrize("way", [by_command, by_push, by_sync])
def test_a_claim_that_was_adopted_after_a_restart_does_not_start_either(way: Way) -> None:
    core, task, token, sent = adopted()
    assert Stop(token, "cancelled") in way(core, task, sent)
    assert only([*core.handle_ready(3.0, token), *core.handle_timeout(30.0)], Start) == []
    assert status(row_in(core, task)) is Status.CANCELLED


def test_an_agent_that_starts_with_a_cancel_on_its_disk_starts_nothing_and_stops_what_runs() -> None:
    core, task, token, _ = claimed()
    core.cancel(2.0, task, "bob@b")
    rows, vector = list(core.tasks()), core.vector
    again = ledger("a", rows, vector=vector)
    effects = [*again.adopt(3.0, [token]), *again.handle_peers(3.0, PAIR), *again.handle_ready(4.0, token)]
    assert (only(effects, Stop), only(effects, Start)) == ([Stop(token, "superseded")], [])


@pytest.mark.parametrize("way", [by_command, by_push, by_sync])
def test_what_runs_is_stopped_and_the_task_is_cancelled_when_it_has_ended(way: Way) -> None:
    core, task, token, sent = claimed()
    started = [*ack(core, 1.5, sent), *core.handle_ready(1.6, token)]
    assert only(started, Start) == [Start(token)]
    assert only(way(core, task, sent), Stop) == [Stop(token, "cancelled")]
    assert (status(row_in(core, task)), reason(row_in(core, task))) == (Status.RUNNING, "cancelling")
    core.handle_ended(9.0, token, outcome(EndKind.FAILED, exit_code=143))
    assert (status(row_in(core, task)), attempts(row_in(core, task))[0].exit_code) == (Status.CANCELLED, 143)
    core.check()


def test_a_task_that_succeeds_before_the_cancel_reaches_it_has_succeeded() -> None:
    core, task, token, sent = claimed()
    ack(core, 1.5, sent)
    core.handle_ready(1.6, token)
    core.handle_ended(1.9, token, outcome())
    assert only(by_push(core, task, sent), Stop) == []
    assert status(row_in(core, task)) is Status.SUCCEEDED


def test_a_cancelled_task_whose_machine_is_gone_is_not_claimed_again() -> None:
    core = ledger()
    core.adopt(0.0, [])
    core.handle_peers(0.0, views(view("a")))
    [task], _ = core.submit(1.0, [spec()], hold=True)
    core.cancel(1.0, task, "bob@b")
    claim = Dot(actor("b"), 1)
    facts: list[tuple[Dot, Claim | Started | Lost]] = [
        (claim, Claim(attempt=1, peer=B, seen={actor("a"): 1})), (Dot(actor("b"), 2), Started(claim=claim)),
        (Dot(actor("c"), 1), Lost(claim=claim, reason="is gone")),
    ]  # fmt: skip
    here = row_in(core, task)
    lost = replace(
        here, facts=tuple(sorted((*here.facts, *facts), key=lambda fact: fact[0])),
        vector=merge_vectors(here.vector, {actor("b"): 2, actor("c"): 1}),
    )  # fmt: skip
    _, effects = core.handle_push(2.0, B, Push(number=1, rows=(lost,), dots=()))
    assert only([*effects, *core.handle_timeout(60.0)], Prepare) == []
    assert status(row_in(core, task)) is Status.CANCELLED


class WatchedMesh(Mesh):
    """Notes every start of a task whose cancel was committed at that peer before."""

    late: ClassVar[list[Fence]] = []

    def note_start(self, at: SimPeer, claimed: Claimed) -> None:
        facts = at.disk.rows[claimed.task].facts
        self.late.extend([claimed.fence] if any(isinstance(fact, Cancel) for _, fact in facts) else [])
        super().note_start(at, claimed)


@pytest.mark.parametrize("seed", range(3))
def test_in_a_mesh_nothing_starts_at_a_peer_after_the_cancel_has_reached_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancels at random moments of the claims, at random peers, over a lossy network."""
    monkeypatch.setattr(WatchedMesh, "late", [])
    mesh = WatchedMesh(seed, 4, slots=2, loss=0.1, reliable=False)
    peers = list(mesh.peers.values())
    mesh.world.run_until(5.0)
    for number in range(30):
        mesh.submit(peers[number % 4], spec(f"t{number}"))
        mesh.world.run_until(mesh.world.now + mesh.rng.uniform(0.0, 0.6))
        if mesh.submitted and mesh.rng.random() < 0.7:
            mesh.cancel(mesh.rng.choice(peers), mesh.rng.choice(mesh.submitted))
    assert mesh.world.run_until_true(mesh.settled, mesh.world.now + 600.0)
    rows = list(peers[0].core.tasks()) if peers[0].core is not None else []
    cancelled = [row for row in rows if any(isinstance(fact, Cancel) for _, fact in row.facts)]
    assert mesh.late == [] and len(cancelled) > 5 and mesh.starts > 5
