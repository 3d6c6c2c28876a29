"""Pieces of a log: there and back through frames, whatever way they are cut on their way, and what is said about them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshq.errors import MalformedData
from meshq.pieces import DATA_BYTES_MAX, FrameReader, Piece, decode_piece, encode_piece, frame, left_out, remarks


def piece(offset: int = 0, data: bytes = b"", *, attempt: int = 1, peer: str = "bob", broke_off: bool = False) -> Piece:
    return Piece(fence=f"{attempt}.x", attempt=attempt, peer=peer, offset=offset, data=data, broke_off=broke_off)


@given(contents=st.lists(st.binary(max_size=40), max_size=8), cut=st.integers(1, 50))
def test_pieces_arrive_as_they_were_however_the_stream_is_cut(contents: list[bytes], cut: int) -> None:
    sent = [piece(offset, data, broke_off=not data) for offset, data in enumerate(contents)]
    stream = b"".join(map(encode_piece, sent))
    reader = FrameReader()
    frames = [each for at in range(0, len(stream), cut) for each in reader.feed(stream[at : at + cut])]
    assert [decode_piece(header, data) for header, data in frames] == sent


@pytest.mark.parametrize(
    "stream",
    [
        b"no json\n",
        b"[1]\n",
        b"{}\n",
        b"[" * 900 + b"\n",
        b'{"bytes": -1}\n',
        b'{"bytes": true}\n',
        f'{{"bytes": {DATA_BYTES_MAX + 1}}}\n'.encode(),
        b"x" * 2_000,
    ],
)
def test_a_stream_that_is_no_frames_is_refused(stream: bytes) -> None:
    with pytest.raises(MalformedData):
        list(FrameReader().feed(stream))


@pytest.mark.parametrize("header", [{}, {"fence": 1, "peer": "b"}, {"fence": "f", "peer": "b", "attempt": 1, "offset": -1}])
def test_a_frame_that_is_no_piece_is_refused(header: dict[str, object]) -> None:
    [found] = FrameReader().feed(frame(header, b""))
    with pytest.raises(MalformedData):
        decode_piece(*found)


def test_a_person_is_told_of_new_attempts_of_gaps_and_of_a_log_that_broke_off() -> None:
    first = piece(0, b"four")
    assert remarks(None, first) == remarks(first, piece(4, b"more")) == remarks(first, piece(0, b"again")) == []
    assert remarks(first, piece(attempt=2, peer="cyd")) == ["attempt 2 on cyd"]
    assert remarks(first, piece(14, b"tail")) == [left_out(10)]
    assert remarks(first, piece(4, broke_off=True)) == ["the log of attempt 1 on bob broke off"]
