"""Votes: of a task under `--on-isolation stop` at most one attempt is ever live, whoever is cut off from whom.

Problem. A machine that is cut off goes on with its task, and the others, who cannot know that, start the task again. For most
tasks that is right. Some must never run twice at once: for these the machine that is cut off must stop in time without being
told to, and nobody may start before it has, without a clock that all agree on.

Invariant (I8). Whatever is live has unexpired grants of a majority of the task's voters, by its own machine's clock. Any two
majorities share a voter, and a voter gives a second claim its vote only after the grant of the first has run out on the voter's
clock, or after the first claim's own peer has recorded its end, from which on nothing of it runs or can start.

Algorithm. Up to five voters are fixed in the row at submit, by rendezvous over the peers that are alive then. Each is named by
its actor, so a voter whose database was lost, restored or replaced, and its grants with it, is none any more: it abstains.
  The voter (`Voter`) grants one claim of a task at a time, commits that, and answers. It renews what it has granted, refuses
  other claims of that attempt and of earlier ones, and lets a later attempt wait until the grant has run out. Who has which
  grant is on its disk, until when is not: a restart counts as a renewal of all grants, and so renewals cost nothing there.
  A disk may have been set back as a whole, which nothing shows: votes are no writes of the ledger. So for `grant_ttl` after a
  start, until all has run out that an earlier run can have granted, it grants nothing, and renews only what has started and
  has no later attempt: what has lost its grants since is dead by then, and nothing of it starts again. A new actor need not
  wait: as that one, no earlier run can have voted.
  The asker (`Asker`) asks all voters when the claim is written and then every `grant_renew`, with one message to each voter for
  all of its claims. It counts from before it sends and the voter from when it accepts; of the seconds it relies on 98 %, for
  no clock is wrong by more than 1 % (quartzes are by a hundredth of that). So its count is always the first to end.
  A claim starts only with a majority (`runs.py`). Whatever runs gets a new time by which it must be dead, whenever the
  majority's time grows (`Keep`); that is enforced outside of this process, which may be stopped or gone (`meshq/exec/shim.py`).
  A claim is given up at once when too many voters have refused it, or are not alive, for a majority.

Rejected. Drawing new voters when some are gone: two sides may both do so, and both have a majority. Asking only as many voters
as a majority needs: each that fails then costs a second of the thirty. Storing renewals: a commit every five seconds for
nothing but a slightly earlier next attempt after a restart.

Limits. VOTERS_MAX voters, ASKS_MAX claims in one message, GRANT_SECONDS_MAX for which a voter lets itself be bound. If a
majority of the voters is gone for good the task waits for ever; `show` says for whom.

Reading. Gray and Cheriton, "Leases" (SOSP 1989), section 2. `Voter.vote`, then `Asker`, then `Grants`: both in one ledger.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final, assert_never

from meshq.errors import PeerError
from meshq.ids import ACTOR_PEER_CHARS, ActorId, Dot, Fence, PeerId, TaskId, actor_peer_prefix, is_fence, split_fence
from meshq.ledger.board import Board, over
from meshq.ledger.effects import Ask, Grant, GrantReply, GrantRequest, Keep, SendGrants
from meshq.ledger.holder import Reading
from meshq.ledger.journal import Journal
from meshq.ledger.rendezvous import voters
from meshq.ledger.replica import VOTERS_MAX
from meshq.ledger.row import Ended, Row
from meshq.ledger.sessions import Sessions, majority
from meshq.ledger.timing import LedgerConfig
from meshq.task import Isolation, TaskSpec

CLOCK_RATE: Final = 0.01  # how wrong any machine's clock may run
ASK_AGAIN: Final = 1.0  # seconds, of a claim without a majority
ROW_SOON: Final = 0.2  # a request may overtake the push of its claim
ASKS_MAX: Final = 1_000
GRANT_SECONDS_MAX: Final = 600.0


@dataclass(frozen=True, slots=True)
class Granted:
    """The claim has the vote, from now on for the seconds that were asked for."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The claim cannot have this vote any more."""


@dataclass(frozen=True, slots=True)
class Later:
    """Not now; it is worth asking again after so many seconds."""

    seconds: float


Vote = Granted | Refused | Later


def relied_on(seconds: float) -> float:
    """How long the asker, by its clock and counted from before it sent, may rely on a grant of so many seconds.

    The asker's clock may lag and the voter's may lead: (1 - r) / (1 + r) of the seconds, of which 1 - 2r falls short.
    """
    return seconds * (1 - 2 * CLOCK_RATE)


def has_ended(row: Row, claim: Dot) -> bool:
    """Whether the claim's own peer has recorded its end, so that nothing of it runs or can start.

    The actor must be the same: a peer whose database was lost knows nothing of what it ran before.
    """
    return any(isinstance(fact, Ended) and fact.claim == claim and dot.actor == claim.actor for dot, fact in row.facts)


def _goes_on(reading: Reading, claim: Dot) -> bool:
    """Whether the claim had a majority, and no later attempt is known that a forgotten vote can have gone to."""
    attempt = reading.claims[claim].attempt
    return claim in reading.started and all(other.attempt <= attempt for other in reading.claims.values())


class Voter:
    """What this peer has granted: at most one claim of each task."""

    def __init__(self, grants: Mapping[TaskId, Grant], now: float, ttl: float = 0.0) -> None:
        """`grants`: what is on the disk. Each is renewed hereby.

        `ttl`: for how long an earlier run has let itself be bound; 0 if there was none, as this actor.
        """
        self._grants = dict(grants)
        self._unbound_at = now + max([ttl, *(grant.seconds for grant in grants.values())]) if ttl else now
        self._until = {task: now + grant.seconds for task, grant in grants.items()}
        self._changes: dict[TaskId, Grant | None] = {}

    def __len__(self) -> int:
        return len(self._grants)

    def vote(self, now: float, me: ActorId, ask: Ask, seconds: float, reading: Reading | None, *, new: bool) -> Vote:
        """Decide, and keep to it. `me`: as whom this peer writes now; `new`: may it grant what it has not granted before?"""
        attempt, claim = split_fence(ask.fence)
        if reading is None or claim not in reading.claims:
            return Later(ROW_SOON)
        if me not in reading.row.voters or has_ended(reading.row, claim):
            return Refused()
        current = self._grants.get(ask.task)
        if current is not None and current.fence == ask.fence:
            if now < self._unbound_at and not _goes_on(reading, claim):
                return Later(self._unbound_at - now)
            return self._grant(now, ask, max(seconds, current.seconds))
        if reading.cancel is not None or reading.result is not None:
            return Refused()
        if current is not None and not has_ended(reading.row, split_fence(current.fence)[1]):
            if attempt <= split_fence(current.fence)[0]:
                return Refused()
            if now < self._until[ask.task]:
                return Later(self._until[ask.task] - now)
        if now < self._unbound_at:
            return Later(self._unbound_at - now)
        return self._grant(now, ask, seconds) if new else Later(ASK_AGAIN)

    def _grant(self, now: float, ask: Ask, seconds: float) -> Granted:
        grant = Grant(fence=ask.fence, seconds=seconds)
        if self._grants.get(ask.task) != grant:
            self._grants[ask.task] = self._changes[ask.task] = grant
        self._until[ask.task] = now + seconds
        return Granted()

    @property
    def given(self) -> Mapping[TaskId, Grant]:
        return dict(self._grants)

    def take_changes(self) -> dict[TaskId, Grant | None]:
        """What must be committed since the last call, before any of these votes is told."""
        changes, self._changes = self._changes, {}
        return changes

    def forget(self, now: float, is_over: Callable[[TaskId], bool]) -> None:
        """Forget the grants that have run out and whose task is over."""
        for task in [task for task, until in self._until.items() if until <= now and is_over(task)]:
            del self._grants[task], self._until[task]
            self._changes[task] = None

    def check(self) -> None:
        assert self._grants.keys() == self._until.keys()
        assert not self._changes, "votes that were not taken to be committed"


@dataclass(slots=True)
class _Candidacy:
    """One claim, and what its voters have said. Mutable."""

    task: TaskId
    ask_at: dict[ActorId, float]  # when to ask next, by voter; those that have refused are not asked
    until: dict[ActorId, float] = field(default_factory=dict)  # how long the grant may be relied on, by voter
    refused: dict[ActorId, None] = field(default_factory=dict)

    @property
    def enough(self) -> int:
        return majority(len(self.ask_at) + len(self.refused))


@dataclass(frozen=True, slots=True)
class _Sent:
    voter: ActorId
    at: float
    fences: tuple[Fence, ...]


class Asker:
    """The claims of this peer that need grants."""

    def __init__(self, config: LedgerConfig) -> None:
        self._config = config
        self._claims: dict[Fence, _Candidacy] = {}
        self._sent: dict[int, _Sent] = {}
        self._number = 0

    def __contains__(self, token: object) -> bool:
        return token in self._claims

    def watch(self, now: float, task: TaskId, token: Fence, voters: Sequence[ActorId]) -> None:
        """Get grants for this claim, and keep them."""
        self._claims[token] = _Candidacy(task, dict.fromkeys(voters, now))

    def forget(self, token: Fence) -> None:
        """The claim has ended."""
        self._claims.pop(token, None)

    def begin(self, now: float) -> list[tuple[ActorId, GrantRequest]]:
        """The requests that are due. What will soon be due to the same voter goes along."""
        self._sent = {number: sent for number, sent in self._sent.items() if sent.at + self._config.grant_ttl > now}
        due = {voter: None for claim in self._claims.values() for voter, at in claim.ask_at.items() if at <= now}
        return [request for voter in due for request in self._requests_to(now, voter)]

    def _requests_to(self, now: float, voter: ActorId) -> list[tuple[ActorId, GrantRequest]]:
        soon = now + self._config.grant_renew / 2
        mine = [(token, claim) for token, claim in self._claims.items() if claim.ask_at.get(voter, inf) <= soon]
        requests = []
        for first in range(0, len(mine), ASKS_MAX):
            part = mine[first : first + ASKS_MAX]
            for token, claim in part:
                claim.ask_at[voter] = now + self._pause(now, token)
            self._number += 1
            self._sent[self._number] = _Sent(voter, now, tuple(token for token, _ in part))
            asks = tuple(Ask(task=claim.task, fence=token) for token, claim in part)
            requests.append((voter, GrantRequest(number=self._number, seconds=self._config.grant_ttl, asks=asks)))
        return requests

    def _pause(self, now: float, token: Fence) -> float:
        return self._config.grant_renew if self.until(token) > now else min(ASK_AGAIN, self._config.grant_renew)

    def replied(self, now: float, peer: PeerId, reply: GrantReply) -> bool:
        """False if no such answer was awaited of this peer. What it says of claims that it was not asked about is ignored."""
        sent = self._sent.get(reply.number)
        if sent is None or actor_peer_prefix(sent.voter) != peer[:ACTOR_PEER_CHARS]:
            return False
        del self._sent[reply.number]
        granted, refused = frozenset(reply.granted), frozenset(reply.refused)
        for token in sent.fences:
            claim = self._claims.get(token)
            if claim is None or sent.voter not in claim.ask_at:
                continue
            if token in granted:
                until = sent.at + relied_on(self._config.grant_ttl)
                claim.until[sent.voter] = max(claim.until.get(sent.voter, -inf), until)
                claim.ask_at[sent.voter] = max(now, sent.at + self._config.grant_renew)
            elif token in refused:
                claim.refused[sent.voter] = None
                del claim.ask_at[sent.voter]
            elif token in reply.waits:
                claim.ask_at[sent.voter] = now + min(max(reply.waits[token], ROW_SOON), self._config.grant_renew)
        return True

    def failed(self, now: float, number: int) -> None:
        """No answer will come."""
        sent = self._sent.pop(number, None)
        for token in sent.fences if sent is not None else ():
            claim = self._claims.get(token)
            if claim is not None and sent is not None and sent.voter in claim.ask_at:
                claim.ask_at[sent.voter] = now + self._pause(now, token)

    def until(self, token: Fence) -> float:
        """How long the grants of a majority may be relied on; -inf if so many have not been there."""
        claim = self._claims[token]
        ranked = sorted(claim.until.values(), reverse=True)
        return ranked[claim.enough - 1] if len(ranked) >= claim.enough else -inf

    def possible(self, token: Fence, can_vote: Callable[[ActorId], bool]) -> bool:
        """Whether as many voters as a majority needs are there and have not refused."""
        claim = self._claims[token]
        return sum(1 for voter in claim.ask_at if can_vote(voter)) >= claim.enough

    def deadline(self) -> float:
        """When the next request is due."""
        return min((at for claim in self._claims.values() for at in claim.ask_at.values()), default=inf)


class Grants:
    """Both sides in one ledger: this peer as a voter, and as one that asks. Its own vote costs no message."""

    def __init__(
        self, me: PeerId, config: LedgerConfig, journal: Journal, board: Board, sessions: Sessions,
        stored: Mapping[TaskId, Grant], now: float, *, new: bool = False,
    ) -> None:  # fmt: skip
        """`new`: nobody ever voted as the actor that this peer is."""
        self._me = me
        self._config = config
        self._journal = journal
        self._board = board
        self._sessions = sessions
        self._voter = Voter(stored, now, 0.0 if new else config.grant_ttl)
        self._asker = Asker(config)
        self._kept: dict[Fence, float] = {}
        self._forget_at = now + config.grant_ttl if stored else inf
        self.counters: Counter[str] = Counter()

    def draw_voters(self, spec: TaskSpec) -> tuple[ActorId, ...]:
        """Who must agree before the task that is created next may start; nobody unless it asks for that."""
        if spec.isolation != Isolation.STOP.value:
            return ()
        replica = self._journal.replica
        electable = self._sessions.electable() | {self._me: replica.actor}
        return tuple(electable[peer] for peer in voters(replica.next_task, electable)[:VOTERS_MAX])

    # ---- as a voter

    def answer(self, now: float, peer: PeerId, request: GrantRequest) -> GrantReply:
        """Vote. The reply may be told once `take_changes` is committed.

        PeerError if the request breaks a limit, or asks for what is not the peer's; then nothing was granted.
        """
        if len(request.asks) > ASKS_MAX or not 0 < request.seconds <= GRANT_SECONDS_MAX:
            raise PeerError(f"asking for {len(request.asks)} grants of {request.seconds:g} s each: that is too much")
        for ask in request.asks:
            if not is_fence(ask.fence) or split_fence(ask.fence)[1].actor[:ACTOR_PEER_CHARS] != peer[:ACTOR_PEER_CHARS]:
                raise PeerError(f"asking for a grant: {ask.fence[:64]!r} is no claim of the peer that asks")
        return self._votes(now, request)

    def _votes(self, now: float, request: GrantRequest) -> GrantReply:
        granted, refused, waits = [], [], {}
        replica = self._journal.replica
        me, new = replica.actor, replica.trusted and not self._sessions.blocked(now)
        for ask in request.asks:
            match self._voter.vote(now, me, ask, request.seconds, self._reading(ask.task), new=new):
                case Granted():
                    granted.append(ask.fence)
                case Refused():
                    refused.append(ask.fence)
                case Later(seconds):
                    waits[ask.fence] = seconds
                case vote:
                    assert_never(vote)
        self.counters["grants_refused"] += len(refused)
        if len(self._voter):
            self._forget_at = min(self._forget_at, now + self._config.grant_ttl)
        return GrantReply(number=request.number, granted=tuple(granted), refused=tuple(refused), waits=waits)

    @property
    def given(self) -> Mapping[TaskId, Grant]:
        """The votes of this peer that are not forgotten."""
        return self._voter.given

    def take_changes(self) -> dict[TaskId, Grant | None]:
        """What must be committed, before any vote is told or used."""
        return self._voter.take_changes()

    def _reading(self, task: TaskId) -> Reading | None:
        row = self._journal.replica.get(task)
        return None if row is None else self._board.reading(row)

    # ---- for own claims

    def __contains__(self, token: object) -> bool:
        """Whether this own claim needs grants."""
        return token in self._asker

    def watch(self, now: float, task: TaskId, token: Fence) -> None:
        """This peer has made or adopted the claim; nothing follows if its task does not ask for it."""
        if drawn := self._journal.row(task).voters:
            self._asker.watch(now, task, token, drawn)

    def forget(self, token: Fence) -> None:
        """The claim has ended."""
        self._asker.forget(token)
        self._kept.pop(token, None)

    def ask(self, now: float) -> list[SendGrants]:
        """Ask whoever it is time to ask; this peer's own vote is there at once."""
        sends = []
        for voter, request in self._asker.begin(now):
            peer = self._sessions.voter(voter)
            if peer == self._me:
                self._asker.replied(now, peer, self._votes(now, request))
            elif peer is None:
                self._asker.failed(now, request.number)
            else:
                sends.append(SendGrants(peer, request))
        return sends

    def replied(self, now: float, peer: PeerId, reply: GrantReply) -> None:
        if not self._asker.replied(now, peer, reply):
            self.counters["grant_replies_unexpected"] += 1

    def failed(self, now: float, number: int) -> None:
        self.counters["grant_requests_failed"] += 1
        self._asker.failed(now, number)

    def may_start(self, now: float, token: Fence) -> bool:
        """Whether the claim needs no grants, or has a majority for long enough to be worth a start."""
        return token not in self._asker or self._asker.until(token) >= now + self._config.grant_ttl / 2

    def possible(self, token: Fence) -> bool:
        """Whether the claim needs no grants, or can have a majority as things are."""
        return token not in self._asker or self._asker.possible(token, self._sessions.can_vote)

    def keep(self, token: Fence) -> list[Keep]:
        """What is to be told to whoever supervises the claim's process, if there is something new."""
        until = self._asker.until(token) if token in self._asker else -inf
        if until <= self._kept.get(token, -inf):
            return []
        self._kept[token] = until
        return [Keep(token, until)]

    # ---- time

    def deadline(self) -> float:
        return min(self._asker.deadline(), self._forget_at)

    def handle_timeout(self, now: float) -> None:
        if self._forget_at <= now:
            self._voter.forget(now, lambda task: (reading := self._reading(task)) is None or over(reading))
            self._forget_at = now + self._config.grant_ttl if len(self._voter) else inf

    def check(self) -> None:
        self._voter.check()
