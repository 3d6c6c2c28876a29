"""Where things are and how big they may get: the only reader of the environment, and every limit with its name.

Each limit says its unit in its name and its reason beside it; `docs/operations.md` prints this table from here.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshq import failpoints
from meshq.errors import StoreError, UsageError

PORT_DEFAULT: Final = 7733
PACKET_BYTES_MAX: Final = 1_200  # QUIC's safe datagram: never fragmented on IPv4, IPv6 or a VPN
PACKET_BYTES_MIN: Final = 52
PACKET_ITEMS_MAX: Final = 256
SYNC_BYTES_MAX: Final = 2**20  # one push/pull or one page of a ledger sync
SYNC_ROWS_MAX: Final = 500
BODY_ITEMS_MAX: Final = 2**19  # values in one message; an empty array is one byte on the wire and 70 in memory
MEMBERS_MAX: Final = 1_024
RECORD_BYTES_MAX: Final = 1_000  # telemetry of one peer: must fit one packet
NAME_CHARS_MAX: Final = 63
ADDRESSES_MAX: Final = 8
LABELS_MAX: Final = 32  # that one task may ask for
REPLAY_WINDOW: Final = 1_024  # packets; Nebula 8,192, WireGuard 8,192, memberlist none
REPLAY_SENDERS_MAX: Final = 4_096
UNAUTHENTICATED_PER_SECOND: Final = 200  # packets from one address that do not open
UNAUTHENTICATED_SOURCES_MAX: Final = 1_024
CONNECTIONS_PER_ADDRESS_MAX: Final = 32
CONNECTIONS_MAX: Final = 512
HANDSHAKES_MAX: Final = 64
HANDSHAKE_SECONDS: Final = 5.0
FIRST_REQUEST_SECONDS: Final = 10.0
KEEPALIVE_SECONDS: Final = 75.0
TLS_READ_BYTES: Final = 16 * 1024  # asyncio keeps so much for each connection; its own 256 KiB took 15 MiB among 30 peers
REQUESTS_MAX: Final = 256
REQUESTS_PER_PEER_MAX: Final = 64
JSON_BYTES_MAX: Final = 256 * 1024
SPEC_BYTES_MAX: Final = 64 * 1024
ENV_BYTES_MAX: Final = 32 * 1024
ARGV_BYTES_MAX: Final = 32 * 1024
LOCK_BYTES_MAX: Final = 256 * 1024  # a lock file travels as an object of the source, not inside the spec
TASKS_LIVE_MAX: Final = 100_000
ARRAY_TASKS_MAX: Final = 10_000
SOURCE_FILE_BYTES_MAX: Final = 64 * 2**20
SOURCE_BYTES_MAX: Final = 512 * 2**20
SOURCE_FILES_MAX: Final = 50_000
OBJECTS_BATCH_BYTES: Final = 4 * 2**20
OUTPUT_FILES_IN_ROW_MAX: Final = 100
OUTPUT_FILES_MAX: Final = 20_000
LOG_BYTES_MAX: Final = 64 * 2**20  # of one attempt: head 8 MiB and tail 56 MiB
LOG_CHUNK_BYTES: Final = 64 * 1024
AGENT_LOG_BYTES_MAX: Final = 10 * 2**20
AGENT_LOG_FILES: Final = 5
RESERVE_BYTES: Final = 8 * 2**20  # given back to the file system when a commit meets a full disk
DISK_FREE_BYTES_MIN: Final = 512 * 2**20  # below this a peer claims nothing; below half of it it accepts nothing
RETRIES_MAX: Final = 100
SLOTS_MAX: Final = 1_024
PRIORITY_MAX: Final = 1_000
INFRASTRUCTURE_LOSSES_MAX: Final = 5  # claims that were lost with their machine or process: the task takes them down (poison)
RELEASES_MAX: Final = 50  # claims that could not be prepared anywhere; with the growing pauses between them half a day

TASK_VARIABLES: Final = (
    "MESHQ_TASK_ID", "MESHQ_TASK_NAME", "MESHQ_ATTEMPT", "MESHQ_FENCE",
    "MESHQ_QUEUE", "MESHQ_PEER", "MESHQ_OUTPUT_DIR", "MESHQ_ARRAY_INDEX",
)  # fmt: skip
"""All that a task sees of meshq in its environment (contract); every other `MESHQ_*` is taken away."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)I?B?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SECONDS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class Home:
    """The folder of one agent, and the name of every file in it. Nothing else makes paths inside it."""

    root: Path

    @property
    def key(self) -> Path:
        """The mesh key, 0600."""
        return self.root / "trust" / "mesh.key"

    @property
    def identity(self) -> Path:
        """This peer's Ed25519 private key, 0600."""
        return self.root / "trust" / "identity.key"

    @property
    def cookie(self) -> Path:
        """The secret that the CLI shows to the agent; 0600, or 0640 with a group."""
        return self.root / "control" / "cookie"

    @property
    def socket(self) -> Path:
        return self.root / "control" / "socket"

    @property
    def lock(self) -> Path:
        """Held by the running agent: two agents never share a home."""
        return self.root / "agent.lock"

    @property
    def settings(self) -> Path:
        """The options of the last `join`, so that a bare `join` starts the same agent again."""
        return self.root / "settings.json"

    @property
    def epoch(self) -> Path:
        return self.root / "epoch"

    @property
    def name(self) -> Path:
        """What this peer was called last."""
        return self.root / "name.json"

    @property
    def known_peers(self) -> Path:
        """Snapshot of members, alive and failed."""
        return self.root / "peers.snapshot"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.sqlite"

    @property
    def ledger_epoch(self) -> Path:
        """Counts the databases that this home had, so that a deleted one is noticed."""
        return self.root / "ledger.epoch"

    @property
    def reserve(self) -> Path:
        return self.root / "reserve"

    @property
    def objects(self) -> Path:
        """A bare git repository: the content-addressed store of sources."""
        return self.root / "objects.git"

    @property
    def environments(self) -> Path:
        return self.root / "environments"

    @property
    def package_cache(self) -> Path:
        return self.root / "packages"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def kept(self) -> Path:
        """Logs and outputs of attempts that ran elsewhere."""
        return self.root / "kept"

    @property
    def log(self) -> Path:
        return self.root / "agent.log"

    @property
    def events(self) -> Path:
        """What the agent did, for proofs; only if MESHQ_EVENTS is set."""
        return self.root / "events.jsonl"

    @property
    def deaths(self) -> Path:
        """At which failpoints processes of this home died; only if MESHQ_FAILPOINT is set."""
        return self.root / "failpoints.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Switches:
    """What tests and soaks set and nobody else: where to die, and whether to write the log of events."""

    failpoints: str = ""
    events: bool = False


def switches_from_environment(environ: Mapping[str, str] = os.environ) -> Switches:
    """MESHQ_FAILPOINT and MESHQ_EVENTS, which an agent reads once at its start. UsageError if a failpoint makes no sense."""
    text = environ.get("MESHQ_FAILPOINT", "")
    try:
        failpoints.parse(text)
    except ValueError as error:
        raise UsageError(
            f"MESHQ_FAILPOINT: {str(error)!r} is no failpoint",
            f"write NAME:NTH or NAME:pPERCENT; names: {', '.join(failpoints.POINTS)}",
        ) from None
    return Switches(failpoints=text, events=environ.get("MESHQ_EVENTS", "") not in ("", "0"))


def home_from_environment(environ: Mapping[str, str] = os.environ) -> Home:
    """`$MESHQ_HOME`, else the user's data folder."""
    if chosen := environ.get("MESHQ_HOME"):
        return Home(Path(chosen).absolute())
    data = environ.get("XDG_DATA_HOME") or os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".local/share")
    return Home(Path(data) / "meshq")


def key_from_environment(environ: Mapping[str, str] = os.environ) -> str | None:
    """The mesh key in `$MESHQ_KEY`, if there is one."""
    return environ.get("MESHQ_KEY")


def parse_size(text: str, what: str) -> int:
    """Bytes in `4096`, `512M`, `1.5G`, `2GiB` (powers of 1024). UsageError otherwise."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{what}: {text!r} is no size", "write bytes or a unit, such as 512M or 16G")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def parse_duration(text: str, what: str) -> float:
    """Seconds in `90`, `90s`, `15m`, `2h`, `1d` or `1:30:00`. UsageError otherwise."""
    parts = text.strip().split(":")
    if 2 <= len(parts) <= 3 and all(part.isdigit() for part in parts):
        return float(sum(int(part) * 60**power for power, part in enumerate(reversed(parts))))
    match = _DURATION.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"{what}: {text!r} is no duration", "write seconds or a unit, such as 90s, 15m, 2h or 1:30:00")
    return float(match[1]) * _SECONDS[match[2].lower()]


def check_room(folder: Path, doing: str, wanted: int = 0) -> None:
    """StoreError if with `wanted` bytes more the disk were so full that the ends of tasks could soon not be recorded."""
    try:
        usage = os.statvfs(folder)
    except OSError as error:
        raise StoreError(f"{doing}: cannot look at the disk of {folder}: {error.strerror}") from None
    free = usage.f_bavail * usage.f_frsize
    if free - wanted < DISK_FREE_BYTES_MIN // 2:
        what = f"there are {wanted >> 20} MiB to store" if wanted else "nothing was stored"
        raise StoreError(
            f"{doing}: the disk of {folder} is nearly full ({free >> 20} MiB free); {what}",
            f"free {DISK_FREE_BYTES_MIN >> 20} MiB on it, or submit from another machine",
        )


def shortened(text: str) -> str:
    """What somebody typed, as far as a message shows it."""
    return text if len(text) <= NAME_CHARS_MAX else f"{text[:NAME_CHARS_MAX]}…"


def check_name(text: str, what: str) -> str:
    """A name for a queue, a peer, a label or a task: letters, digits, `.`, `_`, `-`. UsageError otherwise."""
    if _NAME.fullmatch(text) is None or len(text) > NAME_CHARS_MAX:
        raise UsageError(
            f"{what}: {shortened(text)!r} is no name",
            f"use at most {NAME_CHARS_MAX} letters, digits, '.', '_' or '-', beginning with a letter or digit",
        )
    return text
