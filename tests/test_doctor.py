"""Each check of the doctor, with made-up facts: what it finds and what it tells people to do."""

from dataclasses import replace
from pathlib import Path

import pytest

from meshq import doctor
from meshq.doctor import Check, Facts
from meshq.gossip.member import Address, Liveness, Member
from meshq.ids import Epoch, PeerId
from meshq.task import Gpu, Telemetry


def member(name: str, letter: str, liveness: Liveness = Liveness.ALIVE, version: str = "1") -> Member:
    return Member(
        peer=PeerId(letter * 52), epoch=Epoch(1), incarnation=0, liveness=liveness, name=name, addresses=(), version=version
    )


ME, OTHER = member("lab-1", "a"), member("lab-2", "b")


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    return Facts(
        me=ME, members=(ME, OTHER), telemetry=Telemetry(queues=("default",)), home=tmp_path, uid=1000, group=None, mdns=True,
        mdns_problem="", gpu_state="no driver", landlock_abi=4, uv="/bin/uv", addresses=(Address("10.0.0.1", 7733),),
    )  # fmt: skip


def check(facts: Facts, name: str) -> Check:
    return next(each for each in doctor.examine(facts) if each.name == name)


def test_a_healthy_peer_has_nothing_to_mend(facts: Facts) -> None:
    assert [each.name for each in doctor.examine(facts) if not each.ok] == []


def test_alone_it_prints_the_command_that_would_join_it(facts: Facts) -> None:
    found = check(replace(facts, members=(ME,)), "peers")
    assert not found.ok
    assert "meshq join --seed 10.0.0.1:7733" in found.detail


def test_peers_that_do_not_answer_are_named_and_those_that_left_are_not(facts: Facts) -> None:
    found = check(replace(facts, members=(ME, member("x", "c", Liveness.DEAD), member("y", "d", Liveness.LEFT))), "peers")
    assert (found.ok, found.detail) == (False, "1 alive; these do not answer: x")


def test_names_and_versions_that_clash_are_found(facts: Facts) -> None:
    assert not check(replace(facts, members=(ME, member("lab-1", "b"))), "name").ok
    assert "others 2" in check(replace(facts, members=(ME, member("lab-2", "b", version="2"))), "version").detail


def test_what_keeps_tasks_away_is_said(facts: Facts) -> None:
    assert not check(replace(facts, telemetry=Telemetry(problem="its disk is nearly full")), "claims").ok
    assert "draining" in check(replace(facts, telemetry=Telemetry(draining=True)), "claims").detail


def test_gpus_and_who_uses_them_are_counted(facts: Facts) -> None:
    gpus = tuple(Gpu(index=n, uuid="", name="", memory_bytes=1, foreign_pids=pids) for n, pids in enumerate([(), (7,)]))
    assert check(replace(facts, telemetry=Telemetry(gpus=gpus)), "gpus").detail == "2 seen, 1 used by other processes"
    assert check(facts, "gpus").detail == "none: no driver"


def test_missing_protection_is_said(facts: Facts) -> None:
    assert not check(replace(facts, landlock_abi=0), "isolation").ok
    assert not check(replace(facts, uid=0), "user").ok
    assert not check(replace(facts, uv=None), "environments").ok
    assert not check(replace(facts, mdns_problem="no multicast"), "discovery").ok
    assert "members of group lab" in check(replace(facts, group="lab"), "user").detail


def test_the_document_has_checks_and_counters(facts: Facts) -> None:
    document = doctor.to_document([check(facts, "version")], {"b": 2, "a": 1})
    assert document == {"checks": [{"name": "version", "ok": True, "detail": "1"}], "counters": {"a": 1, "b": 2}}
