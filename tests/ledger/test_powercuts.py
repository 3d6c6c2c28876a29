"""Power cuts at every step of the store, on a disk that forgets what was not synced."""

from pathlib import Path

import pytest

from tests.ledger.powercuts import PowerCuts


@pytest.mark.parametrize("seed", range(3))
def test_nothing_that_was_acknowledged_is_lost_when_the_power_fails(tmp_path: Path, seed: int) -> None:
    report = PowerCuts(tmp_path, seed).run(20)
    assert (report.lost, report.corrupt) == ([], [])
    assert report.cuts == 20 and report.acknowledged > 10 and report.forgotten > 0, "the cuts must have hit something"


def test_a_store_whose_syncs_do_nothing_is_found_out(tmp_path: Path) -> None:
    report = PowerCuts(tmp_path, seed=1, honest=False).run(20)
    assert report.lost
