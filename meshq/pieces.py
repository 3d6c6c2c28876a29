"""A followed log on its way: pieces that say where they stand, so that whoever loses the connection goes on exactly there.

Counting the bytes that came can't do that: attempts follow each other, a log that outgrew its limit has a hole in its middle,
and a task may cut its own log. So a piece names its attempt by the fence and the offset that its bytes have in that attempt's
log, holes included. Whoever asks again asks for (fence, end of the last piece). What is said about a log is not in it:
`remarks` makes it from two pieces that follow each other.

In transit a piece is a frame: one line of JSON, then as many bytes as its "bytes" says.

    {"fence": "1.a….1.7", "attempt": 1, "peer": "bob", "offset": 40, "broke_off": false, "bytes": 6}
    hello

Between peers the request names the attempt, so the line has only "offset" and "bytes". Standard library only.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from meshq.config import LOG_BYTES_MAX
from meshq.errors import MalformedData

CONTENT_TYPE: Final = "application/vnd.meshq.pieces"
HEADER_BYTES_MAX: Final = 1_024
DATA_BYTES_MAX: Final = 2**20  # of one piece; LOG_CHUNK_BYTES are sent
OFFSET_MAX: Final = 2**62

Header = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes of one attempt's log. The first of an attempt is empty and says where it begins."""

    fence: str
    attempt: int
    peer: str  # the name of whoever runs or ran it
    offset: int  # of the first byte
    data: bytes = b""
    broke_off: bool = False  # the attempt is over, and nobody who answers has more of its log

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


def remarks(before: Piece | None, piece: Piece) -> list[str]:
    """What a person has to know before the bytes of `piece`, when `before` was the last one."""
    found = []
    if before is not None and before.fence != piece.fence:
        found.append(f"attempt {piece.attempt} on {piece.peer}")
    elif before is not None and piece.offset > before.end:
        found.append(left_out(piece.offset - before.end))
    if piece.broke_off:
        found.append(f"the log of attempt {piece.attempt} on {piece.peer} broke off")
    return found


def left_out(size: int) -> str:
    """Instead of `size` bytes in the middle of a log."""
    return f"{size} bytes of this log are left out here: it is longer than {LOG_BYTES_MAX // 2**20} MiB"


def encode_piece(piece: Piece) -> bytes:
    header = {"fence": piece.fence, "attempt": piece.attempt, "peer": piece.peer, "offset": piece.offset}
    return frame(header | {"broke_off": piece.broke_off}, piece.data)


def decode_piece(header: Header, data: bytes) -> Piece:
    """MalformedData if the header is not one of a piece."""
    fence, peer = header.get("fence"), header.get("peer")
    if not isinstance(fence, str) or not isinstance(peer, str):
        raise MalformedData("a piece of a log without attempt")
    return Piece(
        fence=fence,
        attempt=number(header, "attempt", OFFSET_MAX),
        peer=peer,
        offset=number(header, "offset", OFFSET_MAX),
        data=data,
        broke_off=header.get("broke_off") is True,
    )


def frame(header: Header, data: bytes) -> bytes:
    return json.dumps({**header, "bytes": len(data)}).encode() + b"\n" + data


def number(header: Header, name: str, most: int) -> int:
    """MalformedData if the header has no such number from 0 to `most`."""
    value = header.get(name)
    if type(value) is not int or not 0 <= value <= most:
        raise MalformedData(f"{name}: {str(value)[:40]!r} is no number from 0 to {most}")
    return value


class FrameReader:
    """Takes bytes as they come and gives the frames that are whole. After MalformedData the rest makes no sense."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Header, bytes]]:
        self._buffer += data
        while (found := self._take()) is not None:
            yield found

    def _take(self) -> tuple[Header, bytes] | None:
        line_end = self._buffer.find(b"\n", 0, HEADER_BYTES_MAX)
        if line_end < 0:
            if len(self._buffer) >= HEADER_BYTES_MAX:
                raise MalformedData("the header of a piece has no end")
            return None
        header = _parsed(self._buffer[:line_end])
        end = line_end + 1 + number(header, "bytes", DATA_BYTES_MAX)
        if len(self._buffer) < end:
            return None
        data = bytes(self._buffer[line_end + 1 : end])
        del self._buffer[:end]
        return header, data


def _parsed(line: bytes | bytearray) -> Header:
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        raise MalformedData("the header of a piece is no JSON") from None
    if not isinstance(header, dict):
        raise MalformedData("the header of a piece is no object")
    return header
