"""Writes what this version says, for those that come later to read. `python -m tests.golden.make FORMAT`, by `scripts/golden`.

One folder for each format that was ever released; a file in it is never written again, since it stands for what is on disks
and on the way. `values.json` beside the files says what each must decode to; `tests/gossip/test_golden.py` decodes them
all.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from meshq import codec
from meshq.gossip import snapshot, wire
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.roster import KnownPeer
from meshq.gossip.wire import (
    Ack,
    DigestEntry,
    GossipOnly,
    Message,
    Nack,
    Packet,
    Ping,
    PingRequest,
    Record,
    Rumor,
    SyncReply,
    SyncRequest,
)
from meshq.ids import Epoch, PeerId, peer_id
from meshq.trust.seal import Sealer
from tests.golden import ledger_database
from tests.gossip.builders import pack_digest

FOLDER: Final = Path(__file__).parent / "gossip"
GOSSIP_KEY: Final = bytes(range(32))
SUBKEY_ID: Final = bytes(range(100, 116))
SAVED_AT: Final = 1_750_000_000.0

A, B, C = (peer_id(name * 32) for name in (b"a", b"b", b"c"))


def member(peer: PeerId, liveness: Liveness, name: str) -> Member:
    return Member(
        peer=peer, epoch=Epoch(7), incarnation=3, liveness=liveness, name=name,
        addresses=(Address("192.0.2.1", 7733), Address("2001:db8::1", 7734)), version="0.1.0",
        started_at=1_750_000_000, boot=2**62 + 1, named=3,
    )  # fmt: skip


RUMORS: Final = (
    Rumor(member(B, Liveness.SUSPECT, "lab-2"), (wire.observer(A), wire.observer(C))),
    Rumor(member(C, Liveness.DEAD, "lab-3"), (wire.observer(A),), 86_400),
)
RECORDS: Final = (Record(A, Epoch(7), 12, 3_456, b"telemetry"), Record(B, Epoch(1), 2**32 - 1, 0, b""))
DIGEST: Final = pack_digest([DigestEntry(wire.short_id(A), 7, 12), DigestEntry(wire.short_id(B), 0, 0)])
MESSAGES: Final[dict[str, Message]] = {
    "ping": Ping(2**32 - 1, B), "ack": Ack(0), "ping-request": PingRequest(5, C), "nack": Nack(6), "gossip-only": GossipOnly(),
}  # fmt: skip


def packets() -> dict[str, Packet]:
    """One of each kind, bare, and one with everything that may ride on it."""
    bare = {name: Packet(A, Epoch(7), message) for name, message in MESSAGES.items()}
    return bare | {"full": Packet(A, Epoch(7), Ping(1, B), RUMORS, DIGEST, RECORDS, b"note of the ledger")}


def syncs() -> dict[str, SyncRequest | SyncReply]:
    me = member(A, Liveness.ALIVE, "lab-1")
    return {
        "sync-request": SyncRequest(me, RUMORS, RECORDS),
        "sync-question": SyncRequest(me, (), (), bytes(range(wire.VIEW_BYTES))),
        "sync-reply": SyncReply(me, RUMORS, RECORDS),
        "sync-same": SyncReply(me, (), (), same=True),
    }


def known_peers() -> tuple[KnownPeer, ...]:
    where = (Address("192.0.2.7", 7733), Address("2001:db8::7", 7733))
    return (
        KnownPeer(peer=B, name="lab-2", addresses=where, unseen_for=0.0, record=b"telemetry"),
        KnownPeer(peer=C, name="lab-3", addresses=(), unseen_for=3600.0, record=b""),
    )


def files() -> tuple[dict[str, bytes], dict[str, Any]]:
    """What to write, and what each decodes to."""
    sealer = Sealer(GOSSIP_KEY, SUBKEY_ID)
    data: dict[str, bytes] = {}
    values: dict[str, Any] = {}
    for name, packet in packets().items():
        data[f"packet-{name}"], values[f"packet-{name}"] = codec.encode(packet), plain(packet)
        data[f"sealed-{name}"], values[f"sealed-{name}"] = sealer.seal(codec.encode(packet)), {"opens to": f"packet-{name}"}
    for name, message in syncs().items():
        data[name], values[name] = codec.encode(message), plain(message)
    with tempfile.TemporaryDirectory() as folder:
        snapshot.save(Path(folder) / "snapshot", known_peers(), SAVED_AT)
        data["snapshot"] = (Path(folder) / "snapshot").read_bytes()
    values["snapshot"] = [plain(known) for known in known_peers()]
    return data, values


def plain(value: object) -> Any:
    """For JSON, with the names of classes and fields: it must be readable when the classes have changed."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value


def write(folder: Path) -> list[str]:
    """Make a folder for a new format; the names of its files. FileExistsError: nothing is ever written twice."""
    data, values = files()
    folder.mkdir(parents=True)
    for name, content in data.items():
        (folder / f"{name}.bin").write_bytes(content)
    (folder / "values.json").write_text(json.dumps(values, indent=1) + "\n", "utf-8")
    return sorted(data)


def unchanged(folder: Path) -> bool:
    """Does this version write just what is there?"""
    return all((folder / f"{name}.bin").read_bytes() == content for name, content in files()[0].items())


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not arguments[0].replace(".", "").replace("-", "").isalnum():
        print("usage: scripts/golden FORMAT    (such as 0.2.0)", file=sys.stderr)
        return 2
    if ledger_database.keep():
        print("Kept a database of a new schema in tests/golden/ledger; commit it.")
    for folder in sorted(FOLDER.iterdir()) if FOLDER.exists() else ():
        if {path.stem for path in folder.glob("*.bin")} == set(files()[0]) and unchanged(folder):
            print(f"This version writes what {folder.name} has: nothing new to keep.")
            return 0
    try:
        names = write(FOLDER / arguments[0])
    except FileExistsError:
        print(f"{FOLDER / arguments[0]} is there, and this version writes something else: name a new format.", file=sys.stderr)
        return 1
    print(f"Wrote {len(names)} files and values.json to {FOLDER / arguments[0]}; commit them.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
