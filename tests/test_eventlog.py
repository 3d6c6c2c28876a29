"""The log of events: whole lines in order, whatever the writer died of, in a bounded file."""

import json
from pathlib import Path

import pytest

from meshq import eventlog
from meshq.eventlog import EventLog


def clock() -> float:
    return 12.5


def test_what_was_noted_is_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    log = EventLog(file, clock)
    assert log.on
    log.note("claimed", task="t", fence="1.a.1")
    log.note("started", fence="1.a.1")
    log.close()
    again = EventLog(file, clock)
    again.note("ended", fence="1.a.1")
    again.close()
    assert list(eventlog.read(file)) == [
        {"at": 12.5, "event": "claimed", "task": "t", "fence": "1.a.1"},
        {"at": 12.5, "event": "started", "fence": "1.a.1"},
        {"at": 12.5, "event": "ended", "fence": "1.a.1"},
    ]
    assert file.stat().st_mode & 0o777 == 0o600


def test_without_a_file_nothing_is_written(tmp_path: Path) -> None:
    log = EventLog(None, clock)
    log.note("claimed", task="t")
    log.close()
    assert not log.on and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("whole", [0, 1, 3])
def test_a_torn_line_is_not_read_and_is_cut_off_at_the_next_start(tmp_path: Path, whole: int) -> None:
    file = tmp_path / "events.jsonl"
    lines = [json.dumps({"at": 1.0, "event": f"e{number}"}) + "\n" for number in range(whole)]
    file.write_text("".join(lines) + '{"at":2.0,"eve')
    assert [each["event"] for each in eventlog.read(file)] == [f"e{number}" for number in range(whole)]
    log = EventLog(file, clock)
    log.note("next")
    log.close()
    assert [each["event"] for each in eventlog.read(file)] == [*(f"e{number}" for number in range(whole)), "next"]


def test_of_a_full_log_the_newer_half_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eventlog, "FILE_BYTES_MAX", 2_000)
    file = tmp_path / "events.jsonl"
    log = EventLog(file, clock)
    for number in range(200):
        log.note("result", number=number)
    log.close()
    numbers = [each["number"] for each in eventlog.read(file)]
    assert numbers == list(range(numbers[0], 200)) and 20 < len(numbers) < 100
    assert sum(each.stat().st_size for each in tmp_path.iterdir()) <= 2_000
    assert sorted(each.name for each in tmp_path.iterdir()) == ["events.jsonl", "events.jsonl.1"]
