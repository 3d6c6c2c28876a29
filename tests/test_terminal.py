"""Text from other machines on our terminal: nothing in it is obeyed, and nothing of it is lost."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshq.terminal import LINE_CHARS_MAX, LogView, harmless

DANGEROUS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
PIECES = [b"\n", b"\r", b"\r\n", b"\x1b[31m", b"\x1b[K", b"\x1b]0;x\x07", b"\xe2\x82\xac", b"50%"]
LOG_BYTES = st.lists(st.sampled_from(PIECES) | st.binary(max_size=6)).map(b"".join)


def view(*chunks: bytes, terminal: bool = False, colours: bool = False) -> str:
    viewer = LogView(terminal=terminal, colours=colours)
    return "".join([*map(viewer.feed, chunks), viewer.finish()])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("train µ=0.5 日本 🎉", "train µ=0.5 日本 🎉"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\rb", "a\\x0db"),
        ("\x9b31m", "\\x9b31m"),
        ("\x7f\x00", "\\x7f\\x00"),
        ("user\u202etxt.exe", "user\\u202etxt.exe"),
        ("\udcff", "\\udcff"),
    ],
)
def test_controls_become_visible_and_all_else_stays(text: str, shown: str) -> None:
    assert harmless(text) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_no_text_has_anything_left_that_a_terminal_obeys(text: str) -> None:
    shown = harmless(text)
    assert DANGEROUS.search(shown) is None
    assert harmless(shown) == shown
    shown.encode("utf-8")


@pytest.mark.parametrize(
    ("log", "shown"),
    [
        (b"one\ntwo\n", "one\ntwo\n"),
        (b"no end", "no end"),
        (b"windows\r\nlines\r\n", "windows\nlines\n"),
        (b" 10%\r 50%\r100%\ndone\n", "100%\ndone\n"),
        (b" 10%\r 50%\r100%\r", "100%"),
        (b"100%\r\r\n", "100%\n"),
        (b"\r\r\n", "\n"),
        (b"\xff\xc3\xa9\xc3", "\ufffdé\ufffd"),
        (b"\x1b[31mred\x1b[0m\n", "red\n"),
        (b"\x1b[2J\x1b[Aup\x1b[K\n", "up\n"),
        (b"\x1b]0;title\x07\x1bc\n", "\\x1b]0;title\\x07\\x1bc\n"),
        (b"\x1b[", "\\x1b["),
    ],
)
def test_a_log_shows_the_last_state_of_each_line(log: bytes, shown: str) -> None:
    assert view(log) == shown


@given(LOG_BYTES, st.data())
def test_it_does_not_matter_how_a_log_is_cut_into_chunks(log: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(log)), max_size=8)))
    chunks = [log[start:end] for start, end in zip([0, *cuts], [*cuts, len(log)], strict=True)]
    assert view(*chunks) == view(log)
    assert rendered(view(*chunks, terminal=True)) == rendered(view(log))
    assert rendered(view(*chunks, terminal=True, colours=True)) == rendered(view(log))


def rendered(printed: str) -> str:
    """What a terminal shows of it: our own rewriting of a line done, colours gone."""
    return "\n".join(re.sub(r"\x1b\[[0-9;:]*m", "", line).rpartition("\r\x1b[K")[2] for line in printed.split("\n"))


@given(LOG_BYTES)
def test_no_log_has_anything_left_that_a_terminal_obeys(log: bytes) -> None:
    assert DANGEROUS.search(view(log)) is None
    assert DANGEROUS.search(rendered(view(log, terminal=True, colours=True))) is None


def test_a_trailing_carriage_return_in_a_live_log_loses_nothing() -> None:
    viewer = LogView()
    assert [viewer.feed(chunk) for chunk in (b"kept\r", b"\n", b"old\r", b"new\r", b"\n")] == ["", "kept\n", "", "", "new\n"]


def test_a_terminal_sees_a_progress_bar_move() -> None:
    viewer = LogView(terminal=True)
    printed = [viewer.feed(chunk) for chunk in (b"10%", b"\r", b"20%", b"\r30%\r", b"\n", b"next")]
    assert printed == ["10%", "", "\r\x1b[K20%", "\r\x1b[K30%", "\n", "next"]
    assert viewer.finish() == ""


def test_a_terminal_sees_dots_as_they_come() -> None:
    viewer = LogView(terminal=True)
    assert [viewer.feed(chunk) for chunk in (b"working.", b".", b".", b" done\n")] == ["working.", ".", ".", " done\n"]


def test_a_pipe_gets_whole_lines() -> None:
    viewer = LogView()
    assert [viewer.feed(chunk) for chunk in (b"working.", b".", b" done\nne", b"xt")] == ["", "", "working.. done\n", ""]
    assert viewer.finish() == "next"


def test_colours_are_kept_when_asked_for_and_end_with_the_log() -> None:
    assert view(b"\x1b[1;31mred\x1b[2J\x07", colours=True) == "\x1b[1;31mred\\x07\x1b[0m"
    assert view(b"plain\n", colours=True) == "plain\n"


def test_a_colour_that_is_cut_in_two_is_not_shown_in_halves() -> None:
    viewer = LogView(terminal=True, colours=True)
    assert [viewer.feed(chunk) for chunk in (b"a\x1b", b"[3", b"1mb")] == ["a", "", "\x1b[31mb"]


def test_a_line_without_end_is_shown_in_parts_and_takes_bounded_memory() -> None:
    viewer = LogView()
    printed = [viewer.feed(b"x" * 10_000) for _ in range(20)]
    assert sum(map(len, printed)) + len(viewer.finish()) == 200_000
    assert max(map(len, printed)) <= LINE_CHARS_MAX + 10_000


def test_a_progress_bar_without_end_takes_bounded_memory() -> None:
    viewer = LogView()
    assert all(viewer.feed(b"%d%%\r" % number) == "" for number in range(50_000))
    assert len(viewer._open) < 100
    assert viewer.finish() == "49999%"
