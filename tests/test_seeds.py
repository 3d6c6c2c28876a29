"""Whom to ask, and when, as long as a peer lives."""

from itertools import pairwise
from random import Random

from meshq.seeds import PAUSE_MAX, REST, Seeds

NAMES = ("a", "b", "c")


def asked(seeds: Seeds, begin: float, end: float, *, alive: int, missed: int = 0) -> list[tuple[float, tuple[str, ...]]]:
    """When which are asked by who looks every second."""
    times = [float(second) for second in range(int(begin), int(end))]
    return [(now, due) for now in times if (due := seeds.due(now, alive, missed))]


def test_whoever_is_alone_asks_all_of_them_with_growing_pauses() -> None:
    told = asked(Seeds(NAMES, Random(0), 0), 0, 100, alive=0)
    assert told == [(now, NAMES) for now in (0, 1, 3, 7, 15, 31, 61, 91)]


def test_whoever_is_alone_again_begins_with_short_pauses() -> None:
    seeds = Seeds(NAMES, Random(0), 0)
    asked(seeds, 0, 100, alive=0)
    asked(seeds, 100, 110, alive=1)
    assert [now for now, _ in asked(seeds, 110, 120, alive=0)] == [110, 111, 113, 117]


def test_one_is_asked_now_and_then_as_long_as_more_than_half_are_missing() -> None:
    for alive, missed, often in ((1, 2, True), (2, 2, False), (2, 1, False)):
        seeds = Seeds(NAMES, Random(0), 0)
        seeds.due(0, 0, 0)
        told = asked(seeds, 1, int(REST / 2), alive=alive, missed=missed)
        assert [len(due) for _, due in told] == ([1] * int(REST / 2 / PAUSE_MAX) if often else [])


def test_however_well_the_mesh_is_each_is_asked_about_every_five_minutes_and_not_all_at_once() -> None:
    seeds = Seeds(NAMES, Random(0), 0)
    seeds.due(0, 0, 0)
    told = asked(seeds, 1, int(10 * REST), alive=3)
    assert all(len(due) == 1 for _, due in told)
    for name in NAMES:
        times = [0.0, *(now for now, due in told if name in due)]
        pauses = [later - earlier for earlier, later in pairwise(times)]
        assert 7 <= len(pauses) <= 13
        assert all(0.75 * REST <= pause <= 1.25 * REST + 1 for pause in pauses)


def test_a_peer_without_seeds_asks_nobody() -> None:
    seeds = Seeds((), Random(0), 0)
    for alive, missed in ((0, 0), (1, 2), (3, 0)):
        assert asked(seeds, 0, 1_000, alive=alive, missed=missed) == []
