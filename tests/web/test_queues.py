"""What a person may ask of queues, on a real ledger core: who is told what, and what is refused with nothing changed."""

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeVar, cast

import pytest

from meshq.errors import TaskFailed, UsageError
from meshq.gossip.member import Liveness, Member
from meshq.ids import Epoch, TaskId
from meshq.ledger import holder
from meshq.ledger.core import Ledger
from meshq.ledger.moves import Place
from meshq.ledger.row import Row
from meshq.ledger.settings import created, paused
from meshq.ledger.shell import LedgerShell
from meshq.peers import Peers
from meshq.trust.hardening import user_name
from meshq.web import documents, queues
from meshq.web.queues import QueueSteps
from tests.ledger.builders import ledger, peer, spec, telemetry

T = TypeVar("T")
ME = f"{user_name(0)}@ada"


class Committed:
    """In the place of the ledger's shell: the real core, whose effects count as carried out at once."""

    def __init__(self, core: Ledger) -> None:
        self.core = core
        self.clears: list[int] = []

    async def change_settings(self, values: dict[str, str]) -> None:
        self.core.change_settings(1.0, values)

    async def move(self, task: TaskId, place: Place) -> None:
        self.core.move(1.0, task, place)

    async def clear(self, queue: str, by: str, most: int) -> int:
        self.clears.append(most)
        return self.core.clear(1.0, queue, by, most)[0]


class Lab:
    """Ada, whose machine has no free slot and serves `default`; bob, who serves `gpu` and may be dead."""

    def __init__(self, *, bob: Liveness = Liveness.ALIVE) -> None:
        self.core = ledger("a")
        self.core.adopt(0.0, [])
        told = {"a": telemetry(slots_free=0), "b": telemetry(queues=("gpu",), slots_free=0)}
        self.peers = Peers(_member("a", "ada", Liveness.ALIVE), told["a"], 0.0)
        self.peers.handle_member(0.0, _member("b", "bob", bob))
        self.peers._entries[peer("b")].telemetry = told["b"]
        self.core.handle_peers(0.0, self.peers.views())
        self.ledger = Committed(self.core)
        self.steps = QueueSteps(
            peers=self.peers, ledger=cast(LedgerShell, self.ledger), documents=self._all, resolve=self.resolve,
            shown=lambda row: documents.task_summary(row, self.peers.name, position=self.core.position(row.task), reason=None),
        )  # fmt: skip

    def _all(self) -> list[documents.Document]:
        return documents.queue_documents(self.core.catalog, {"default": 1, "gpu": 1}, time.time(), self.core.settings)

    def resolve(self, reference: str) -> Row:
        found = [row for row in self.core.tasks() if reference in (row.task, row.spec.name)]
        if not found:
            raise UsageError(f"there is no task {reference!r}")
        return found[0]

    def submit(self, *names: str, queue: str = "default") -> None:
        for name in names:
            self.core.submit(1.0, [spec(name, queue=queue)], hold=True)

    def queue(self, name: str) -> documents.Document | None:
        return next((each for each in self.steps.all() if each["name"] == name), None)

    def order(self, queue: str = "default") -> list[str]:
        return [each["name"] for each in self.steps.show(queue)["waiting"]]


def _member(name: str, called: str, liveness: Liveness) -> Member:
    return Member(peer=peer(name), epoch=Epoch(1), incarnation=0, liveness=liveness, name=called, addresses=())


def done(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


@pytest.fixture
def lab() -> Lab:
    return Lab()


def test_a_created_queue_is_listed_and_can_be_deleted_again(lab: Lab) -> None:
    document = done(lab.steps.create(0, "big"))
    assert (document["name"], document["peers"], document["paused"]) == ("big", 0, False)
    assert [each["name"] for each in lab.steps.all()] == ["big", "default", "gpu"]
    with pytest.raises(TaskFailed, match=f"creating the queue 'big': it is there, {ME} created it"):
        done(lab.steps.create(0, "big"))
    assert done(lab.steps.delete("big")) == {"name": "big", "deleted": True}
    assert lab.queue("big") is None
    done(lab.steps.create(0, "big"))
    assert lab.queue("big") is not None


def test_a_queue_with_tasks_or_with_a_machine_is_not_deleted(lab: Lab) -> None:
    lab.submit("one", "two", queue="big")
    before = lab.core.settings
    with pytest.raises(TaskFailed, match="deleting the queue 'big': 2 tasks wait or run in it") as caught:
        done(lab.steps.delete("big"))
    assert "meshq queue clear big" in caught.value.hint
    with pytest.raises(TaskFailed, match="deleting the queue 'gpu': bob would still serve it"):
        done(lab.steps.delete("gpu"))
    assert lab.core.settings == before


def test_a_deleted_queue_hides_its_finished_tasks_until_something_waits_in_it_again(lab: Lab) -> None:
    lab.submit("one", queue="big")
    done(lab.steps.clear(0, "big"))
    assert lab.queue("big") is not None
    done(lab.steps.delete("big"))
    assert lab.queue("big") is None
    lab.submit("two", queue="big")
    found = lab.queue("big")
    assert found is not None and (found["queued"], found["cancelled"]) == (1, 1)


def test_a_pause_is_remembered_with_its_author_and_ends_with_a_resume(lab: Lab) -> None:
    document = done(lab.steps.pause(0, "gpu"))
    assert (document["paused"], document["paused_by"]) == (True, ME)
    seen = lab.core.settings
    done(lab.steps.pause(65534, "gpu"))
    assert lab.core.settings == seen, "the first author stays"
    document = done(lab.steps.resume("gpu"))
    assert (document["paused"], document["paused_by"]) == (False, None)
    resumed = lab.core.settings
    done(lab.steps.resume("gpu"))
    assert lab.core.settings == resumed


def test_a_paused_queue_is_there_even_if_nobody_serves_it(lab: Lab) -> None:
    lab.core.change_settings(1.0, {paused("later"): "zoe@z"})
    found = lab.queue("later")
    assert found is not None and found["paused_by"] == "zoe@z"
    done(lab.steps.resume("later"))
    assert lab.queue("later") is None


@pytest.mark.parametrize("step", ["show", "delete", "pause", "resume", "clear", "to"])
def test_an_unknown_queue_is_named_and_nothing_changes(lab: Lab, step: str) -> None:
    lab.submit("one")
    before, steps = (lab.core.settings, lab.core.vector), lab.steps
    with pytest.raises(UsageError, match="there is no queue 'gup'") as caught:
        match step:
            case "show":
                steps.show("gup")
            case "delete":
                done(steps.delete("gup"))
            case "pause":
                done(steps.pause(0, "gup"))
            case "resume":
                done(steps.resume("gup"))
            case "clear":
                done(steps.clear(0, "gup"))
            case _:
                done(steps.move("one", "to", "gup"))
    assert "meshq queue list" in caught.value.hint
    assert (lab.core.settings, lab.core.vector) == before


def test_a_queue_needs_a_name_that_fits_everywhere(lab: Lab) -> None:
    with pytest.raises(UsageError, match="creating a queue: 'a/b' is no name"):
        done(lab.steps.create(0, "a/b"))
    assert lab.core.settings.value(created("a/b")) == ""


def test_clear_cancels_all_that_waits_in_several_commits(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "CLEARED_AT_ONCE", 2)
    lab.submit("one", "two", "three")
    lab.submit("other", queue="gpu")
    assert done(lab.steps.clear(0, "default")) == {"name": "default", "cancelled": 3}
    assert lab.ledger.clears == [2, 1]
    found, other = lab.queue("default"), lab.queue("gpu")
    assert found is not None and (found["queued"], found["cancelled"]) == (0, 3)
    assert other is not None and other["queued"] == 1
    assert holder.reason(lab.resolve("one")) == f"cancelled by {ME}"
    assert done(lab.steps.clear(0, "default")) == {"name": "default", "cancelled": 0}


def test_show_lists_what_is_next_and_who_serves_the_queue(lab: Lab) -> None:
    lab.submit("one", "two")
    shown = lab.steps.show("default")
    assert [(each["name"], each["position"]) for each in shown["waiting"]] == [("one", 1), ("two", 2)]
    assert shown["served_by"] == ["ada"]
    assert Lab(bob=Liveness.DEAD).steps.show("gpu")["served_by"] == []


@pytest.mark.parametrize(
    ("where", "target", "expected"),
    [
        ("first", "", ["three", "one", "two"]), ("up", "", ["one", "three", "two"]), ("before", "two", ["one", "three", "two"]),
        ("down", "", ["one", "two", "three"]), ("last", "", ["one", "two", "three"]), ("to", "gpu", ["one", "two"]),
    ],
)  # fmt: skip
def test_a_move_changes_the_order_and_says_the_new_position(lab: Lab, where: str, target: str, expected: list[str]) -> None:
    lab.submit("one", "two", "three")
    document = done(lab.steps.move("three", where, target))
    assert lab.order() == expected
    assert document["position"] == (expected.index("three") + 1 if "three" in expected else 1)
    assert document["queue"] == ("gpu" if where == "to" else "default")


def test_a_move_that_makes_no_sense_is_refused(lab: Lab) -> None:
    lab.submit("one", "two")
    with pytest.raises(UsageError, match="a move to 'sideways': there is no such place"):
        done(lab.steps.move("one", "sideways", ""))
    with pytest.raises(UsageError, match="there is no task 'three'"):
        done(lab.steps.move("one", "before", "three"))
    lab.core.cancel(1.0, lab.resolve("two").task, "ann@a")
    with pytest.raises(TaskFailed, match="it does not wait any more, it is cancelled"):
        done(lab.steps.move("two", "first", ""))
    assert lab.order() == ["one"]


def test_names_of_authors_are_cut_to_what_a_setting_may_hold(lab: Lab) -> None:
    entry = lab.peers._entries[lab.peers.me]
    entry.member = replace(entry.member, name="n" * 400)
    done(lab.steps.pause(0, "gpu"))
    found = lab.queue("gpu")
    assert found is not None and 200 < len(str(found["paused_by"])) <= 256
