"""What the doctor looks at and what it says, as plain values: each check is a function of these, so made-up ones test it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from meshq.gossip.addresses import Interface
from meshq.gossip.connectivity import Connectivity
from meshq.gossip.member import Address, Liveness, Member
from meshq.ids import PeerId
from meshq.peers import is_alive
from meshq.task import Telemetry

NAMED_MAX: Final = 6  # peers that one line names; three hundred names help nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding. `detail` says what was found and why it matters, `fix` what to do; a check that is ok has none."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def fine(name: str, detail: str) -> Check:
    return Check(name=name, ok=True, detail=detail)


def wrong(name: str, detail: str, fix: str) -> Check:
    return Check(name=name, ok=False, detail=detail, fix=fix)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A multicast packet that was sent on one interface. `problem`: why it could not even be sent. `heard`: how many other
    machines' mDNS was heard meanwhile."""

    interface: str
    host: str
    came_back: bool = False
    problem: str = ""
    heard: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Docker:
    """A docker daemon. `path`: its socket, empty if there is none. `problem`: why it is of no use to this user."""

    path: str = ""
    version: str = ""
    problem: str = ""
    denied: bool = False
    wanted: bool = False  # tasks are to run in containers here


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The file system of the home. None: not known, or (files) it has no such limit."""

    free_bytes: int | None = None
    free_files: int | None = None
    kind: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Open files of the agent; 0 for what is not known."""

    open: int = 0
    limit: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was looked at just now, each within its time limit. The defaults stand for what could not be found out."""

    interfaces: Sequence[Interface] = ()
    probes: Sequence[Probe] = ()
    docker: Docker = Docker()
    disk: Disk = Disk()
    files: Files = Files()
    git: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRing:
    """The mesh keys by their public ids: the one that the mesh uses, as far as is known here, and those that this peer has.

    `lacking`: names of live peers that do not report the one in use. `strangers`: how many of those that were called answered
    with a key that is unknown here.
    """

    in_use: str
    held: Sequence[str]
    lacking: Sequence[str] = ()
    strangers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the agent knows. `members` are all that gossip told of, this peer included; `remembered` are peers of an earlier run
    that have not shown up since. `links`: how each other live peer is reached. `clocks`: for peers whose telemetry says it,
    seconds by which their clock is ahead of this one's. `other_meshes`: where somebody has another mesh key."""

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
    remembered: Sequence[Member] = ()
    other_meshes: Sequence[str] = ()
    links: Mapping[PeerId, Connectivity] = field(default_factory=dict)
    clocks: Mapping[PeerId, float] = field(default_factory=dict)
    keys: KeyRing | None = None
    clone: Member | None = None
    silent: bool = False
    damped_seconds: float = 0.0
    health: int = 0
    stalls: int = 0  # since the agent started
    running_seconds: float = 0.0  # since then
    udp_received: int | None = None
    tcp_accepted: int | None = None  # connections of others to the peer port
    port: int = 0
    bind: str = ""  # in the form of `normal_bind`
    profile: str = "lan"
    profiles: Mapping[PeerId, str] = field(default_factory=dict)  # those of the others that say theirs
    wanted_name: str = ""
    gpus_wanted: bool = True
    gpu_faults: Mapping[int, str] = field(default_factory=dict)  # of those that may be given to tasks
    sampled: bool = True  # the machine was measured; in the first moment of an agent it is not yet
    measured: Measured = Measured()
    damage: Mapping[str, int] = field(default_factory=dict)  # of the ledger on disk, since the agent started

    def others_alive(self) -> list[Member]:
        return [member for member in self.members if is_alive(member) and member.peer != self.me.peer]

    def gone(self) -> list[Member]:
        """Those that should be here and do not answer."""
        return [member for member in (*self.members, *self.remembered) if member.liveness is Liveness.DEAD]

    def names(self, peers: Collection[PeerId]) -> str:
        """The names of these peers, for a line of text."""
        return named([member.name for member in self.members if member.peer in peers])


def named(names: Collection[str], most: int = NAMED_MAX) -> str:
    """`ada, bob, cyd and 7 more`."""
    shown = sorted(names)[:most]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
