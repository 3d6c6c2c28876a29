"""What a submit answers: which peers have a copy of the task, and which live ones have none, and why."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from meshq import codec
from meshq.errors import UsageError
from meshq.gossip.member import Liveness
from meshq.ids import ObjectId, PeerId, TaskId
from meshq.ledger.rendezvous import claimants
from meshq.peers import Peers
from meshq.task import Source, TaskSpec, Telemetry
from meshq.web import submitting
from meshq.web.changes import Changes
from meshq.web.desk import AgentHooks, Desk, MeshFacts
from meshq.web.documents import Document
from meshq.web.submitting import Copies, parse_copies
from tests.gossip.builders import member, peer
from tests.ledger.builders import spec

TASK = TaskId("t" * 26)
COMMIT = ObjectId("c" * 40)
NOBODY: Any = cast(Any, None)
FOR_EVER = 1_000.0
LIMIT = 20.0


class Lab:
    """The parts of an agent around its desk. `acks` come when the row is committed, `later` at the first wait after it."""

    def __init__(self, folder: Path, others: str) -> None:
        self.acks: set[PeerId] = set()
        self.later: list[Callable[[], None]] = []
        self.failures: dict[PeerId, str] = {}
        self.sources: tuple[list[PeerId], dict[PeerId, str]] = ([], {})
        self.now: Callable[[], float] = lambda: FOR_EVER
        self.views_at_submit: list[bool] = []
        self.peers = Peers(member("a"), Telemetry(), 0.0)
        self.changes = Changes()
        for name in others:
            self.peers.handle_member(0.0, member(name))
        lab: Any = self
        self.desk = Desk(
            facts=MeshFacts(version="1", port=1, home=str(folder), pid=1), peers=self.peers, ledger=lab, objects=lab,
            transfers=lab, changes=self.changes, keys=NOBODY, clock=lambda: self.now(),
            hooks=AgentHooks(
                peer_facts=list, doctor=NOBODY, leave=NOBODY, failure=lambda who: self.failures.get(who, ""),
                on_acked=lambda tasks, names: None,
            ),
        )  # fmt: skip

    @property
    def core(self) -> "Lab":
        return self

    def stored_on(self, task: TaskId) -> tuple[PeerId, ...]:
        assert task == TASK
        return tuple(self.acks)

    def complete(self, commit: ObjectId) -> bool:
        return commit == COMMIT

    async def submit(self, specs: Sequence[TaskSpec], hold: bool) -> tuple[TaskId, ...]:
        loop = asyncio.get_running_loop()
        self.views_at_submit = sorted(view.told for view in self.peers.views().values())
        for act in self.later:
            loop.call_later(0, act)
        return (TASK,)

    def voters(self, task: TaskId) -> tuple[str, ...]:
        return ()

    async def push_source(
        self, commit: ObjectId, targets: Sequence[PeerId], enough: int
    ) -> tuple[list[PeerId], dict[PeerId, str]]:
        return self.sources

    def ack(self, *names: str) -> None:
        self.acks.update(map(peer, names))
        self.changes.notify(TASK)

    def submitted(self, task: TaskSpec | None = None, copies: Copies = 1) -> Document:
        work = self.desk.submit(0, [codec.to_plain(task or spec())], hold=True, copies=copies)
        return asyncio.run(asyncio.wait_for(work, LIMIT))


def answer(document: Document) -> tuple[list[str], dict[str, str]]:
    me, *others = document["stored_on"]
    return [me, *sorted(others)], {each["name"]: each["reason"] for each in document["not_stored_on"]}


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is waited for in vain is given up."""
    monkeypatch.setattr(submitting, "ACK_SECONDS", FOR_EVER)
    monkeypatch.setattr(submitting, "MORE_SECONDS", FOR_EVER)
    monkeypatch.setattr(submitting, "OTHERS_SECONDS", FOR_EVER)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "ACK_SECONDS", 0.01)
    monkeypatch.setattr(submitting, "MORE_SECONDS", 0.01)


def test_the_first_copy_does_not_hide_the_others_that_come_at_once(tmp_path: Path, patient: None) -> None:
    lab = Lab(tmp_path, "bc")
    lab.later = [lambda: lab.ack("b"), lambda: lab.ack("c")]
    assert answer(lab.submitted()) == (["a", "b", "c"], {})


def test_who_is_alive_and_confirms_nothing_soon_after_the_first_is_named_with_why(
    tmp_path: Path, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitting, "OTHERS_SECONDS", 0.01)
    lab = Lab(tmp_path, "bcd")
    lab.ack("b")
    lab.failures = {peer("c"): "no answer in time"}
    assert answer(lab.submitted()) == (["a", "b"], {"c": "no answer in time", "d": "no answer yet"})


def test_where_nobody_confirms_all_are_named_and_where_nobody_is_none(tmp_path: Path, hasty: None) -> None:
    assert answer(Lab(tmp_path, "bc").submitted()) == (["a"], {"b": "no answer yet", "c": "no answer yet"})
    assert answer(Lab(tmp_path, "").submitted()) == (["a"], {})


def test_with_enough_copies_nobody_is_waited_for_and_only_who_cannot_be_reached_is_named(tmp_path: Path, patient: None) -> None:
    lab = Lab(tmp_path, "bcdefg")
    lab.ack("b", "c", "d")
    lab.failures = {peer("b"): "of an earlier request", peer("f"): "Connection refused"}
    assert answer(lab.submitted()) == (["a", "b", "c", "d"], {"f": "Connection refused"})


def test_who_died_meanwhile_is_not_named(tmp_path: Path, patient: None) -> None:
    lab = Lab(tmp_path, "bcdef")
    lab.failures = {peer("f"): "no answer in time"}
    lab.later = [
        lambda: lab.peers.handle_member(1.0, member("f", Liveness.DEAD)),
        lambda: lab.ack("b", "c", "d"),
    ]
    assert answer(lab.submitted()) == (["a", "b", "c", "d"], {})


def test_whom_the_source_did_not_reach_is_named_with_why_though_the_task_did(tmp_path: Path, patient: None) -> None:
    lab = Lab(tmp_path, "bcd")
    lab.sources = [peer("b")], {peer("c"): "POST /objects/put: 507 its disk is full"}
    lab.ack("b", "c", "d")
    with_code = spec(source=Source(commit=COMMIT))
    named = {"c": "POST /objects/put: 507 its disk is full", "d": "the code is still on its way"}
    assert answer(lab.submitted(with_code)) == (["a", "b"], named)
    lab.failures = {peer("d"): "no answer in time"}
    assert answer(lab.submitted(with_code)) == (["a", "b"], named | {"d": "no answer in time"})


def test_of_many_only_those_are_named_that_were_chosen_to_have_the_source(tmp_path: Path, patient: None) -> None:
    lab = Lab(tmp_path, "bcdefg")
    chosen = claimants(TaskId(COMMIT), 1, lab.peers.others_alive())[: submitting.COPIES_USUAL]
    lab.sources = [chosen[0]], {}
    lab.acks = set(lab.peers.others_alive())
    stored, named = answer(lab.submitted(spec(source=Source(commit=COMMIT))))
    assert stored == ["a", lab.peers.name(chosen[0])] and set(named) == {lab.peers.name(each) for each in chosen[1:]}


def test_so_many_copies_are_waited_for_as_were_asked_for(
    tmp_path: Path, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitting, "OTHERS_SECONDS", 0.0)
    for copies, wanted in ((2, 2), ("all", 4)):
        lab = Lab(tmp_path, "bcde")
        lab.ack("b")
        lab.later = [partial(lab.ack, name) for name in "cde"]
        document = lab.submitted(copies=cast(Copies, copies))
        assert len(document["stored_on"]) >= 1 + wanted and document["copies"] == wanted


def test_who_asks_for_more_copies_than_there_are_machines_gets_what_there_is_and_is_told(tmp_path: Path, hasty: None) -> None:
    lab = Lab(tmp_path, "bc")
    lab.ack("b", "c")
    document = lab.submitted(copies=7)
    assert (sorted(document["stored_on"]), document["copies"]) == (["a", "b", "c"], 7)


def test_who_has_only_just_come_may_say_first_what_it_has_and_is_not_waited_for_longer(tmp_path: Path, hasty: None) -> None:
    """It may be the only machine that can run the task, or have to vote on it."""
    lab = Lab(tmp_path, "b")
    asked = iter(range(100))

    def clock() -> float:
        if (looks := next(asked)) == 3:
            lab.peers.handle_record(peer("b"), codec.encode(Telemetry()))
        return looks / 10

    lab.now = clock
    lab.submitted()
    assert lab.views_at_submit == [True, True]

    silent = Lab(tmp_path, "b")
    times = iter((0.0, submitting.TOLD_SECONDS / 2, submitting.TOLD_SECONDS, submitting.TOLD_SECONDS + 0.1))
    silent.now = lambda: next(times)
    silent.submitted()
    assert silent.views_at_submit == [False, True]


@pytest.mark.parametrize("wrong", [0, -1, "some", 1.5, True, None, 10**9])
def test_a_number_of_copies_that_is_none_is_refused(wrong: object) -> None:
    with pytest.raises(UsageError, match="--copies"):
        parse_copies(wrong)
    assert (parse_copies("all"), parse_copies(3)) == ("all", 3)
