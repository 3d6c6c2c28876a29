"""Claiming what falls to this peer: when it may bid, with how much room, and for what.

For whom a task is meant is the deal's business (`claiming.py`, `rendezvous.py`); which tasks come into question, the board's.
"""

from math import inf

from meshq.ids import PeerId
from meshq.ledger.board import Board
from meshq.ledger.claiming import Deal
from meshq.ledger.placement import Capacity
from meshq.ledger.runs import Runs
from meshq.ledger.sessions import Sessions
from meshq.ledger.timing import LedgerConfig


class Bidding:
    """Mutable. `look_again_at`: when a task that others had the first word on may fall to this peer."""

    def __init__(self, me: PeerId, config: LedgerConfig, board: Board, sessions: Sessions, runs: Runs, now: float) -> None:
        self._me = me
        self._config = config
        self._board = board
        self._sessions = sessions
        self._runs = runs
        self._turn = 0
        self._last_free = Capacity(0, 0, 0, 0)
        self._capacity_since = now
        self.leaving = False
        self.look_again_at = inf

    def bid(self, now: float) -> None:
        """Claim what falls to this peer."""
        self.look_again_at = inf
        mine = self._sessions.views.get(self._me)
        if mine is None or not self._runs.adopted or self.leaving or self._sessions.blocked(now):
            return
        free = self._board.free_of(self._me, self._runs.taken())
        if free.exceeds(self._last_free):
            self._capacity_since = now
        self._last_free = free
        if free.slots < 1 or not self._board.anybody_waits:
            return
        alive = {peer: view for peer, view in self._sessions.views.items() if view.alive or peer == self._me}
        capacities = {peer: free if peer == self._me else self._board.free_of(peer) for peer in alive}
        deal = Deal(self._me, alive, capacities, self._capacity_since, self._config)
        plan = deal.plan(now, self._board.candidates(deal, mine.telemetry, self._turn))
        self.look_again_at = plan.look_again_at
        for task, attempt in plan.claims:
            self._runs.claim(now, task, attempt)
            self._turn += 1
