"""The checker of histories can fail: a good history, and one way to break it for everything that it claims to prove."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.history import Event, Fault, Final, History, Ledger, Overlap, Run, check, overlaps

PEERS = ("ada", "bob")
ONE, OTHER, STOPPED = "1.a.1", "2.b.7", "1.b.9"


def event(at: float, peer: str, name: str, **facts: object) -> Event:
    return Event(at=at, peer=peer, event=name, facts=facts)


def run(fence: str, peer: str, begins: float, last: float, *, task: str = "t", ended: bool = True) -> Run:
    return Run(fence=fence, task=task, peer=peer, begins=(begins,), last=last, ended=ended)


def ledgers(tasks: dict[str, Final]) -> dict[str, Ledger]:
    return {peer: Ledger(tasks=tasks, digest="same") for peer in PEERS}


def good() -> History:
    """Task t ran at ada, which was cut off from bob for 30 s; so it ran at bob too, and ada's success is the result.

    Task s ran under `stop`.
    """
    final = Final(status="succeeded", result=ONE, claims={ONE: "ada", OTHER: "bob"})
    stopped = Final(status="succeeded", result=STOPPED, isolation="stop", claims={STOPPED: "bob"})
    return History(
        events=(
            event(1, "ada", "acked", tasks=["t"], stored_on=["ada", "bob"]),
            event(2, "ada", "claimed", task="t", fence=ONE),
            event(3, "ada", "started", fence=ONE),
            event(20, "bob", "claimed", task="t", fence=OTHER),
            event(21, "bob", "started", fence=OTHER),
            event(38, "bob", "stopping", fence=OTHER, reason="superseded"),
            event(39, "bob", "exited", fence=OTHER, kind="superseded", exit_code=None),
            event(39, "bob", "ended", fence=OTHER),
            event(50, "ada", "exited", fence=ONE, kind="succeeded", exit_code=0),
            event(50, "ada", "ended", fence=ONE),
            event(51, "ada", "result", task="t", status="succeeded", fence=ONE),
            event(51, "bob", "result", task="t", status="succeeded", fence=ONE),
            event(52, "bob", "claimed", task="s", fence=STOPPED),
            event(53, "bob", "started", fence=STOPPED),
            event(58, "bob", "exited", fence=STOPPED, kind="succeeded", exit_code=0),
            event(58, "bob", "ended", fence=STOPPED),
        ),
        runs=(
            run(ONE, "ada", 3.1, 49.9), run(OTHER, "bob", 21.1, 38.9, ended=False), run(STOPPED, "bob", 53.1, 57.9, task="s"),
        ),
        faults=(Fault(kind="cut", one=frozenset({"ada"}), other=frozenset({"bob"}), since=5, until=37, equal_after=4.0),),
        acked=("t", "s"),
        ledgers=ledgers({"t": final, "s": stopped}),
    )  # fmt: skip


def without_task(history: History) -> History:
    poorer = Ledger(tasks={"s": history.final["s"]}, digest="same")
    return replace(history, ledgers={"ada": history.ledgers["ada"], "bob": poorer})


def with_tasks(history: History, **tasks: Final) -> History:
    return replace(history, ledgers=ledgers({**history.final, **tasks}))


def with_run(history: History, fence: str, changed: Callable[[Run], Run]) -> History:
    return replace(history, runs=tuple(changed(each) if each.fence == fence else each for each in history.runs))


def without_event(history: History, name: str, fence: str) -> History:
    kept = tuple(each for each in history.events if (each.event, each.fence) != (name, fence))
    assert len(kept) == len(history.events) - 1
    return replace(history, events=kept)


def with_events(history: History, *more: Event) -> History:
    return replace(history, events=(*history.events, *more))


def with_fault(history: History, **changes: object) -> History:
    return replace(history, faults=tuple(replace(each, **changes) for each in history.faults))  # type: ignore[arg-type]  # by name


def one_ledger(history: History, ledger: Ledger) -> History:
    return replace(history, ledgers={**history.ledgers, "bob": ledger})


def both_go_on(history: History) -> History:
    longer = with_run(history, OTHER, lambda run: replace(run, last=80.0))
    return with_run(longer, ONE, lambda run: replace(run, last=80.0))


def with_agent_away(history: History, name: str, since: float = 5) -> History:
    return with_fault(history, kind="agentless", one=frozenset({name}), other=frozenset(), since=since)


def with_other_result(history: History) -> History:
    other = {**history.final, "t": replace(history.final["t"], result=OTHER)}
    return one_ledger(history, Ledger(tasks=other, digest="same"))


def with_a_lost_success(history: History) -> History:
    seen = with_events(history, event(60, "ada", "result", task="u", status="succeeded", fence="1.u.1"))
    return with_tasks(seen, u=Final(status="failed"))


def with_three_results(history: History) -> History:
    more = (event(60, "bob", "result", task="t", status="succeeded", fence=fence) for fence in (OTHER, "3.c.1"))
    return with_events(history, *more)


DOCTORED: dict[str, tuple[str, Callable[[History], History]]] = {
    "an acknowledged task is in one ledger only": ("P1", without_task),
    "an acknowledged task is nowhere": ("P1", lambda good: replace(good, acked=("t", "s", "u"))),
    "user code began twice": ("P2", lambda good: with_run(good, ONE, lambda run: replace(run, begins=(3.1, 9.0)))),
    "what was never claimed ran": ("P2", lambda good: replace(good, runs=(*good.runs, run("3.c.1", "bob", 70, 71)))),
    "it ran at another peer": ("P2", lambda good: with_run(good, STOPPED, lambda run: replace(run, peer="ada"))),
    "it ran before its start was stored": ("P2", lambda good: with_run(good, ONE, lambda run: replace(run, begins=(2.5,)))),
    "its start was never stored": ("P2", lambda good: without_event(good, "started", ONE)),
    "its claim was never stored": ("P2", lambda good: without_event(good, "claimed", ONE)),
    "two runs with no fault at all": ("P3", lambda good: replace(good, faults=())),
    "two runs after a cut of others": ("P3", lambda good: with_fault(good, other=frozenset({"cyd"}))),
    "two runs, the agent away for less than a lease": ("P3", lambda good: with_agent_away(good, "ada", since=14)),
    "two runs, the later one's agent away": ("P3", lambda good: with_agent_away(good, "bob")),
    "two runs long after a cut": ("P3", lambda good: with_fault(good, since=-30, until=-5)),
    "two runs under stop": ("P3", lambda good: with_tasks(good, t=replace(good.final["t"], isolation="stop"))),
    "two runs that never part": ("P3", both_go_on),
    "peers disagree": ("P4", with_other_result),
    "the result never came to its end": ("P4", lambda good: with_run(good, ONE, lambda run: replace(run, ended=False))),
    "the result is a run of another task": ("P4", lambda good: with_tasks(good, s=replace(good.final["s"], result=ONE))),
    "a stored success was lost": ("P4", lambda good: with_tasks(good, s=Final(status="failed", claims={STOPPED: "bob"}))),
    "a success that was seen was lost": ("P4", with_a_lost_success),
    "three results were seen": ("P4", with_three_results),
    "a task never ends": ("P5", lambda good: with_tasks(good, u=Final(status="queued"))),
    "ledgers differ": ("P5", lambda good: one_ledger(good, replace(good.ledgers["bob"], digest="other"))),
    "ledgers were equal too late": ("P5", lambda good: with_fault(good, equal_after=10.5)),
}


def test_a_good_history_keeps_every_promise() -> None:
    history = good()
    assert check(history) == []
    [overlap] = overlaps(history)
    assert overlap == Overlap(task="t", first=history.runs[0], second=history.runs[1], fault=history.faults[0])
    assert overlap.seconds == pytest.approx(17.8)


@pytest.mark.parametrize("what", DOCTORED)
def test_a_doctored_history_breaks_exactly_the_promise_that_it_should(what: str) -> None:
    promise, doctor = DOCTORED[what]
    assert {violation.promise for violation in check(doctor(good()))} == {promise}


@pytest.mark.parametrize(
    "fault",
    [
        Fault(kind="agentless", one=frozenset({"ada"}), since=5, until=37),
        Fault(kind="frozen", one=frozenset({"ada"}), since=5, until=14),
        Fault(kind="cut", one=frozenset({"bob"}), other=frozenset({"ada", "cyd"}), since=20, until=22),
        Fault(kind="cut", one=frozenset({"ada"}), other=frozenset({"bob"}), since=1, until=13),
    ],
    ids=["agent away", "frozen just before", "cut while the later one starts", "cut long enough before"],
)
def test_a_fault_explains_two_runs(fault: Fault) -> None:
    history = replace(good(), faults=(fault,))
    [overlap] = overlaps(history)
    assert overlap.fault == fault


def test_a_history_without_ledgers_proves_nothing() -> None:
    with pytest.raises(AssertionError, match="proves nothing"):
        check(replace(good(), ledgers={}))
