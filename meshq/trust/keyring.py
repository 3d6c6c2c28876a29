"""The keys of one mesh: one in use, and others while the mesh changes its key.

Problem: whoever has the mesh key is a member, so a key that leaked must be replaced on every machine, without an hour in which
half of the mesh does not know the other half, and without handing the new key to whoever has the old one.

How: install, use, remove. A new key is first *installed*: handed to the machines that are known at that moment, over mutual
TLS, and accepted beside the old one. When every live peer has it, it is *used*: it seals, signs the certificates that are
shown, and is what `meshq key` prints. When nobody uses the old one any more, that is *removed*; who has no other is out.

Invariant: what a key may be handed to was fixed by the person who installed it (`holders` without `barred`). The old key opens
no way to the new one: who joins with it after the install gets nothing until somebody installs again.

Algorithm: a ring is a product of three lattices, so that peers may tell each other their rings in any order and end with
the same: a set of keys that only grows, a set of ids of removed keys that only grows and takes them out of the first, and a
register that says which key is in use, of which the greatest wins, its revision first. Removal wins over use: where both
happened on two sides of a partition, what is in use is the newest key that is left. The register also holds the mesh's id,
which is that of the first key: who joins with a later one learns it from the first ring that it sees, since every
register is above that of a home that knows one key and nothing else (revision 0).

Limits: members trust each other, and a member can install keys, too. After a leak look at `meshq key list` and remove all that
you did not install. A machine that was off during all three steps has no key that is accepted; it is given the new one
by hand. Reading: Shapiro et al. 2011, 2P-Set and LWW-Register; serf's `keys` command, which has the same three steps.
"""

import hashlib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from meshq import codec
from meshq.errors import MalformedData, TaskFailed, UsageError
from meshq.ids import ACTOR_PEER_CHARS, PeerId
from meshq.trust.keys import SECRET_BYTES, MeshKey

KEYS_MAX: Final = 4  # that one may install side by side: a change of keys needs two, one that was cut short three
RING_KEYS_MAX: Final = 16  # that rings of a mesh which was cut apart bring together; more was not made by people
REMOVED_MAX: Final = 1_024  # ids that are never accepted again: a change a week for 20 years
HOLDERS_MAX: Final = 2_048  # twice the members that a mesh may have: some leave, some come
RING_BYTES_MAX: Final = 768 * 1024  # 16 keys, each for 1,024 holders: more is no ring
REVISION_MAX: Final = 2**20  # installs and uses of one mesh: people don't make a million

_ID: Final = re.compile(r"[0-9a-f]{8}")
_MESH: Final = re.compile(r"[a-z2-7]{16}")
_PEER: Final = re.compile(r"[a-z2-7]{26}")


def short(peer: PeerId) -> str:
    """The part of a peer's id that stands in rings: 130 bits, as hard to forge as the whole."""
    return peer[:ACTOR_PEER_CHARS]


@dataclass(frozen=True, slots=True, kw_only=True)
class RingKey:
    """One key, and who may be handed it. `number` counts the installs that this ring has seen; 0: it was there before."""

    id: str
    secret: bytes = field(repr=False)
    number: int = 0
    holders: tuple[str, ...] = ()  # `short` ids, sorted
    barred: tuple[str, ...] = ()  # who is never handed it, whatever `holders` says

    def __post_init__(self) -> None:
        """ValueError, which the decoder makes MalformedData, for what is no key of a ring."""
        if len(self.secret) != SECRET_BYTES or self.key.id != self.id:
            raise ValueError("the key does not fit its id")
        if not 0 <= self.number <= REVISION_MAX:
            raise ValueError("the number of a key is out of range")
        for peers in (self.holders, self.barred):
            _check_each(peers, _PEER, HOLDERS_MAX, "holders")
            _check_order(peers)

    @property
    def key(self) -> MeshKey:
        return MeshKey(self.secret)

    def is_for(self, peer: PeerId) -> bool:
        """Whether it may be handed to this peer."""
        return short(peer) in self.holders and not self.bars(peer)

    def bars(self, peer: PeerId) -> bool:
        """Whether a person said that this peer is to go without it."""
        return short(peer) in self.barred


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Use:
    """Which key is in use, and of which mesh it is; of two the greater one counts, under an order of every field."""

    revision: int
    peer: str  # who said so; empty at revision 0
    key: str
    mesh: str  # its first key's `mesh_id`, for ever

    def __post_init__(self) -> None:
        if not 0 <= self.revision <= REVISION_MAX:
            raise ValueError("the revision is out of range")
        _check_each((self.key,), _ID, 1, "ids")
        _check_each((self.mesh,), _MESH, 1, "meshes")
        _check_each((self.peer,) if self.peer else (), _PEER, 1, "peers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyring:
    """What one peer knows of the keys of its mesh. There is always at least one."""

    keys: tuple[RingKey, ...]  # by id
    removed: tuple[str, ...]  # sorted
    use: Use

    def __post_init__(self) -> None:
        if not 1 <= len(self.keys) <= RING_KEYS_MAX:
            raise ValueError(f"{len(self.keys)} keys, 1 to {RING_KEYS_MAX} are possible")
        _check_each(self.removed, _ID, REMOVED_MAX, "removed keys")
        _check_order(self.ids_sorted)
        _check_order(self.removed)
        if not set(self.ids_sorted).isdisjoint(self.removed):
            raise ValueError("a removed key is no key of the ring")

    @property
    def ids_sorted(self) -> tuple[str, ...]:
        return tuple(each.id for each in self.keys)

    @property
    def current(self) -> RingKey:
        """The key that this peer uses: the one that the register names; where that is not known here, the newest."""
        named = self.get(self.use.key)
        return named if named is not None else max(self.keys, key=lambda each: (each.number, each.id))

    @property
    def ordered(self) -> tuple[RingKey, ...]:
        """All keys: the one in use, then the newest first."""
        current = self.current
        others = sorted(self.keys, key=lambda each: (each.number, each.id), reverse=True)
        return (current, *(each for each in others if each.id != current.id))

    @property
    def pending(self) -> RingKey | None:
        """The newest key that is not in use yet: it was installed after the one that is."""
        newest = max(self.keys, key=lambda each: (each.number, each.id))
        return newest if newest.number > self.current.number else None

    @property
    def plain(self) -> bool:
        """Whether it says no more than one key does: that of a mesh which never changed its key, or of a newcomer."""
        return self == ring_of(self.current.key)

    @property
    def digest(self) -> str:
        """8 hex digits: equal in two peers if and only if their rings are. Says nothing about the secrets."""
        named = [[each.id, each.number, *each.holders, "", *each.barred] for each in self.keys]
        use = [self.use.revision, self.use.peer, self.use.key, self.use.mesh]
        text = "\n".join(" ".join(map(str, line)) for line in (*named, self.removed, use))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def get(self, key: str) -> RingKey | None:
        return next((each for each in self.keys if each.id == key), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one peer tells another of its ring: the secrets of those keys alone that the other may have."""

    held: tuple[str, ...]  # the ids of all keys of the sender, the one in use first
    keys: tuple[RingKey, ...]
    removed: tuple[str, ...]
    use: Use

    def __post_init__(self) -> None:
        _check_each(self.held, _ID, RING_KEYS_MAX, "keys")
        if not self.held:
            raise ValueError("a ring without keys")
        _check_each(self.removed, _ID, REMOVED_MAX, "removed keys")
        if len(self.keys) > RING_KEYS_MAX:
            raise ValueError("too many keys")


def ring_of(key: MeshKey) -> Keyring:
    """The ring of who knows one key and nothing else: the founder of a mesh, a newcomer."""
    entry = RingKey(id=key.id, secret=key.secret)
    return Keyring(keys=(entry,), removed=(), use=Use(revision=0, peer="", key=entry.id, mesh=key.mesh_id))


def merge(mine: Keyring, theirs: Keyring) -> Keyring:
    """What both know: commutative, associative and idempotent. MalformedData if no key would be left, or too many."""
    return _merged(mine, theirs.keys, theirs.removed, theirs.use)


def absorb(ring: Keyring, offer: Offer) -> Keyring:
    """The ring after another peer has told of its own. MalformedData if what it says makes no sense."""
    return _merged(ring, offer.keys, offer.removed, offer.use)


def offer(ring: Keyring, peer: PeerId, proven: Collection[str] = ()) -> Offer:
    """For this peer. `proven`: ids of keys that it has shown to have, by its certificate."""
    keys = tuple(each for each in ring.keys if each.id in proven or each.is_for(peer))
    return Offer(held=tuple(each.id for each in ring.ordered), keys=keys, removed=ring.removed, use=ring.use)


def install(
    ring: Keyring, me: PeerId, key: MeshKey | None, holders: Collection[PeerId], barred: Collection[PeerId], new: MeshKey
) -> tuple[Keyring, str]:
    """The ring with one key more, for these holders, and that key's id.

    Without a `key` the one that was installed before and is not in use yet, so that to repeat a command makes no second one;
    if there is none, or one of the `barred` may have it, `new`. UsageError for a key that was removed or is known to one of
    the `barred`; TaskFailed if the ring is full.
    """
    if key is None:
        pending = ring.pending
        key = new if pending is None or any(map(pending.is_for, barred)) else pending.key
    if key.id in ring.removed:
        raise _unknown(ring, key.id)
    known = ring.get(key.id)
    if known is None and len(ring.keys) >= KEYS_MAX:
        raise TaskFailed(
            f"this mesh has {len(ring.keys)} keys, at most {KEYS_MAX} are possible",
            f"first remove one that is not in use: {', '.join(each.id for each in ring.ordered[1:])}",
        )
    if known is not None and any(map(known.is_for, barred)):
        raise UsageError(f"the key {key.id} was handed to a machine that is to go without it", "install a new key")
    try:
        entry = known or RingKey(id=key.id, secret=key.secret, number=1 + max(each.number for each in ring.keys))
        entry = _joined(entry, replace(entry, holders=_sorted(map(short, holders)), barred=_sorted(map(short, barred))))
    except ValueError as error:
        raise TaskFailed(f"this ring of keys is full: {error}", "start a new mesh") from None
    keys = tuple(sorted((*(each for each in ring.keys if each.id != entry.id), entry), key=lambda each: each.id))
    # From the second key on the register is above that of any home that knows one key alone.
    claim = ring.use if ring.use.revision else Use(revision=1, peer=short(me), key=ring.current.id, mesh=ring.use.mesh)
    return replace(ring, keys=keys, use=claim), entry.id


def use(ring: Keyring, me: PeerId, key: str) -> Keyring:
    """The ring with this key in use. UsageError if it is not in the ring."""
    if ring.get(key) is None:
        raise _unknown(ring, key)
    if ring.use.key == key:
        return ring
    if ring.use.revision >= REVISION_MAX:
        raise TaskFailed(f"the key was changed {REVISION_MAX} times, more can't be counted", "start a new mesh")
    return replace(ring, use=Use(revision=ring.use.revision + 1, peer=short(me), key=key, mesh=ring.use.mesh))


def choose(ring: Keyring, key: str) -> Keyring:
    """As `use`, for a home that comes back to a mesh which has changed its key: it claims nothing, so the mesh's own
    register counts as soon as it is seen."""
    if ring.get(key) is None:
        raise _unknown(ring, key)
    return replace(ring, use=Use(revision=0, peer="", key=key, mesh=ring.use.mesh))


def remove(ring: Keyring, gone: Collection[str]) -> Keyring:
    """The ring without these keys, for ever. UsageError if one is in use, or unknown; to remove one again changes nothing."""
    for key in gone:
        if key == ring.current.id:
            raise UsageError(f"the key {key} is in use", "`meshq key use ID` with another one first")
        if ring.get(key) is None and key not in ring.removed:
            raise _unknown(ring, key)
    removed = _sorted((*ring.removed, *gone))
    if len(removed) > REMOVED_MAX:
        raise TaskFailed(f"this mesh has removed {REMOVED_MAX} keys, more can't be remembered", "start a new mesh")
    return replace(ring, keys=tuple(each for each in ring.keys if each.id not in gone), removed=removed)


def resolve(ring: Keyring, reference: str) -> str:
    """The id of a key of the ring, or of a removed one, that begins so. UsageError if that is none, or several."""
    wanted = reference.strip().lower()
    found = [key for key in (*ring.ids_sorted, *ring.removed) if wanted and key.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{reference!r} means {len(found)} keys: {', '.join(found[:KEYS_MAX])}", "give more of the id")
    if len(wanted) > len(ring.current.id):  # perhaps a key itself: it must not be repeated
        raise UsageError("that is no id of a key", "`meshq key list` shows the ids: 8 hex digits each")
    raise _unknown(ring, wanted)


def encode(ring: Keyring | Offer) -> bytes:
    return codec.encode(ring)


def decode(data: bytes) -> Keyring:
    """MalformedData for anything but a ring."""
    ring: Keyring = codec.decode(Keyring, data, bytes_max=RING_BYTES_MAX)
    return ring


def decode_offer(data: bytes) -> Offer:
    """MalformedData for anything but an offer."""
    read: Offer = codec.decode(Offer, data, bytes_max=RING_BYTES_MAX)
    return read


def _merged(ring: Keyring, keys: Iterable[RingKey], removed: Iterable[str], claim: Use) -> Keyring:
    gone = _sorted((*ring.removed, *removed))
    found = {each.id: each for each in ring.keys}
    try:
        for each in keys:
            found[each.id] = _joined(found[each.id], each) if each.id in found else each
        left = tuple(found[key] for key in sorted(found) if key not in gone)
        return Keyring(keys=left, removed=gone, use=max(ring.use, claim))
    except ValueError as error:
        raise MalformedData(f"a ring that can't be: {error}") from None


def _joined(mine: RingKey, theirs: RingKey) -> RingKey:
    return replace(
        mine,
        number=max(mine.number, theirs.number),
        holders=_sorted((*mine.holders, *theirs.holders)),
        barred=_sorted((*mine.barred, *theirs.barred)),
    )


def _sorted(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(words)))


def _unknown(ring: Keyring, key: str) -> UsageError:
    if key in ring.removed:
        return UsageError(f"the key {key} was removed from this mesh: it is never accepted again", "install a new one")
    return UsageError(f"this mesh has no key {key}", f"it has {', '.join(each.id for each in ring.ordered)}")


def _check_each(words: Collection[str], form: re.Pattern[str], most: int, what: str) -> None:
    if len(words) > most:
        raise ValueError(f"{len(words)} {what}, at most {most} are possible")
    if not all(form.fullmatch(word) for word in words):
        raise ValueError(f"{what} have another form")


def _check_order(words: tuple[str, ...]) -> None:
    if words != _sorted(words):
        raise ValueError("not in order, or not each once")
