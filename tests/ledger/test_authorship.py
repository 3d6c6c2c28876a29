"""Disks that were set back, copied or have lost their end: nobody ever writes an (actor, seq) a second time."""

from functools import partial
from random import Random

import pytest

from meshq.ids import ActorId, Dot, actor_ledger_epoch, fence
from meshq.ledger.authorship import PATIENCE
from meshq.ledger.core import Ledger
from meshq.ledger.effects import Effect, EpochMinted, Persist, Prepare, Push, SendSync, SyncOffer, SyncOpen
from meshq.ledger.row import Back, Claim, Fact, Row, Started
from meshq.task import TaskSpec
from tests.ledger.builders import actor, busy, dot, ledger, peer, row, spec, telemetry, view, views
from tests.ledger.mesh import Mesh, SimPeer

A, B, C = peer("a"), peer("b"), peer("c")
MINE = row(birth=dot("a", 5))


def core_with(*names: str, rng: int = 1) -> tuple[Ledger, list[Effect]]:
    """A core of peer a that has written five times before this start and sees these others; what it asks them."""
    core = ledger("a", [MINE], confirmed=False, rng=Random(rng))
    core.adopt(0.0, [])
    return core, core.handle_peers(0.0, views(view("a"), *(view(name) for name in names)))


def epochs(effects: list[Effect]) -> list[int]:
    return [effect.ledger_epoch for effect in effects if isinstance(effect, EpochMinted)]


def submit(core: Ledger, now: float) -> tuple[ActorId, list[int]]:
    """Who wrote it, and which epochs that took."""
    (task,), effects = core.submit(now, [spec()], hold=True)
    written = core.row(task)
    assert written is not None
    return written.birth.actor, epochs(effects)


def answer(core: Ledger, asked: list[Effect], now: float, **more: dict[ActorId, int]) -> list[Effect]:
    """Everybody who was asked says that; without more, that it knows nothing more."""
    effects = []
    for each in asked:
        if isinstance(each, SendSync) and isinstance(each.question, SyncOpen):
            offer = SyncOffer(number=each.question.number, run=1, **more)  # type: ignore[arg-type]  # vectors by name
            effects += core.handle_sync_answer(now, each.peer, offer)
    return effects


def test_after_an_answer_the_actor_of_the_database_goes_on() -> None:
    core, asked = core_with("b", "c")
    assert epochs(answer(core, asked, 0.1)) == []
    assert submit(core, 0.2) == (actor("a"), [])


def test_a_write_before_any_answer_takes_a_new_actor_and_the_next_ones_stay_with_it() -> None:
    core, asked = core_with("b")
    author, minted = submit(core, 0.1)
    assert minted == [actor_ledger_epoch(author)] and minted[0] > 1
    answer(core, asked, 0.2, vector={actor("a"): 90})
    assert submit(core, 0.3) == (author, []), "what the old actor wrote once does not matter any more"


def test_of_two_copies_of_one_home_each_takes_another_actor() -> None:
    taken = {submit(core_with("b", rng=number)[0], 0.1)[0] for number in range(3)}
    assert len(taken) == 3


def test_who_knows_nobody_asks_nobody_and_who_is_left_alone_by_all_takes_a_new_actor() -> None:
    core = ledger("a", [MINE], confirmed=False)
    core.adopt(0.0, [])
    core.handle_peers(0.0, views(view("a")))
    assert submit(core, 0.1) == (actor("a"), [])
    core = ledger("a", [MINE], confirmed=False)
    core.adopt(0.0, [])
    core.handle_peers(0.0, views(view("a"), view("b", alive=False)))
    assert len(submit(core, 0.1)[1]) == 1
    core = ledger("a", [MINE], confirmed=False)
    core.adopt(0.0, [])
    core.handle_peers(0.0, views(view("a"), view("b", alive=False, left=True)))
    assert submit(core, 0.1) == (actor("a"), [])


def test_who_knows_a_later_write_by_its_vector_or_only_by_a_row_gives_the_disk_away() -> None:
    for told in ("vector", "yours"):
        core, asked = core_with("b")
        minted = epochs(answer(core, asked, 0.1, **{told: {actor("a"): 6}}))
        assert len(minted) == 1
        assert submit(core, 0.2)[0] == core.row(core.submit(0.3, [spec()], hold=True)[0][0]).birth.actor  # type: ignore[union-attr]
        assert core.ledger_epoch == minted[0]


def test_a_donor_says_what_it_has_of_the_asker_beyond_its_vector() -> None:
    core = ledger("b")
    core.adopt(0.0, [])
    core.handle_peers(0.0, views(view("a"), view("b")))
    later = row(birth=dot("a", 7))
    core.handle_push(0.1, A, Push(number=1, rows=(later,), dots=(later.birth,)))
    [asked] = [each for each in ledger_asks() if isinstance(each, SendSync)]
    offer = core.handle_sync_request(0.2, A, asked.question)
    assert isinstance(offer, SyncOffer)
    assert offer.yours == {actor("a"): 7}, "its vector can't say so: 1 to 6 are missing"
    other = core.handle_sync_request(0.3, C, asked.question)
    assert isinstance(other, SyncOffer) and other.yours == {}


def ledger_asks() -> list[Effect]:
    core = ledger("a", confirmed=False)
    core.adopt(0.0, [])
    return core.handle_peers(0.0, views(view("a"), view("b")))


def test_claims_wait_for_all_who_were_asked_but_not_for_ever() -> None:
    for late in (True, False):
        core = ledger("a", confirmed=False)
        core.adopt(0.0, [])
        core.submit(0.0, [spec()], hold=True)  # while it knows nobody
        asked = core.handle_peers(0.1, views(view("a"), view("b", busy(telemetry())), view("c", busy(telemetry()))))
        prompt, tardy = asked_of(asked, B), asked_of(asked, C)
        effects = answer(core, prompt, 0.2)
        assert not [each for each in effects if isinstance(each, Prepare)]
        if late:
            assert core.deadline() <= 0.1 + PATIENCE
            effects = core.handle_timeout(0.1 + PATIENCE)
        else:
            effects = answer(core, tardy, 0.3)
        assert [each for each in effects if isinstance(each, Prepare)]
        assert core.ledger_epoch == 1


def asked_of(effects: list[Effect], other: str) -> list[Effect]:
    return [each for each in effects if isinstance(each, SendSync) and each.peer == other]


def test_who_takes_a_new_actor_speaks_again_for_what_it_runs() -> None:
    """Else the others would take its claims for lost with the old one, and start them a second time."""
    claim, started = dot("a", 6), dot("a", 7)
    running = row((claim, Claim(attempt=1, peer=A, seen={actor("a"): 5})), (started, Started(claim=claim)), birth=dot("a", 5))
    core = ledger("a", [running], confirmed=False)
    core.handle_peers(0.0, views(view("a"), view("b", alive=False)))
    core.adopt(0.0, [fence(1, claim)])
    (_, effects) = core.submit(0.1, [spec()], hold=True)
    assert len(epochs(effects)) == 1
    now = core.row(running.task)
    assert now is not None
    backs = [(at, fact) for at, fact in now.facts if isinstance(fact, Back)]
    assert [(at.actor, fact.claim) for at, fact in backs] == [(core_actor(core), claim)]
    [persist] = [each for each in effects if isinstance(each, Persist)]
    assert now in persist.rows


def core_actor(core: Ledger) -> ActorId:
    return ActorId(f"{A[:26]}.{core.ledger_epoch}")


# ---- whole meshes, whose disks are set back


class Written:
    """Every write that was ever seen, by its name."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._facts: dict[Dot, TaskSpec | Fact] = {}
        self._look()

    def _look(self) -> None:
        for one in self._mesh.peers.values():
            for each in one.core.tasks() if one.core is not None else ():
                self._note(each)
        self._mesh.world.call_later(0.5, self._look)

    def _note(self, each: Row) -> None:
        for at, what in ((each.birth, each.spec), *each.facts):
            assert self._facts.setdefault(at, what) == what, f"{at} names two writes"


def set_back(mesh: Mesh, one: SimPeer) -> None:
    """The whole home is as it was some time ago: the database and the counter beside it."""
    copy = one.disk.copy()

    def restore() -> None:
        one.crash(power=True)
        one.disk, one.safe_disk = copy.copy(), copy.copy()
        one.processes, one.unreported = {}, {}
        mesh.world.call_later(mesh.rng.uniform(0.1, 3.0), one.start)

    mesh.world.call_later(mesh.rng.uniform(1.0, 15.0), restore)


@pytest.mark.parametrize("seed", range(8))
def test_homes_that_are_set_back_as_a_whole_never_write_the_same_twice_and_everything_converges(seed: int) -> None:
    mesh = Mesh(seed, 3, slots=1, loss=0.05 * (seed % 3), reliable=seed % 2 == 0)
    rng = Random(seed)
    Written(mesh)
    peers = list(mesh.peers.values())
    for number in range(24):
        mesh.world.call_later(rng.uniform(0, 40), mesh.submit, rng.choice(peers), spec(f"task-{number}"))
    for number in range(3):
        mesh.world.call_later(4.0 + 12.0 * number, set_back, mesh, peers[number])
    mesh.world.run_until(50.0)
    assert mesh.world.run_until_true(mesh.settled, 900.0)
    cores = [one.core for one in peers if one.core is not None]
    assert sum(core.counters["ledger_epochs_minted"] for core in cores) > 0, "no disk was really older"
    assert not any(core.counters["bug_rows_contradict"] for core in cores)


def test_restarts_of_a_mesh_in_good_order_take_no_new_actors() -> None:
    mesh = Mesh(3, 4, slots=2)
    peers = list(mesh.peers.values())
    for number in range(12):
        one = peers[number % 4]
        mesh.world.call_later(2.0 + number * 5.0, partial(one.crash, power=False))
        mesh.world.call_later(2.5 + number * 5.0, one.start)
        mesh.world.call_later(1.0 + number * 5.0, mesh.submit, peers[(number + 2) % 4], spec())
    mesh.world.run_until(70.0)
    assert mesh.world.run_until_true(mesh.settled, 300.0)
    assert [one.core.ledger_epoch for one in peers if one.core is not None] == [1, 1, 1, 1]
