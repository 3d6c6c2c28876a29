"""Where meshq's options end and the script's begin. Pure.

`submit`'s options stand before the script or directly after it: the script's arguments begin at the first following token
that is no option of meshq, or at `--`. Without a script, `--` is followed by a command (contract, design section 9).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshq.errors import UsageError

NOT_YET: Mapping[str, bool] = {
    "--secret": True, "--set": True, "--system-site-packages": False, "--docker": True, "--docker-arg": True, "--setup": True,
    "--apt": True, "--repo": True, "--branch": True, "--commit": True, "--after": True, "--array": True, "--service": False,
    "--no-queue": False, "--dry-run": False,
}  # fmt: skip
"""Options of the contract that this version can't honour, and whether each takes a value. Refused, never ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """`submit`'s arguments, taken apart. Either `script` is set, or `command`, or neither was given."""

    options: tuple[str, ...]  # meshq's, in their order
    script: str | None = None
    arguments: tuple[str, ...] = ()  # the script's
    command: tuple[str, ...] = ()
    after_script: tuple[str, ...] = ()  # meshq's options that stood behind the script, each as it was written
    dashes: bool = False  # whether `--` said where the script's arguments begin


def split(args: Sequence[str], takes_value: Mapping[str, bool]) -> Split:
    """Take the arguments apart; `takes_value` says of each of meshq's options whether a value follows it.

    An option that stands before the script and is none of meshq's is passed on with the options, for the parser to refuse.
    """
    known = {**NOT_YET, **takes_value}
    before, position = _options(args, 0, known, strangers=True)
    options = tuple(token for group in before for token in group)
    if position == len(args):
        return Split(options=options)
    if args[position] == "--":
        return Split(options=options, command=tuple(args[position + 1 :]))
    script = args[position]
    after, position = _options(args, position + 1, known, strangers=False)
    dashes = position < len(args) and args[position] == "--"
    if dashes:
        position += 1
    return Split(
        options=options + tuple(token for group in after for token in group),
        script=script,
        arguments=tuple(args[position:]),
        after_script=tuple(" ".join(group) for group in after),
        dashes=dashes,
    )


def _options(args: Sequence[str], start: int, known: Mapping[str, bool], *, strangers: bool) -> tuple[list[Sequence[str]], int]:
    """The options from `start` on, each with its value, and where the first other token stands."""
    groups: list[Sequence[str]] = []
    position = start
    while position < len(args) and args[position] != "--" and args[position].startswith("-"):
        name, equals, _ = args[position].partition("=")
        if name not in known and not strangers:
            break
        if name in NOT_YET:
            raise UsageError(f"`{name}` is not supported yet", "`meshq submit --help` lists what is")
        length = 2 if known.get(name) and not equals else 1
        if position + length > len(args):
            raise UsageError(f"`{name}` needs a value")
        groups.append(args[position : position + length])
        position += length
    return groups, position


def near_miss(token: str, known: Sequence[str]) -> str | None:
    """The option of meshq that was probably meant by the script's first argument."""
    if not token.startswith("--"):
        return None
    from difflib import get_close_matches

    return next(iter(get_close_matches(token.partition("=")[0], known, 1, 0.85)), None)
