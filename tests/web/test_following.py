"""Following a log through attempts and lost connections: each byte once, and a word where some are missing."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from meshq.errors import TaskFailed, UsageError
from meshq.exec.logs import Chunk
from meshq.ids import Dot, Fence, PeerId, fence
from meshq.ledger.row import Back, Claim, Ended, Fact, Lost, Row, Started
from meshq.pieces import Piece
from meshq.task import EndKind
from meshq.web import following, streams
from meshq.web.changes import Changes
from meshq.web.following import Follower, Position, parse_position
from tests.ledger.builders import actor, dot, outcome, peer, row

LIMIT = 10.0
A, B = dot("a", 2), dot("b", 1)
ONE, TWO = fence(1, A), fence(2, B)

CLAIMED: tuple[tuple[Dot, Fact], ...] = ((A, Claim(attempt=1, peer=peer("a"), seen={actor("a"): 1})),)
RUNNING = (*CLAIMED, (dot("a", 3), Started(claim=A)))
SUCCEEDED = (*RUNNING, (dot("a", 4), Ended(claim=A, outcome=outcome())))
LOST = (*RUNNING, (dot("c", 1), Lost(claim=A)))
SEEN = {actor("a"): 3, actor("c"): 1}
AGAIN = (*LOST, (B, Claim(attempt=2, peer=peer("b"), seen=SEEN)), (dot("b", 2), Started(claim=B)))
AGAIN_SUCCEEDED = (*AGAIN, (dot("b", 3), Ended(claim=B, outcome=outcome())))
BACK = (*AGAIN, (dot("a", 4), Back(claim=A, seen=SEEN)), (dot("b", 3), Ended(claim=B, outcome=outcome(EndKind.SUPERSEDED))))
BACK_SUCCEEDED = (*BACK, (dot("a", 5), Ended(claim=A, outcome=outcome())))


@dataclass
class Answer:
    """What one request for a log gets: chunks, then its end, or a failure; and what the row says from then on."""

    chunks: tuple[Chunk, ...] = ()
    fails: bool = False
    hangs: bool = False
    then: tuple[tuple[Dot, Fact], ...] | None = None


@dataclass
class Story:
    """A task, its row, and what is answered to each request for a log, in order."""

    facts: tuple[tuple[Dot, Fact], ...]
    answers: list[Answer]
    asked: list[tuple[Fence, int, int | None, bool]] = field(default_factory=list)
    changes: Changes = field(default_factory=Changes)

    def row(self) -> Row:
        return row(*self.facts)

    def say(self, facts: tuple[tuple[Dot, Fact], ...]) -> None:
        self.facts = facts
        self.changes.notify(self.row().task)

    async def log(
        self, fence: Fence, runner: PeerId, *, offset: int = 0, tail: int | None, follow: bool
    ) -> AsyncIterator[Chunk]:
        self.asked.append((fence, offset, tail, follow))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        for chunk in answer.chunks:
            yield chunk
        if answer.then is not None:
            self.say(answer.then)
        if answer.hangs:
            await asyncio.Event().wait()
        if answer.fails:
            raise TaskFailed("nobody has it")

    def names(self, of: PeerId) -> str:
        return {peer("a"): "ann", peer("b"): "bob"}[of]

    def follow(
        self,
        number: int | None = None,
        tail: int | None = None,
        start: Position | None = None,
        beside: Callable[[], None] | None = None,
    ) -> list[str]:
        async def scenario() -> list[Piece]:
            follower = Follower(row=self.row, logs=self, names=self.names, changes=self.changes)
            if beside is not None:
                asyncio.get_running_loop().call_later(0.02, beside)
            async with asyncio.timeout(LIMIT):
                return [piece async for piece in follower.pieces(number=number, tail=tail, start=start)]

        return [shown(piece) for piece in asyncio.run(scenario())]


def shown(piece: Piece) -> str:
    return f"{piece.attempt} {piece.peer} {piece.offset} {'broke off' if piece.broke_off else piece.data.decode()}".strip()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(following, "GIVE_UP_SECONDS", 0.0)
    monkeypatch.setattr(streams.while_checked, "__defaults__", (0.01,))


def test_a_log_is_followed_from_before_its_start_to_its_end() -> None:
    story = Story((), [Answer((Chunk(b"", 0), Chunk(b"one", 0), Chunk(b"two", 3)), then=SUCCEEDED)])
    assert story.follow(beside=lambda: story.say(RUNNING)) == ["1 ann 0", "1 ann 0 one", "1 ann 3 two"]
    assert story.asked == [(ONE, 0, None, True)]


def test_while_the_row_says_that_it_runs_its_log_is_asked_for_from_where_it_broke_off() -> None:
    answers = [
        Answer((Chunk(b"one", 0),), fails=True),
        Answer(fails=True),
        Answer((Chunk(b"", 3), Chunk(b"two", 3)), fails=True),
        Answer((Chunk(b"end", 6),), then=SUCCEEDED),
    ]
    story = Story(RUNNING, answers)
    assert story.follow(tail=5) == ["1 ann 0 one", "1 ann 3", "1 ann 3 two", "1 ann 6 end"]
    assert [(offset, tail) for _, offset, tail, _ in story.asked] == [(0, 5), (3, None), (3, None), (6, None)]


def test_an_attempt_that_is_over_is_asked_for_what_there_is() -> None:
    story = Story(RUNNING, [Answer((Chunk(b"one", 0),), fails=True, then=SUCCEEDED), Answer((Chunk(b"two", 3),))])
    assert story.follow() == ["1 ann 0 one", "1 ann 3 two"]
    assert [follow for *_, follow in story.asked] == [True, False]


def test_a_source_that_is_silent_although_the_attempt_is_over_is_asked_again() -> None:
    story = Story(RUNNING, [Answer((Chunk(b"one", 0),), hangs=True, then=SUCCEEDED), Answer((Chunk(b"two", 3),))])
    assert story.follow() == ["1 ann 0 one", "1 ann 3 two"]


def test_what_nobody_has_is_said_once_the_attempt_is_over_and_the_next_attempt_follows() -> None:
    answers = [
        Answer((Chunk(b"one", 0),), fails=True, then=AGAIN),
        Answer(fails=True),
        Answer((Chunk(b"two", 0),), then=AGAIN_SUCCEEDED),
    ]
    story = Story(RUNNING, answers)
    assert story.follow() == ["1 ann 0 one", "1 ann 3 broke off", "2 bob 0 two"]
    assert [follow for *_, follow in story.asked] == [True, False, True]


def test_a_runner_that_is_being_restarted_when_its_attempt_is_over_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "GIVE_UP_SECONDS", LIMIT)
    story = Story(SUCCEEDED, [Answer(fails=True), Answer((Chunk(b"", 0),), fails=True), Answer((Chunk(b"one", 0),))])
    assert story.follow() == ["1 ann 0", "1 ann 0 one"]


def test_an_attempt_that_comes_back_goes_on_where_its_log_stopped() -> None:
    answers = [
        Answer((Chunk(b"one", 0),), fails=True, then=AGAIN),
        Answer(),
        Answer((Chunk(b"two", 0),), then=BACK),
        Answer((Chunk(b"end", 3),), then=BACK_SUCCEEDED),
    ]
    story = Story(RUNNING, answers)
    assert story.follow() == ["1 ann 0 one", "2 bob 0 two", "1 ann 3 end"]


def test_a_follower_goes_on_from_the_position_that_it_reached() -> None:
    story = Story(AGAIN_SUCCEEDED, [Answer((Chunk(b"rest", 4),)), Answer((Chunk(b"two", 0),))])
    assert story.follow(start=Position(fence=ONE, offset=4), tail=1) == ["1 ann 4 rest", "2 bob 0 two"]
    assert story.asked == [(ONE, 4, None, False), (TWO, 0, None, False)]


def test_one_attempt_alone_is_followed_to_its_own_end() -> None:
    story = Story(AGAIN_SUCCEEDED, [Answer((Chunk(b"one", 0),))])
    assert story.follow(number=1) == ["1 ann 0 one"]


def test_what_was_superseded_by_the_result_is_not_shown_after_it() -> None:
    story = Story(BACK_SUCCEEDED, [Answer((Chunk(b"one", 0),))])
    assert story.follow() == ["1 ann 0 one"]


@pytest.mark.parametrize("text", ["", "1", f"{ONE}:", f"{ONE}:-1", f"{ONE}:{'9' * 19}", "x:1", f"{ONE}:1:2", f"{ONE}:1\n"])
def test_a_position_is_a_fence_and_an_offset(text: str) -> None:
    assert parse_position(f"{ONE}:17") == Position(fence=ONE, offset=17)
    with pytest.raises(UsageError, match="no position"):
        parse_position(text)
