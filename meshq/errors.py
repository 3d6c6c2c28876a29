"""Everything that may go wrong and is no bug, as one tree.

    MeshqError
    ├── UsageError        the person asked for something that makes no sense        exit 2
    ├── Unplaceable       no peer that is known could run this task                 exit 75
    ├── Unreachable       no agent, or no peer, answers                             exit 69
    ├── TaskFailed        what was asked for was tried and failed                   exit 1
    ├── StoreError        the disk refused                                          exit 1
    └── PeerError         a remote broke the rules: drop, count, never crash        (not shown to people)
        └── MalformedData

A message says doing what, to what, why; `hint` says what to do next. Bugs are assertions, never one of these.
"""

from typing import ClassVar


class MeshqError(Exception):
    """Root of all expected failures. State: each subclass says whether anything was changed."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MeshqError):
    """The request itself is wrong. State: unchanged."""

    exit_code = 2
    code = "usage"


class Unplaceable(MeshqError):
    """No peer that is known could run this task now or later. State: nothing was stored."""

    exit_code = 75
    code = "unplaceable"


class Unreachable(MeshqError):
    """No agent or no peer answered. State: unknown at the other side, unchanged here."""

    exit_code = 69
    code = "unreachable"


class TaskFailed(MeshqError):
    """What was asked for was tried and failed. State: as the message says."""

    exit_code = 1
    code = "failed"


class StoreError(MeshqError):
    """The disk refused a write or gave back damaged data. State: the write did not happen."""

    exit_code = 1
    code = "store"


class PeerError(MeshqError):
    """A remote sent something that breaks the rules. State: unchanged."""

    code = "peer"


class MalformedData(PeerError):
    """Bytes that do not decode to what they should be. State: unchanged."""

    code = "malformed"


ERROR_KINDS: dict[str, type[MeshqError]] = {
    kind.code: kind
    for kind in (MeshqError, UsageError, Unplaceable, Unreachable, TaskFailed, StoreError, PeerError, MalformedData)
}
"""By `code`, so that an error that crossed the control socket keeps its kind."""
