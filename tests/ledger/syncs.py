"""A sync between two replicas, step by step, without cores around them."""

from collections.abc import Callable
from random import Random

from meshq.ledger.antientropy import AntiEntropy
from meshq.ledger.donor import Donor
from meshq.ledger.effects import Answer, SendSync, SyncOffer, SyncPage
from meshq.ledger.replica import Replica
from meshq.ledger.timing import LAN
from meshq.ledger.transfer import rows_of
from tests.ledger.builders import peer

ASKER, DONOR = peer("asker"), peer("donor")


class Pull:
    """One replica pulls from another. `between` is called before each question is answered."""

    def __init__(self, receiver: Replica, donor: Replica, *, broken_off: bool = False) -> None:
        self.receiver = receiver
        self.asks = AntiEntropy(LAN, Random(1), receiver, 0.0)
        self.asks._broken_off = broken_off
        self.donor = Donor(donor, run=1)
        self.answers: list[Answer] = []
        self.completed = False

    @property
    def pages(self) -> int:
        return sum(1 for answer in self.answers if isinstance(answer, SyncPage))

    def run(self, *, answers: int | None = None, between: Callable[[int], None] | None = None) -> "Pull":
        """Until it is complete, or so many answers have come."""
        self.asks.peers_changed((DONOR,))
        self.asks.ask(DONOR)
        sends = self.asks.begin(0.0)
        while sends and (answers is None or len(self.answers) < answers):
            [send] = sends
            if between is not None:
                between(len(self.answers))
            answer = self.donor.answer(0.0, ASKER, send.question)
            self.answers.append(answer)
            sends = self._take(answer)
        return self

    def _take(self, answer: Answer) -> list[SendSync]:
        receiver = self.receiver
        for rows in rows_of(answer):
            for row in rows:
                assert row is not None
                accepted = receiver.absorb(row) is not None
                self.asks.handle_rows(DONOR, answer.number, (row.task,), accepted=accepted)
        if isinstance(answer, SyncOffer) and answer.settings is not None and not receiver.absorb_settings(answer.settings):
            self.asks.handle_rows(DONOR, answer.number, (), accepted=False)
        progress = self.asks.handle_answer(0.0, DONOR, answer)
        assert progress is not None
        if progress.adopt is not None:
            self.completed = receiver.adopt(progress.adopt, progress.floors)
            for task in progress.absent:
                receiver.purge(task)
        return [*progress.more, *self.asks.begin(0.0)]


def pull(receiver: Replica, donor: Replica, *, pages: int | None = None, broken_off: bool = False) -> int:
    """A sync, broken off after so many pages; how many were needed."""
    return Pull(receiver, donor, broken_off=broken_off).run(answers=None if pages is None else pages + 1).pages
