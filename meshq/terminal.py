"""Text from other machines, made harmless for a terminal: names, reasons, and whole logs.

A terminal obeys what it prints: escape sequences can retitle it, rewrite what stands above, or answer as if somebody had
typed; bidirectional controls can make a line read as another. Here control characters become visible (`\\x1b`), and
logs additionally lose their cursor movements and show only the last state of a progress bar. Standard library only.
"""

import codecs
import re
from typing import Final

LINE_CHARS_MAX: Final = 65_536  # an unfinished line is shown at this length, so that memory is bounded

_BIDI: Final = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS: Final = (*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0))  # C0 without tab and newline, DEL, C1
_SURROGATES: Final = range(0xD800, 0xE000)  # can't be encoded: printing one would raise
_VISIBLE: Final = {
    **{code: f"\\x{code:02x}" for code in _CONTROLS},
    **{code: f"\\u{code:04x}" for code in (*_BIDI, 0x2028, 0x2029, *_SURROGATES)},
}
_SEQUENCE: Final = re.compile(r"\x1b\[([0-?]{0,64})([ -/]{0,4}[@-~])")  # a control sequence (ECMA-48 5.4)
_COLOUR: Final = re.compile(r"(\x1b\[[0-9;:]{0,64}m)")  # select graphic rendition
_UNFINISHED: Final = re.compile(r"\x1b(\[[0-?]{0,64}[ -/]{0,4})?\Z")
_COLOUR_OFF: Final = "\x1b[0m"
_CLEAR_LINE: Final = "\r\x1b[K"


def harmless(text: str) -> str:
    """The text with every control character but newline and tab made visible."""
    return text if text.isprintable() else text.translate(_VISIBLE)


class LogView:
    """Turns the bytes of a log, as they arrive, into text to print.

    On a pipe (the default) it gives whole lines; on a `terminal` also the line that is not finished, rewritten in place as
    a progress bar moves. With `colours` the task's colours are kept. Nothing but superseded states of a line is lost.
    """

    def __init__(self, *, terminal: bool = False, colours: bool = False) -> None:
        self._terminal = terminal
        self._colours = colours
        self._coloured = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._open = ""  # the unfinished line, as received, from the state that counts
        self._shown = ""  # of the unfinished line, as printed

    def feed(self, data: bytes) -> str:
        """What to print now."""
        return self._advance(self._decoder.decode(data))

    def finish(self) -> str:
        """What to print at the end of the log: the line that had no end, and the terminal's own colours again."""
        rest = self._advance(self._decoder.decode(b"", final=True))
        rest += self._rewrite(self._clean(self._open))
        self._open = self._shown = ""
        return rest + (_COLOUR_OFF if self._coloured else "")

    def _advance(self, text: str) -> str:
        *lines, rest = (self._open + text).split("\n")
        printed = []
        for line in lines:
            printed.append(self._rewrite(self._clean(_last_state(line))) + "\n")
            self._shown = ""
        self._open = _last_state(rest) + ("\r" if rest.endswith("\r") else "")
        if len(self._open) > LINE_CHARS_MAX:
            printed.append(self._rewrite(self._clean(self._open)))
            self._open = self._shown = ""
        elif self._terminal:
            # The beginning of a sequence waits for the bytes that complete it.
            state = self._clean(_UNFINISHED.sub("", self._open))
            printed.append(self._rewrite(state))
            self._shown = state
        return "".join(printed)

    def _rewrite(self, state: str) -> str:
        """From what is shown of this line to what it shall show."""
        return state.removeprefix(self._shown) if state.startswith(self._shown) else _CLEAR_LINE + state

    def _clean(self, line: str) -> str:
        line = line.rstrip("\r")
        if line.isprintable():
            return line
        line = _SEQUENCE.sub(self._keep_colour, line)
        if not self._colours:
            return harmless(line)
        pieces = _COLOUR.split(line)
        self._coloured |= len(pieces) > 1
        return "".join(piece if at % 2 else harmless(piece) for at, piece in enumerate(pieces))

    def _keep_colour(self, sequence: re.Match[str]) -> str:
        return sequence[0] if self._colours and _COLOUR.fullmatch(sequence[0]) else ""


def _last_state(line: str) -> str:
    """What a carriage return left standing: its last part that is not empty."""
    return line.rstrip("\r").rpartition("\r")[2]
