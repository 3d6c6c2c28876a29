"""Moves in a queue: what each does, with few writes, and that concurrent ones leave one order with every task in it."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshq.errors import TaskFailed, UsageError
from meshq.ids import Dot, TaskId
from meshq.ledger import moves as module
from meshq.ledger.core import Ledger
from meshq.ledger.effects import Persist, Prepare, Push, RowChanged, SendPush
from meshq.ledger.moves import POSITION_STEP, Before, Down, First, Last, Place, To, Up
from meshq.ledger.queues import Queues
from meshq.ledger.row import REGISTER_MAX, NumberRegister, Row, Seat, TextRegister, merge, moved
from meshq.ledger.settings import paused
from meshq.task import Needs
from tests.ledger.builders import actor, dot, ledger, peer, row, spec, telemetry, view, views
from tests.ledger.mesh import Mesh, SimPeer
from tests.ledger.test_core import alone, among, only, row_in
from tests.ledger.test_replica import replica

A, B, C = peer("a"), peer("b"), peer("c")


def idle(name: str = "a") -> Ledger:
    """A core that runs nothing, so that what is submitted waits."""
    core = ledger(name)
    core.adopt(0.0, [])
    core.handle_peers(0.0, views(view(name, telemetry(slots_free=0))))
    return core


def queued(core: Ledger, *priorities: int, queue: str = "default") -> list[TaskId]:
    tasks = []
    for number, priority in enumerate(priorities):
        needs = Needs(cpus=number % 3)  # several buckets
        [task], _ = core.submit(1.0, [spec(f"t{number}", priority=priority, needs=needs, queue=queue)], hold=True)
        tasks.append(task)
    return tasks


def names(core: Ledger, queue: str = "default") -> str:
    return " ".join(row_in(core, task).spec.name for task in core.waiting_in(queue))


def move(core: Ledger, task: TaskId, place: Place) -> int:
    """How many rows that took."""
    return sum(len(persist.rows) for persist in only(core.move(2.0, task, place), Persist))


def among_them(place: Place | int, tasks: Sequence[TaskId]) -> Place:
    """A number stands for the place before the task of that number."""
    return Before(tasks[place]) if isinstance(place, int) else place


@pytest.mark.parametrize(
    ("which", "place", "expected"),
    [
        (2, First(), "t2 t0 t1 t3"),
        (1, Last(), "t0 t2 t3 t1"),
        (2, Up(), "t0 t2 t1 t3"),
        (1, Down(), "t0 t2 t1 t3"),
        (3, 0, "t3 t0 t1 t2"),
        (0, 3, "t1 t2 t0 t3"),
        (3, 2, "t0 t1 t3 t2"),
    ],
)
def test_a_move_writes_one_row_and_does_what_it_says(which: int, place: Place | int, expected: str) -> None:
    core = idle()
    tasks = queued(core, 0, 0, 0, 0)
    assert (move(core, tasks[which], among_them(place, tasks)), names(core)) == (1, expected)
    core.check()


@pytest.mark.parametrize(("which", "place"), [(0, First()), (3, Last()), (0, Up()), (3, Down()), (1, 2), (1, 1)])
def test_what_is_there_already_needs_no_write(which: int, place: Place | int) -> None:
    core = idle()
    tasks = queued(core, 0, 0, 0, 0)
    assert core.move(2.0, tasks[which], among_them(place, tasks)) == []
    assert names(core) == "t0 t1 t2 t3"


@pytest.mark.parametrize(
    ("which", "place", "expected", "priority"),
    [
        (3, First(), "t3 t0 t1 t2", 9),
        (3, Up(), "t0 t1 t3 t2", 5),
        (3, 1, "t0 t3 t1 t2", 5),
        (0, Down(), "t1 t0 t2 t3", 5),
        (0, Last(), "t1 t2 t3 t0", 0),
        (2, First(), "t2 t0 t1 t3", 9),
        (1, Down(), "t0 t2 t1 t3", 5),
    ],
)
def test_a_move_takes_the_priority_that_its_place_needs(which: int, place: Place | int, expected: str, priority: int) -> None:
    core = idle()
    tasks = queued(core, 9, 5, 5, 0)
    assert (move(core, tasks[which], among_them(place, tasks)), names(core)) == (1, expected)
    assert row_in(core, tasks[which]).priority.value == priority


def test_a_move_to_another_queue_goes_behind_all_that_wait_there_and_keeps_its_priority() -> None:
    core = idle()
    first, second = queued(core, 0, 3)
    queued(core, 3, 0, queue="gpu")
    assert (move(core, second, To("gpu")), names(core), names(core, "gpu")) == (1, "t0", "t0 t1 t1")
    assert [row_in(core, each).spec.priority for each in core.waiting_in("gpu")] == [3, 3, 0]
    with pytest.raises(TaskFailed, match="is in the queue gpu already"):
        core.move(3.0, second, To("gpu"))
    assert (core.position(first), core.position(second)) == (1, 2)


def test_a_move_is_one_write_of_three_registers_that_is_committed_and_pushed() -> None:
    core = among(views(view("a", telemetry(slots_free=0)), view("b", telemetry(queues=()))))
    first, second = queued(core, 7, 0)
    effects = core.move(2.0, second, First())
    here = row_in(core, second)
    at = Dot(actor("a"), 3)
    assert here.queue == TextRegister(2, actor("a"), "default")
    assert here.position == NumberRegister(2, actor("a"), row_in(core, first).position.value - POSITION_STEP)
    assert here.priority == NumberRegister(2, actor("a"), 7)
    assert here.vector == {actor("a"): 3}
    [sent] = only(effects, SendPush)
    assert effects == [
        Persist((here,), {actor("a"): 3}, {}, True), SendPush(B, Push(number=sent.push.number, rows=(here,), dots=(at,))),
        RowChanged(second),
    ]  # fmt: skip


def test_what_does_not_wait_cannot_be_moved_nor_moved_before() -> None:
    core = alone()
    [running], _ = core.submit(1.0, [spec("busy")], hold=False)
    [waiting], _ = core.submit(1.0, [spec()], hold=False)
    with pytest.raises(TaskFailed, match=r"moving 'busy' .*: it does not wait any more, it is claimed"):
        core.move(2.0, running, First())
    with pytest.raises(TaskFailed, match=r"moving something before 'busy'"):
        core.move(2.0, waiting, Before(running))
    core.cancel(2.0, waiting, "ann@a")
    with pytest.raises(TaskFailed, match="it is cancelled"):
        core.move(2.0, waiting, First())
    with pytest.raises(UsageError, match="there is no such task"):
        core.move(2.0, TaskId("a" * 16), First())
    core.check()


def test_a_task_of_another_queue_is_no_place() -> None:
    core = idle()
    [here], [there] = queued(core, 0), queued(core, 0, queue="gpu")
    with pytest.raises(TaskFailed, match="they wait in different queues") as caught:
        core.move(2.0, here, Before(there))
    assert caught.value.hint == "move it --to gpu first"
    assert (names(core), names(core, "gpu")) == ("t0", "t0")


def test_a_task_that_was_moved_is_claimed_in_its_new_place() -> None:
    core = among(views(view("a"), view("b", telemetry(queues=()))))
    core.change_settings(1.0, {paused("default"): "ann@a"})
    first, second = queued(core, 0, 0)
    move(core, second, First())
    effects = core.change_settings(3.0, {paused("default"): ""})
    assert [each.task for each in only(effects, Persist)[0].rows] == [second]
    assert core.position(first) == 1


def test_after_a_move_to_another_queue_the_contenders_bid_in_their_ranks_and_not_all_at_once() -> None:
    seen = views(*(view(name, telemetry(queues=("gpu",))) for name in "abc"))
    cores = {name: among(seen, name=name) for name in "abc"}
    [task], effects = cores["a"].submit(1.0, [spec()], hold=True)
    [born, _] = only(effects, SendPush)
    for name in "bc":
        cores[name].handle_push(1.1, A, born.push)
    effects = cores["a"].move(3600.0, task, To("gpu"))
    [news, _] = only(effects, SendPush)
    bids = [
        len(only(effects, Prepare)),
        *(len(only(cores[name].handle_push(3600.0, A, news.push)[1], Prepare)) for name in "bc"),
    ]
    assert sum(bids) == 1


# ---- room between neighbours


def test_a_hundred_moves_into_the_same_gap_renumber_few_and_rarely() -> None:
    core = idle()
    tasks = queued(core, *[0] * 102)
    writes = [move(core, each, Before(tasks[101])) for each in tasks[1:101]]
    assert names(core) == " ".join(f"t{number}" for number in range(102))
    again = [move(core, each, Before(tasks[1])) for each in tasks[2:101]]
    assert names(core).split() == ["t0", *(f"t{number}" for number in range(2, 101)), "t1", "t101"]
    assert max(writes + again) == 2 and sum(writes + again) < 220


def running_order(one: Row) -> tuple[int, int, Dot]:
    return (-one.priority.value, one.position.value, one.birth)


def rows_at(*positions: int, priority: int = 0) -> list[Row]:
    """Waiting rows with these positions, in running order."""
    found = []
    for seq, position in enumerate(positions, 1):
        one = row(birth=dot("b", seq), name=f"t{seq - 1}", priority=priority)
        found.append(replace(one, position=replace(one.position, value=position)))
    return sorted(found, key=running_order)


def seats(rows: Sequence[Row], which: int, place: Place) -> dict[TaskId, Seat]:
    queues = Queues()
    for each in rows:
        queues.put(each.task, each)
    by_task = {each.task: each for each in rows}
    return module.new_seats(rows[which], place, queues, by_task.__getitem__, lambda queue: 0)


def after(rows: Sequence[Row], changes: dict[TaskId, Seat]) -> list[Row]:
    seq = 100
    found = []
    for each in rows:
        seq += 1
        found.append(moved(each, dot("a", seq), changes[each.task]) if each.task in changes else each)
    return sorted(found, key=running_order)


Case = tuple[list[Row], int, Place]


@st.composite
def crowded(draw: st.DrawFn) -> Case:
    """Rows that stand close together, or at the end of what a position may be, and one move."""
    positions = st.one_of(st.integers(0, 6), st.sampled_from([-REGISTER_MAX, REGISTER_MAX, REGISTER_MAX - 1]))
    rows = rows_at(*draw(st.lists(positions, min_size=2, max_size=12)))
    which, other = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, len(rows) - 1))
    places: list[Place] = [First(), Last(), Up(), Down(), Before(rows[other].task)]
    return rows, which, draw(st.sampled_from(places))


@settings(max_examples=400)
@given(crowded())
def test_wherever_rows_stand_a_move_leads_where_it_should_and_keeps_the_others_in_order(
    case: tuple[list[Row], int, Place],
) -> None:
    rows, which, place = case
    task = rows[which].task
    before = [each.task for each in rows]
    changes = seats(rows, which, place)
    found = after(rows, changes)
    expected = [each for each in before if each != task]
    match place:
        case First():
            expected.insert(0, task)
        case Last():
            expected.append(task)
        case Up():
            expected.insert(max(0, which - 1), task)
        case Down():
            expected.insert(which + 1, task)
        case Before(other):
            expected = before if other == task else expected
            if other != task:
                expected.insert(expected.index(other), task)
        case To():
            raise AssertionError("not among the cases")
    assert [each.task for each in found] == expected
    assert all(abs(each.position.value) <= REGISTER_MAX for each in found)


@settings(max_examples=200)
@given(crowded())
def test_no_fewer_rows_could_be_renumbered(case: Case) -> None:
    """With one row less around the gap there is, on every choice of them, no room."""
    rows, which, place = case
    changes = seats(rows, which, place)
    if len(changes) < 2:
        return
    found = [each.task for each in after(rows, changes)]
    at, by_task = found.index(rows[which].task), {each.task: each.position.value for each in rows}
    positions = [by_task[each] for each in found if each != rows[which].task]
    fewer = len(changes) - 2
    for first in range(max(0, at - fewer), min(at, len(positions) - fewer) + 1):
        low = positions[first - 1] if first else -REGISTER_MAX - 1
        high = positions[first + fewer] if first + fewer < len(positions) else REGISTER_MAX + 1
        assert high - low <= fewer + 1


def test_without_room_among_very_many_the_move_is_refused_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENUMBERED_MAX", 2)
    rows = rows_at(*[5] * 12)
    with pytest.raises(TaskFailed, match="more than 2 tasks stand at the same position") as caught:
        seats(rows, 0, Before(rows[6].task))
    assert caught.value.hint == "move it --first or --last"
    assert len(seats(rows, 5, First())) == 1


def test_a_row_at_the_end_of_all_positions_does_not_make_later_submits_unacceptable() -> None:
    core = idle()
    [far] = rows_at(REGISTER_MAX)
    core.handle_push(1.0, B, Push(number=1, rows=(far,), dots=(far.birth,)))
    [task] = queued(core, 0)
    assert row_in(core, task).position.value <= REGISTER_MAX
    assert replica("c").absorb(row_in(core, task)) == task


# ---- concurrent moves


seat = st.builds(Seat, queue=st.sampled_from(["default", "gpu"]), position=st.integers(-9, 9), priority=st.integers(0, 3))


@given(st.lists(st.tuples(st.sampled_from("abc"), seat), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_of_concurrent_moves_of_one_task_one_wins_as_a_whole(history: list[tuple[str, Seat]], rng: Random) -> None:
    born = row()
    versions, given_seats = [born], [Seat(queue="default", position=1, priority=0)]
    known = dict.fromkeys("abc", born)
    for seq, (name, where) in enumerate(history, 2):
        if rng.random() < 0.4:
            known[name] = merge(known[name], rng.choice(versions))
        known[name] = moved(known[name], dot(name, seq), where)
        versions.append(known[name])
        given_seats.append(where)
    joined = born
    for each in rng.sample(versions, len(versions)):
        joined = merge(joined, each)
    for each in rng.sample(versions, len(versions)):
        assert merge(each, joined) == joined
    assert Seat(queue=joined.queue.value, position=joined.position.value, priority=joined.priority.value) in given_seats
    assert (joined.queue.revision, joined.queue.actor) == (joined.position.revision, joined.position.actor)
    assert (joined.queue.revision, joined.queue.actor) == (joined.priority.revision, joined.priority.actor)


def random_place(rng: Random, tasks: Sequence[TaskId]) -> Place:
    places: list[Place] = [First(), Last(), Up(), Down(), Before(rng.choice(tasks)), To(rng.choice(["default", "gpu"]))]
    return rng.choice(places)


def try_to_move(core: Ledger, now: float, task: TaskId, place: Place) -> list[Row]:
    """The rows that this changed; none if the task was to be moved before one that waits in another queue by now."""
    try:
        effects = core.move(now, task, place)
    except TaskFailed:
        return []
    return [each for persist in only(effects, Persist) for each in persist.rows]


@pytest.mark.parametrize("seed", range(30))
def test_concurrent_moves_converge_and_lose_no_task(seed: int) -> None:
    """Three cores move the same few tasks about, hearing of each other late, out of order, twice, or only by a last sync."""
    rng = Random(seed)
    cores = {name: idle(name) for name in "abc"}
    for core in cores.values():
        queued(core, 0, 0, rng.randint(0, 2))
    rows = [each for core in cores.values() for each in core.tasks()]
    tasks = [each.task for each in rows]
    for core in cores.values():
        hear(core, rows)
    news: list[Row] = []
    for step in range(60):
        core = cores[rng.choice("abc")]
        if rng.random() < 0.6:
            news += try_to_move(core, 2.0 + step, rng.choice(tasks), random_place(rng, tasks))
        elif news:
            hear(core, [rng.choice(news)])
        core.check()
        assert {*core.waiting_in("default"), *core.waiting_in("gpu")} == set(tasks)
    assert len(news) > 10, "hardly anything was moved"
    for core in cores.values():
        for other in cores.values():
            hear(core, list(other.tasks()))
    for core in cores.values():
        core.check()
        orders = [list(core.waiting_in(queue)) for queue in ("default", "gpu")]
        assert orders == [list(cores["a"].waiting_in(queue)) for queue in ("default", "gpu")]
        assert sorted(orders[0] + orders[1]) == sorted(tasks)


def hear(core: Ledger, rows: Sequence[Row]) -> None:
    core.handle_push(5.0, C, Push(number=1, rows=tuple(rows), dots=()))


def test_concurrent_moves_of_neighbours_both_count() -> None:
    cores = {name: idle(name) for name in "ab"}
    tasks = queued(cores["a"], 0, 0, 0, 0)
    share(cores["a"], cores["b"])
    move(cores["a"], tasks[2], First())
    move(cores["b"], tasks[1], Last())
    share(cores["a"], cores["b"])
    share(cores["b"], cores["a"])
    assert names(cores["a"]) == names(cores["b"]) == "t2 t0 t3 t1"


def share(source: Ledger, target: Ledger) -> None:
    hear(target, list(source.tasks()))


def test_a_move_that_meets_a_start_is_harmless() -> None:
    worker, mover = alone(), idle("b")
    [task], _ = worker.submit(1.0, [spec()], hold=False)
    bare = replace(row_in(worker, task), facts=(), vector={actor("a"): 1})
    mover.handle_push(1.0, A, Push(number=1, rows=(bare,), dots=()))
    move(mover, task, To("gpu"))
    share(mover, worker)
    share(worker, mover)
    assert row_in(worker, task) == row_in(mover, task)
    assert (names(mover, "gpu"), row_in(worker, task).queue.value) == ("", "gpu")
    worker.check()
    mover.check()


@pytest.mark.parametrize("seed", range(3))
def test_in_a_lossy_mesh_that_was_cut_in_two_all_see_one_order_and_every_task_runs(seed: int) -> None:
    mesh = Mesh(seed, 4, slots=1, loss=0.2, reliable=False)
    peers = list(mesh.peers.values())
    mesh.world.run_until(5.0)
    feed_settings(mesh, peers[0], "ann@a")
    mesh.world.run_until(25.0)
    for number in range(12):
        mesh.submit(peers[number % 4], spec(f"t{number}"))
    mesh.world.run_until(50.0)
    tasks = list(core_of(peers[0]).waiting_in("default"))
    assert len(tasks) == 12, "nothing of a paused queue runs"
    mesh.network.partition([["a", "b"], ["c", "d"]])
    places: list[Place] = [First(), Last(), Up(), Down()]
    for number in range(40):
        at = peers[number % 4]
        at.feed(core_of(at).move(mesh.world.now, mesh.rng.choice(tasks), mesh.rng.choice(places)))
        mesh.world.run_until(mesh.world.now + 0.1)
    assert list(core_of(peers[0]).waiting_in("default")) != list(core_of(peers[3]).waiting_in("default"))
    mesh.network.heal()

    def orders() -> list[list[TaskId]]:
        return [list(core_of(each).waiting_in("default")) for each in peers]

    assert mesh.world.run_until_true(lambda: all(order == orders()[0] for order in orders()), mesh.world.now + 600.0)
    assert sorted(orders()[0]) == sorted(tasks)
    feed_settings(mesh, peers[3], "")
    assert mesh.world.run_until_true(mesh.settled, mesh.world.now + 600.0)
    assert mesh.starts == 12


def core_of(one: SimPeer) -> Ledger:
    assert one.core is not None
    return one.core


def feed_settings(mesh: Mesh, at: SimPeer, by: str) -> None:
    at.feed(core_of(at).change_settings(mesh.world.now, {paused("default"): by}))
