"""A request of one agent to another, as `meshq/web/peer_client.py` carries it: answered, refused, or too late."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from meshq.web.dialing import CONNECT_SECONDS
from meshq.web.peer_client import REQUEST_SECONDS

if TYPE_CHECKING:
    from tests.simulator.mesh_peer import MeshPeer

SECOND_RETRANSMISSION = 0.4  # seconds; the network itself adds the first one

Serve = Callable[["MeshPeer", Callable[[object], None]], None]
"""What the asked peer does; it answers by the callback, when it likes."""


class Request:
    """One of the two callbacks is called, once, unless the asker dies."""

    def __init__(
        self,
        asker: "MeshPeer",
        target: "MeshPeer",
        serve: Serve,
        answered: Callable[[object], None],
        failed: Callable[[], None],
    ) -> None:
        self._asker = asker
        self._target = target
        self._serve = serve
        self._answered = answered
        self._failed = failed
        self._run = asker.run
        self._pending = True
        self.asked_at = asker.now
        limit = asker.rng.choice((CONNECT_SECONDS, REQUEST_SECONDS))
        self._timeout = asker.later(limit, self._settle, failed)

    def send(self) -> None:
        """Over a connection, or as a packet that may be lost and doubled: the plan says which."""
        network = self._asker.mesh.network
        lost_twice = self._asker.mesh.plan.reliable and self._asker.rng.random() < network.loss**2
        delay = SECOND_RETRANSMISSION if lost_twice else 0.0
        self._asker.world.call_later(delay, self._carry, self._asker, self._target, self._arrive)

    def _carry(self, source: "MeshPeer", destination: "MeshPeer", call: Callable[[], None]) -> None:
        source.mesh.network.send(source.name, destination.name, call, reliable=source.mesh.plan.reliable)

    def _arrive(self) -> None:
        target = self._target
        if target.running and target.doors_open:
            target.when_awake(lambda: self._serve(target, self._answer))
        elif target.machine.powered:
            self._back(self._refused)

    def _refused(self) -> None:
        """A machine without an agent says so, and that is a hint for gossip."""
        gossip = self._asker.gossip
        if gossip.swim is not None:
            gossip.perform(gossip.swim.handle_refused(self._asker.now, self._target.id))
        self._failed()

    def _answer(self, answer: object) -> None:
        def succeed() -> None:
            self._asker.heard_of(self.asked_at)
            self._answered(answer)

        self._back(succeed)

    def _back(self, call: Callable[[], None]) -> None:
        def returned() -> None:
            if self._run == self._asker.run:
                self._asker.when_awake(lambda: self._settle(call))

        self._carry(self._target, self._asker, returned)

    def _settle(self, call: Callable[[], None]) -> None:
        if self._pending:
            self._pending = False
            self._timeout.cancel()
            call()
