"""How a person changes the key of the mesh: install, use, remove, and a list of who has what.

Each step is one change of this peer's ring, and then an exchange of rings with every live peer. A step that might shut somebody
out begins with such a round, too: a peer counts as ready only if it answered just now. Nothing is changed unless all are, or
were named as those whom to go on without.
"""

from collections.abc import Collection, Iterable, Sequence

from meshq.errors import MeshqError, TaskFailed, Unreachable, UsageError
from meshq.gossip.member import Liveness, Member
from meshq.ids import PeerId
from meshq.peers import Peers, is_alive
from meshq.trust import keyring, keys
from meshq.trust.keyholder import KeyHolder
from meshq.trust.keyring import Keyring, Offer
from meshq.web.documents import Document
from meshq.web.key_exchange import Answer, KeyExchange, listed

ON_WITHOUT = "--without NAME goes on without a machine"


class KeySteps:
    """One for an agent; the desk hands it the commands. `without`: names of machines, or beginnings of their ids."""

    def __init__(self, exchange: KeyExchange, peers: Peers) -> None:
        self.holder: KeyHolder = exchange.holder
        self._exchange = exchange
        self._peers = peers

    def document(self) -> Document:
        """Every key, which live peers have it, by what they said last, and which that are off are not known to have it."""
        ring, me = self.holder.ring, self._peers.me
        off = self._off()
        said = {peer: self._peers.telemetry(peer).keys for peer in self._peers.others_alive()} | {me: self.holder.ids}
        return {
            "keys": [
                {
                    "id": each.id,
                    "in_use": each.id == ring.current.id,
                    "peers": self._names(peer for peer, held in said.items() if each.id in held),
                    "used_by": self._names(peer for peer, held in said.items() if each.id in held[:1]),
                    "lacking": self._names(peer for peer, held in said.items() if each.id not in held),
                    "off": self._names(peer for peer in off if not each.bars(peer) and not self._had(peer, (each.id,))),
                }
                for each in ring.ordered
            ],
            "removed": list(ring.removed),
        }

    async def install(self, text: str | None, without: Sequence[str]) -> Document:
        """Have a key more, and hand it to every peer that is known now. Without a `text` the one that waits to be used, or a
        new one. Answers who has it, who could not be reached, who gets it on coming back, and who is to go without."""
        barred = self._resolve(without)
        given, fresh = keys.parse(text) if text else None, keys.generate()
        meant = [peer for peer in self._known() if peer not in barred]
        chosen = ""

        def with_it(ring: Keyring) -> Keyring:
            nonlocal chosen
            after, chosen = keyring.install(ring, self._peers.me, given, meant, barred, fresh)
            return after

        await self.holder.change(with_it)
        entry = self.holder.ring.get(chosen)
        entitled = [peer for peer in self._known() if entry is not None and entry.is_for(peer)]
        alive = [peer for peer in self._peers.others_alive() if peer in entitled]
        answers = await self._exchange.exchange_with_all(alive)
        return self._outcome(chosen, answers, {peer: _lack(answers[peer], chosen) for peer in alive}) | {
            "later": self._names(peer for peer in entitled if peer not in (self._peers.me, *alive)),
            "left_out": self._names(peer for peer in self._known() if peer not in (self._peers.me, *entitled)),
        }

    async def use(self, reference: str, without: Sequence[str]) -> Document:
        """Have every peer use this key. TaskFailed, and nothing has changed, unless all live ones have it."""
        left_out = self._resolve(without)
        chosen = keyring.resolve(self.holder.ring, reference)
        keyring.use(self.holder.ring, self._peers.me, chosen)  # may be refused: before anybody is asked
        alive = self._alive_but(left_out)
        if chosen != self.holder.ring.use.key:
            answers = await self._exchange.exchange_with_all(alive)
            self._insist(
                f"not every live machine has the key {chosen}",
                {peer: self._reason(peer, answers[peer], chosen, _lack(answers[peer], chosen)) for peer in alive},
                f"`meshq key install` hands it to all that are there now; {ON_WITHOUT}",
            )
        await self.holder.change(lambda ring: keyring.use(ring, self._peers.me, chosen))
        answers = await self._exchange.exchange_with_all(alive)
        return self._outcome(chosen, answers, {peer: _other(answers[peer], chosen) for peer in alive})

    async def remove(self, references: Sequence[str], without: Sequence[str]) -> Document:
        """Accept these keys no longer. TaskFailed, and nothing has changed, while a live peer uses one of them or does not
        answer. Answers who is off and is locked out by that, as far as is known."""
        left_out = self._resolve(without)
        gone = [keyring.resolve(self.holder.ring, each) for each in references]
        keyring.remove(self.holder.ring, gone)  # may be refused: before anybody is asked
        alive = self._alive_but(left_out)
        answers = await self._exchange.exchange_with_all(alive)
        self._insist(
            f"not every live machine can do without {', '.join(gone)}",
            {peer: self._reason(peer, answers[peer], gone[0], _clings(answers[peer], gone)) for peer in alive},
            f"have them use another key: `meshq key use ID`; {ON_WITHOUT}",
        )
        await self.holder.change(lambda ring: keyring.remove(ring, gone))
        answers = await self._exchange.exchange_with_all(alive)
        missed = [peer for peer in self._off() if peer not in left_out and not self.holder.ring.current.bars(peer)]
        stranded = [peer for peer in missed if not self._had(peer, self.holder.ids)]
        return self._outcome(",".join(gone), answers, {}) | {"stranded": self._names(stranded)}

    # -- ------------------------------------------------------------------------------------------------------------

    def _known(self) -> list[PeerId]:
        """Everybody who may come, this peer first: not who said that it left."""
        others = {each.peer for each in self._members() if each.liveness is not Liveness.LEFT}
        return [self._peers.me, *sorted(others - {self._peers.me})]

    def _members(self) -> list[Member]:
        return [*self._peers.members(), *self._peers.remembered()]

    def _off(self) -> list[PeerId]:
        """Who is not there now and may come back: who left, too, for its home rejoins with the key that it has."""
        return [each.peer for each in self._members() if not is_alive(each)]

    def _had(self, peer: PeerId, keys: Collection[str]) -> bool:
        """Whether the peer said, when it was heard last, that it has one of these keys."""
        return not set(self._peers.telemetry(peer).keys).isdisjoint(keys)

    def _alive_but(self, left_out: Collection[PeerId]) -> list[PeerId]:
        return [peer for peer in self._peers.others_alive() if peer not in left_out]

    def _resolve(self, names: Iterable[str]) -> list[PeerId]:
        """UsageError for a name that no machine has, or that is this machine's."""
        known = {each.peer: each.name for each in self._members()}
        found: list[PeerId] = []
        for wanted in names:
            named = [peer for peer, name in known.items() if name == wanted]
            matching = named or [peer for peer in known if wanted and peer.startswith(wanted)]
            if not matching:
                raise UsageError(f"--without: there is no machine {wanted!r}", "`meshq peers` lists them")
            if self._peers.me in matching:
                raise UsageError(f"--without: {wanted!r} is this machine", "give the command on a machine that stays")
            found += matching
        return found

    def _names(self, peers: Iterable[PeerId]) -> list[str]:
        return sorted(self._peers.name(peer) for peer in peers)

    def _insist(self, what: str, reasons: dict[PeerId, str], hint: str) -> None:
        if failing := [f"{self._peers.name(peer)} {reason}" for peer, reason in reasons.items() if reason]:
            raise TaskFailed(f"{what}: {listed(failing)}", hint)

    def _outcome(self, key: str, answers: dict[PeerId, Answer], shortcomings: dict[PeerId, str]) -> Document:
        """Who went along with a step, and who did not: those hear of it later."""
        reasons = {peer: self._reason(peer, answer, key, shortcomings.get(peer, "")) for peer, answer in answers.items()}
        return {
            "id": key,
            "peers": self._names([self._peers.me, *(peer for peer, reason in reasons.items() if not reason)]),
            "failed": [{"name": self._peers.name(peer), "reason": reason} for peer, reason in reasons.items() if reason],
        }

    def _reason(self, peer: PeerId, answer: Answer, key: str, shortcoming: str) -> str:
        """Why a peer is not where it should be, in words; empty if it is."""
        entry = self.holder.ring.get(key)
        if isinstance(answer, Unreachable):
            return "does not answer"
        if isinstance(answer, MeshqError):
            member = self._peers.member(peer)
            if member is not None and member.version and not self._peers.telemetry(peer).ring:
                return f"has meshq {member.version}, which can't change keys"
            return answer.message
        if shortcoming and key not in answer.held and entry is not None and not entry.is_for(peer):
            return "was not there when it was installed, or was left out"
        return shortcoming


def _lack(answer: Answer, key: str) -> str:
    return "lacks it" if isinstance(answer, Offer) and key not in answer.held else ""


def _other(answer: Answer, key: str) -> str:
    return f"uses {answer.held[0]}" if isinstance(answer, Offer) and answer.held[:1] != (key,) else ""


def _clings(answer: Answer, gone: Collection[str]) -> str:
    return f"uses {answer.held[0]}" if isinstance(answer, Offer) and answer.held[0] in gone else ""
