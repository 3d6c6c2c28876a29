"""`meshq doctor`: what could keep this peer from doing its work, checked now, each finding with its fix.

The checks are functions of facts. `measure` looks at what must be looked at anew, `gather` adds what the agent knows, `examine`
judges. The same happens once at `join`, which tells what it found without waiting for it longer than a moment.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from meshq.doctor import host, mesh, network
from meshq.doctor.facts import Check, Facts, KeyRing, Measured
from meshq.doctor.gathering import gather, key_ring
from meshq.doctor.measuring import find_uv, measure

__all__ = [
    "CHECKS", "Check", "Facts", "KeyRing", "Measured",
    "examine", "find_uv", "findings", "gather", "key_ring", "measure", "to_document",
]  # fmt: skip

CHECKS: Final[tuple[Callable[[Facts], Check], ...]] = (
    mesh.peers, mesh.identity, mesh.name, mesh.version, mesh.profile, mesh.clock, mesh.keys,
    network.udp, network.tcp, network.discovery, network.addresses,
    mesh.flapping, host.health, host.files, host.disk, host.ledger, host.gpus, host.docker, host.environments, host.git,
    host.isolation, host.user, host.claims,
)  # fmt: skip
"""In the order in which they are shown; each is called what its check is called."""

TOLD_AT_JOIN_ANYWAY: Final = ("user",)  # among the warnings that `join` prints


def examine(facts: Facts) -> list[Check]:
    """All checks."""
    return [check(facts) for check in CHECKS]


def findings(checks: Sequence[Check]) -> list[dict[str, object]]:
    """What `join` tells when it is ready: all that is not ok."""
    return [_document(check) for check in checks if not check.ok and check.name not in TOLD_AT_JOIN_ANYWAY]


def to_document(checks: Sequence[Check], counters: Mapping[str, int]) -> dict[str, object]:
    """The document of the contract."""
    return {"checks": [_document(check) for check in checks], "counters": dict(sorted(counters.items()))}


def _document(check: Check) -> dict[str, object]:
    return {"name": check.name, "ok": check.ok, "detail": check.detail, "fix": check.fix or None}
