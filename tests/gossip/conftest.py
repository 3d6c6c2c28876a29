"""Cores that are checked when the test is over."""

from collections.abc import Callable, Iterator

import pytest

from meshq.gossip.swim import Swim
from tests.gossip import builders


@pytest.fixture
def swim() -> Iterator[Callable[..., Swim]]:
    """Builds cores (see `builders.swim`); asserts their invariants at the end."""
    built: list[Swim] = []

    def build(*args: object, **options: object) -> Swim:
        core = builders.swim(*args, **options)  # type: ignore[arg-type]  # the same arguments, handed through
        built.append(core)
        return core

    yield build
    assert built
    for core in built:
        core.check()
