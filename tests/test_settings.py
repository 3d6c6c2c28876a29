"""What `join` was asked for: checked by option, kept, merged with what is asked for next."""

from pathlib import Path

import pytest

from meshq import settings
from meshq.errors import StoreError, UsageError
from meshq.settings import Settings


def test_a_bare_join_keeps_what_the_last_one_was_given(tmp_path: Path) -> None:
    first = settings.merged(Settings(), {"name": "lab-1", "port": 7000, "labels": {"room": "b12"}})
    settings.save(tmp_path / "settings.json", first)
    assert settings.merged(settings.load(tmp_path / "settings.json"), {}) == first


def test_what_is_given_now_replaces_what_was_given_before() -> None:
    before = Settings(name="lab-1", port=7000)
    assert settings.merged(before, {"port": 7001, "seeds": ["a:1"]}) == Settings(name="lab-1", port=7001, seeds=("a:1",))


@pytest.mark.parametrize("below", ["", "deeper/home"])
def test_a_home_that_is_a_file_is_named_and_nobody_is_told_to_remove_it(tmp_path: Path, below: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt is a file") as caught:
        settings.load(tmp_path / "notes.txt" / below / "settings.json")
    assert caught.value.hint == "set MESHQ_HOME to a folder"


def test_no_file_means_defaults_and_a_damaged_one_is_said(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    assert settings.load(path) == Settings()
    path.write_text("{")
    with pytest.raises(StoreError, match="cannot read the settings"):
        settings.load(path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "a b"}, "--name"),
        ({"name": "x" * 64}, "--name"),
        ({"port": 0}, "--port: 0 is not between 1 and 65535"),
        ({"port": 65_536}, "--port"),
        ({"port": "7000"}, "cannot read the options"),
        ({"slots": -1}, "--slots"),
        ({"cpus": 0}, "--cpus"),
        ({"gpus": "0,x"}, "--gpus: '0,x'"),
        ({"order": "random"}, "--order: 'random' is none of strict, fair"),
        ({"profile": "moon"}, "--profile"),
        ({"labels": {"room": "b 12"}}, "--label room"),
        ({"queues": ["a/b"]}, "--queue"),
        ({"queues": ["q" * 60] * 4}, "--queue: 244 bytes in all, at most 200"),
        ({"labels": {f"k{n}": "v" * 60 for n in range(5)}}, "--label"),
    ],
)
def test_a_wrong_option_is_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings.merged(Settings(), given)


def test_a_peer_serves_default_and_gpu_where_there_are_gpus() -> None:
    assert settings.queues_served(Settings(), 0) == ("default",)
    assert settings.queues_served(Settings(), 2) == ("default", "gpu")
    assert settings.queues_served(Settings(queues=("b", "a", "b")), 2) == ("b", "a")


def test_gpus_are_all_none_or_listed() -> None:
    assert settings.gpu_indices("all") is None
    assert settings.gpu_indices("none") == ()
    assert settings.gpu_indices("3,0,3") == (0, 3)


def test_the_default_name_is_a_name() -> None:
    wanted = Settings(name=settings.default_name())
    assert settings.check(wanted) == wanted
