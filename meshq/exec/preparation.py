"""How getting an attempt ready can fail without anybody having done something wrong here."""

from meshq.errors import MeshqError


class PreparationFailed(MeshqError):
    """Source or environment of an attempt could not be made ready. State: what was half made is removed or marked unfinished.

    `retryable`: another peer, or this one later, may succeed (a package index that does not answer, an interpreter that is
    missing here); else nobody will (a source that tries to leave its folder). `blameless`: it says nothing about the task.
    """

    code = "preparation"

    def __init__(self, reason: str, retryable: bool, blameless: bool = False) -> None:
        super().__init__(reason)
        self.blameless = blameless
        self.reason = reason
        self.retryable = retryable
