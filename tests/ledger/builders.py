"""Values for tests, of which a test states only what it cares about."""

import base64
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from random import Random
from typing import Any

from meshq.ids import ActorId, Dot, PeerId, actor_id
from meshq.ledger.core import Ledger
from meshq.ledger.effects import PeerView, SendSync, SyncOffer
from meshq.ledger.row import Fact, NumberRegister, Row, TextRegister
from meshq.ledger.timing import LAN, LedgerConfig
from meshq.task import EndKind, Outcome, TaskSpec, Telemetry


def peer(name: str) -> PeerId:
    """A well-formed peer id that is always the same for this name."""
    return PeerId(base64.b32encode(hashlib.sha256(name.encode()).digest()).decode().rstrip("=").lower()[:52])


def actor(name: str, ledger_epoch: int = 1) -> ActorId:
    return actor_id(peer(name), ledger_epoch)


def dot(name: str, seq: int) -> Dot:
    return Dot(actor(name), seq)


def spec(name: str = "train", **more: Any) -> TaskSpec:
    values: dict[str, Any] = {
        "name": name, "argv": ("train.py",), "submitted_by": "ann@a", "submitted_at": 1.0, "submitted_peer": peer("a"),
    }  # fmt: skip
    return TaskSpec(**(values | more))


def row(*facts: tuple[Dot, Fact], birth: Dot | None = None, **spec_fields: Any) -> Row:
    """A row with these facts, and the vector that covers exactly them."""
    first = birth or dot("a", 1)
    vector: dict[ActorId, int] = {first.actor: first.seq}
    for at, _ in facts:
        vector[at.actor] = max(vector.get(at.actor, 0), at.seq)
    what = spec(**spec_fields)
    return Row(
        birth=first,
        spec=what,
        vector=vector,
        queue=TextRegister(1, first.actor, what.queue),
        position=NumberRegister(1, first.actor, 1),
        priority=NumberRegister(1, first.actor, what.priority),
        facts=tuple(sorted(facts, key=lambda fact: fact[0])),
    )


def outcome(kind: EndKind = EndKind.SUCCEEDED, **more: Any) -> Outcome:
    codes = {EndKind.SUCCEEDED: 0, EndKind.FAILED: 1}
    return Outcome(**({"kind": kind, "exit_code": codes.get(kind), "ended_at": 2.0} | more))


def telemetry(**more: Any) -> Telemetry:
    """A machine with one slot that serves the default queue."""
    values: dict[str, Any] = {
        "queues": ("default",), "cpus": 8, "cpus_free": 8, "memory_bytes": 2**34, "memory_free_bytes": 2**34, "ledger_epoch": 1,
    }  # fmt: skip
    return Telemetry(**(values | more))


def view(name: str, told: Telemetry | None = None, **more: Any) -> PeerView:
    values: dict[str, Any] = {"alive": True, "telemetry": told or telemetry()}
    return PeerView(peer=peer(name), name=name, **(values | more))


def views(*all_of_them: PeerView) -> Mapping[PeerId, PeerView]:
    return {one.peer: one for one in all_of_them}


def ledger(name: str = "a", rows: Iterable[Row] = (), *, config: LedgerConfig = LAN, now: float = 0.0, **more: Any) -> Ledger:
    """A core as it is before `adopt`.

    Unless `confirmed` is False nobody has to answer before it writes (`authorship.py`), and it is free to vote (`grants.py`).
    """
    known = tuple(rows)
    mine = max((one.vector.get(actor(name), 0) for one in known), default=0)
    values: dict[str, Any] = {"vector": {actor(name): mine} if mine else {}, "floors": {}, "rng": Random(1)}
    confirmed = more.pop("confirmed", True)
    core = Ledger(peer(name), 1, config, known, now=now, **(values | {"new_actor": confirmed} | more))
    if confirmed:
        core._authorship._confirmed = True
    return core


def nothing_new(asked: SendSync) -> SyncOffer:
    """The answer of a donor that knows nothing more."""
    return SyncOffer(number=asked.question.number, run=1)


def busy(told: Telemetry) -> Telemetry:
    return replace(told, slots_free=0)
