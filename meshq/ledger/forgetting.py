"""Forgetting tasks: what a peer does when one is purged, here for its age, or because another peer has purged it.

A task that another peer has purged was over there, whatever it looks like here (R4), so it must not go on here: what runs of
it is stopped, and nothing waits for it any more. The rules of purging are those of `replica.py`; `retention.py` chooses what is
old.
"""

from collections.abc import Iterable, Sequence

from meshq.ids import TaskId
from meshq.ledger.antientropy import Progress
from meshq.ledger.board import Board
from meshq.ledger.catalog import Catalog
from meshq.ledger.effects import Push
from meshq.ledger.journal import Journal
from meshq.ledger.retention import Shelf
from meshq.ledger.row import covers
from meshq.ledger.runs import Runs


class Forgetting:
    def __init__(self, journal: Journal, board: Board, runs: Runs, catalog: Catalog, shelf: Shelf) -> None:
        self._journal = journal
        self._board = board
        self._runs = runs
        self._catalog = catalog
        self._shelf = shelf

    def forget_old(self, now: float) -> None:
        """R5: what the mesh does not keep any longer, but for what this peer has not seen the whole of or still works on."""
        old = self._shelf.take_old(now)
        kept = [task for task in old if self._runs.claimed(task) or not self._journal.replica.may_purge(task)]
        for task in kept:
            self._shelf.put_back(now, self._journal.row(task))
        self.forget(task for task in old if task not in kept)

    def heed_reply(self, push: Push, purged: Sequence[TaskId]) -> None:
        """Of what was pushed another peer says that it has purged these. What was not pushed it can't speak of."""
        replica = self._journal.replica
        self.forget(row.task for row in push.rows if row.task in purged and covers(replica.vector, row.birth))

    def finish_sync(self, progress: Progress) -> bool:
        """R6: adopt what the donor knows, and forget what it has purged. False: it is not at its end, or was refused.

        Of one that was refused a row only what this peer has seen the births of is forgotten (else it would come again as new).
        """
        replica = self._journal.replica
        if progress.adopt is None or not replica.adopt(progress.adopt, progress.floors):
            rows = (self._journal.row(task) for task in progress.absent if replica.has(task))
            self.forget([row.task for row in rows if covers(replica.vector, row.birth)])
            return False
        self.forget(progress.absent)
        self._runs.drop_purged()
        return True

    def forget(self, tasks: Iterable[TaskId]) -> None:
        """Forget these tasks, whatever this peer was doing about them."""
        for task in tasks:
            if self._journal.replica.has(task):
                self._runs.purged(task)
                self._board.forget(self._journal.row(task))
                self._shelf.remove(task)
                self._catalog.remove(self._journal.row(task))
                self._journal.purge(task)
