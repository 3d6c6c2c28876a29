"""What was ever put on the wire or on a disk is read for ever, and means what it meant."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest

from meshq.gossip import snapshot, wire
from meshq.ids import Epoch
from meshq.trust.seal import Opener, key_id
from tests.golden import make

RENAMED = {"accusers": "observers"}  # fields that are called otherwise here since the files were written
FORMATS = sorted(folder for folder in make.FOLDER.iterdir())
FILES = [file for folder in FORMATS for file in sorted(folder.glob("*.bin"))]


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}" if path.suffix else path.name


def differences(recorded: Any, value: Any, place: str = "") -> list[str]:
    """Where a decoded value is not what was recorded. Fields that came later must have their defaults."""
    if isinstance(recorded, dict) and "hex" in recorded:
        return [] if value == bytes.fromhex(recorded["hex"]) else [f"{place}: {value!r}"]
    if isinstance(recorded, dict):
        named = [place] if hasattr(value, "TAG") and type(value).__name__ != recorded["class"] else []
        fields = {field.name: field for field in dataclasses.fields(value)}
        told = {RENAMED.get(name) or name: item for name, item in recorded.items() if name != "class"}
        late = [name for name in fields if name not in told and getattr(value, name) != fields[name].default]
        inner = [each for name, item in told.items() for each in differences(item, getattr(value, name), f"{place}.{name}")]
        return [*named, *(f"{place}.{name} is no default" for name in late), *inner]
    if isinstance(recorded, list):
        if len(recorded) != len(value):
            return [f"{place}: {len(value)} items"]
        pairs = enumerate(zip(recorded, value, strict=True))
        return [each for number, pair in pairs for each in differences(*pair, f"{place}[{number}]")]
    return [] if value == recorded else [f"{place}: {value!r}"]


def read(path: Path) -> object:
    if path.stem.startswith("packet"):
        return wire.read_packet(path.read_bytes())
    if path.stem in ("sync-request", "sync-question"):
        return wire.read_sync_request(path.read_bytes())
    if path.stem in ("sync-reply", "sync-same"):
        return wire.read_sync_reply(path.read_bytes())
    assert path.stem == "snapshot", "a new kind of file needs a reader here"
    return snapshot.load(path, make.SAVED_AT)


@pytest.mark.parametrize("path", [file for file in FILES if not file.stem.startswith("sealed")], ids=name_of)
def test_it_still_means_what_it_meant(path: Path) -> None:
    recorded = json.loads((path.parent / "values.json").read_text("utf-8"))[path.stem]
    assert differences(recorded, read(path)) == []


@pytest.mark.parametrize("folder", FORMATS, ids=name_of)
def test_sealed_packets_still_open(folder: Path) -> None:
    opener = Opener({key_id(make.GOSSIP_KEY): make.GOSSIP_KEY})
    sealed = sorted(folder.glob("sealed-*.bin"))
    assert sealed
    for path in sealed:
        plain = path.with_name(path.name.replace("sealed", "packet"))
        assert opener.open(path.read_bytes()) == plain.read_bytes(), path.name


@pytest.mark.parametrize("folder", FORMATS, ids=name_of)
def test_each_file_has_its_value_and_each_value_its_file(folder: Path) -> None:
    assert set(json.loads((folder / "values.json").read_text("utf-8"))) == {path.stem for path in folder.glob("*.bin")}


def test_what_this_version_says_was_kept() -> None:
    """Who changes the wire keeps an example of it: scripts/golden FORMAT."""
    assert any(
        make.unchanged(folder) for folder in FORMATS if {file.stem for file in folder.glob("*.bin")} == set(make.files()[0])
    )


def test_the_examples_use_every_field_and_every_kind() -> None:
    """What stays at its default in all examples could change its meaning unseen."""
    unused: dict[str, set[str]] = {}

    def visit(value: object) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            unused.setdefault(type(value).__name__, {field.name for field in fields}).difference_update(
                field.name for field in fields if getattr(value, field.name) != field.default
            )
            value = [getattr(value, field.name) for field in fields]
        if isinstance(value, tuple | list):
            for item in value:
                visit(item)

    visit([*make.packets().values(), *make.syncs().values(), *make.known_peers()])
    assert {name: fields for name, fields in unused.items() if fields} == {}
    assert {type(message) for message in make.MESSAGES.values()} == set(typing.get_args(wire.Message))


def test_a_format_is_never_written_twice(tmp_path: Path) -> None:
    names = make.write(tmp_path / "new")
    assert make.unchanged(tmp_path / "new")
    (tmp_path / "new" / f"{names[0]}.bin").write_bytes(b"of an older version")
    with pytest.raises(FileExistsError):
        make.write(tmp_path / "new")
    assert (tmp_path / "new" / f"{names[0]}.bin").read_bytes() == b"of an older version"
    assert not make.unchanged(tmp_path / "new")


def test_a_value_that_changed_its_meaning_is_found() -> None:
    packet = make.packets()["full"]
    recorded = make.plain(packet)
    assert differences(recorded, packet) == []
    assert differences(recorded, dataclasses.replace(packet, epoch=Epoch(8))) == [".epoch: 8"]
    assert differences(recorded, dataclasses.replace(packet, records=())) == [".records: 0 items"]
    del recorded["note"]
    assert differences(recorded, packet) == [".note is no default"]
