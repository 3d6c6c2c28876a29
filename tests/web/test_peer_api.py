"""The routes of the peer port."""

from typing import Any, cast

from meshq.web.gate import RequestLimiter
from meshq.web.peer_api import PeerApi


def test_an_output_may_have_any_name_that_a_file_can_have() -> None:
    nothing: Any = cast(Any, None)  # the routes alone are asked
    api = PeerApi(gossip=nothing, ledger=nothing, objects=nothing, files=nothing, transfers=nothing)
    resources = api.application(RequestLimiter()).router.resources()
    patterns = [resource.get_info().get("pattern") for resource in resources]
    for name in ("plain", "in/a folder", "two\nlines"):
        assert any(pattern is not None and pattern.fullmatch(f"/attempts/1.x/outputs/{name}") for pattern in patterns), name
