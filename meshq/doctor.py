"""`meshq doctor`: what could keep this peer from doing its work, checked now, each with its fix.

The checks are functions of a few facts that the agent hands in, so that each can be tested with made-up facts.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshq import config
from meshq.errors import TaskFailed
from meshq.gossip.member import Address, Liveness, Member
from meshq.packages import uv_binary
from meshq.peers import is_alive
from meshq.task import Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding. `detail` says what was found and, if it is not ok, what to do."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the agent knows."""

    me: Member
    members: Sequence[Member]
    telemetry: Telemetry
    home: Path
    uid: int
    group: str | None
    mdns: bool
    mdns_problem: str
    gpu_state: str
    landlock_abi: int
    uv: str | None
    addresses: Sequence[Address]


def examine(facts: Facts) -> list[Check]:
    """All checks, in the order in which they are shown."""
    checks: tuple[Callable[[Facts], Check], ...] = (
        _peers, _discovery, _addresses, _names, _versions, _disk, _gpus, _environments, _git, _isolation, _user, _claims,
    )  # fmt: skip
    return [check(facts) for check in checks]


def _peers(facts: Facts) -> Check:
    gone = [member.name for member in facts.members if member.liveness is Liveness.DEAD]
    alive = sum(1 for member in facts.members if is_alive(member))
    if gone:
        return Check(name="peers", ok=False, detail=f"{alive} alive; these do not answer: {', '.join(sorted(gone))}")
    if alive == 1:
        detail = f"alone: on another machine run `meshq join --seed {_seed(facts)}` with the key that `meshq key` prints"
        return Check(name="peers", ok=False, detail=detail)
    return Check(name="peers", ok=True, detail=f"{alive} alive")


def _seed(facts: Facts) -> str:
    return str(facts.addresses[0]) if facts.addresses else "HOST:PORT"


def _discovery(facts: Facts) -> Check:
    if not facts.mdns:
        return Check(name="discovery", ok=True, detail="mDNS is off (--no-mdns); peers are found by --seed and by memory")
    if facts.mdns_problem:
        return Check(name="discovery", ok=False, detail=f"mDNS does not work: {facts.mdns_problem}; use --seed HOST:PORT")
    return Check(name="discovery", ok=True, detail="mDNS announces and listens")


def _addresses(facts: Facts) -> Check:
    if not facts.addresses:
        return Check(name="addresses", ok=False, detail="no network interface is up; others cannot reach this peer")
    return Check(name="addresses", ok=True, detail=f"reachable as {', '.join(map(str, facts.addresses))}, UDP and TCP")


def _names(facts: Facts) -> Check:
    twins = [member for member in facts.members if member.name == facts.me.name and member.peer != facts.me.peer]
    if twins:
        return Check(
            name="name", ok=False, detail=f"another peer is called {facts.me.name}, too; choose one with `join --name`"
        )
    return Check(name="name", ok=True, detail=facts.me.name)


def _versions(facts: Facts) -> Check:
    others = {member.version for member in facts.members if is_alive(member) and member.version} - {facts.me.version}
    if others:
        return Check(name="version", ok=False, detail=f"this peer has {facts.me.version}, others {', '.join(sorted(others))}")
    return Check(name="version", ok=True, detail=facts.me.version)


def _disk(facts: Facts) -> Check:
    free = shutil.disk_usage(facts.home).free
    text = f"{free / 2**30:.1f} GiB free in {facts.home}"
    if free < config.DISK_FREE_BYTES_MIN:
        return Check(name="disk", ok=False, detail=f"{text}: no task is claimed below {config.DISK_FREE_BYTES_MIN >> 20} MiB")
    return Check(name="disk", ok=True, detail=text)


def _gpus(facts: Facts) -> Check:
    count = len(facts.telemetry.gpus)
    if count:
        foreign = sum(1 for gpu in facts.telemetry.gpus if gpu.foreign_pids)
        return Check(name="gpus", ok=True, detail=f"{count} seen, {foreign} used by other processes")
    return Check(name="gpus", ok=True, detail=f"none: {facts.gpu_state}")


def _environments(facts: Facts) -> Check:
    if facts.uv is None:
        return Check(name="environments", ok=False, detail="uv is missing; reinstall meshq in a fresh virtual environment")
    return Check(name="environments", ok=True, detail=f"uv at {facts.uv}")


def _git(facts: Facts) -> Check:
    found = shutil.which("git")
    return Check(name="git", ok=True, detail=f"{found}" if found else "no git; dulwich does its work, slower on large trees")


def _isolation(facts: Facts) -> Check:
    if facts.landlock_abi < 1:
        detail = "this kernel has no Landlock: tasks can read the mesh key in the home"
        return Check(name="isolation", ok=False, detail=detail)
    return Check(name="isolation", ok=True, detail=f"tasks do not see the home (Landlock ABI {facts.landlock_abi})")


def _user(facts: Facts) -> Check:
    if facts.uid == 0:
        detail = "the agent runs as root, and so does every task: better join as a user of its own"
        return Check(name="user", ok=False, detail=detail)
    shared = f"; members of group {facts.group} may submit here, too" if facts.group else ""
    return Check(name="user", ok=True, detail=f"tasks run as uid {facts.uid}{shared}")


def _claims(facts: Facts) -> Check:
    if facts.telemetry.problem:
        return Check(name="claims", ok=False, detail=f"this peer claims nothing: {facts.telemetry.problem}")
    if facts.telemetry.draining:
        return Check(name="claims", ok=True, detail="this peer is draining: it finishes what runs and claims nothing")
    return Check(name="claims", ok=True, detail=f"serves {', '.join(facts.telemetry.queues) or 'no queue'}")


def to_document(checks: Sequence[Check], counters: Mapping[str, int]) -> dict[str, object]:
    """The document of the contract."""
    return {
        "checks": [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in checks],
        "counters": dict(sorted(counters.items())),
    }


def find_uv() -> str | None:
    """The uv binary that builds environments."""
    try:
        return uv_binary()
    except TaskFailed:
        return None
