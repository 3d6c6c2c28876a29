"""The documents of the contract, as functions of rows: what stands for the task as a whole."""

from dataclasses import replace
from typing import Any

import pytest

from meshq.gossip.connectivity import Connectivity
from meshq.gossip.member import Address, Liveness, Member
from meshq.ids import Dot, Epoch, PeerId
from meshq.ledger.catalog import Catalog
from meshq.ledger.row import Cancel, Claim, Ended, Fact, Lost, Row, Started
from meshq.task import EndKind, Gpu, GpuProcess, MigInstance, OutputFile, Status, Telemetry, Versions
from meshq.web import documents
from tests.ledger.builders import dot, outcome, peer, row

OUTPUT = OutputFile(path="checkpoint", bytes=3, sha256="0" * 64)
B1, B2, C1, C2 = dot("b", 1), dot("b", 2), dot("c", 1), dot("c", 2)


def names(who: PeerId) -> str:
    return {peer("b"): "bob", peer("c"): "cyd"}[who]


def claimed(at: Dot, name: str, attempt: int, seen: dict[str, int]) -> tuple[Dot, Fact]:
    return at, Claim(attempt=attempt, peer=peer(name), seen={dot(who, 1).actor: seq for who, seq in seen.items()})


def running_on_b(*more: tuple[Dot, Fact]) -> Row:
    return row(claimed(B1, "b", 1, {"a": 1}), (B2, Started(claim=B1, at=5.0)), *more)


def ended_on_b(kind: EndKind, **fields: Any) -> Row:
    return running_on_b((dot("b", 3), Ended(claim=B1, outcome=outcome(kind, started_at=5.0, ended_at=9.0, **fields))))


def shown(of: Row) -> documents.Document:
    return documents.task_document(of, names, position=None, reason=None)


def test_a_task_that_waits_has_no_times_of_its_own() -> None:
    document = shown(row())
    assert (document["status"], document["started_at"], document["ended_at"], document["exit_code"]) == (
        "queued",
        None,
        None,
        None,
    )
    assert document["submitted_at"] == document["spec"]["submitted_at"] == "1970-01-01T00:00:01.000Z"


def test_a_running_task_has_the_times_of_the_attempt_that_holds_it() -> None:
    document = shown(running_on_b())
    assert (document["status"], document["started_at"], document["ended_at"]) == ("running", "1970-01-01T00:00:05.000Z", None)
    assert [(each["peer"], each["status"]) for each in document["attempts"]] == [("bob", "running")]


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [(EndKind.SUCCEEDED, Status.SUCCEEDED, 0), (EndKind.FAILED, Status.FAILED, 1)],
)
def test_also_a_failed_task_shows_its_outputs(kind: EndKind, status: Status, code: int) -> None:
    document = shown(ended_on_b(kind, outputs=(OUTPUT,), outputs_total=1))
    assert (document["status"], document["exit_code"], document["ended_at"]) == (status.value, code, "1970-01-01T00:00:09.000Z")
    assert (document["outputs"], document["outputs_total"]) == ([{"path": "checkpoint", "bytes": 3}], 1)


def test_a_task_that_was_cancelled_while_it_waited_ended_then() -> None:
    document = shown(row((C1, Cancel(by="ann@a", at=7.0))))
    assert (document["status"], document["ended_at"], document["exit_code"]) == ("cancelled", "1970-01-01T00:00:07.000Z", None)


def test_a_task_that_was_cancelled_after_it_lost_its_machine_has_not_that_attempts_code() -> None:
    lost = running_on_b((C1, Lost(claim=B1, at=6.0)), (C2, Cancel(by="ann@a", at=7.0)))
    document = shown(lost)
    assert (document["status"], document["started_at"], document["ended_at"]) == ("cancelled", None, "1970-01-01T00:00:07.000Z")
    assert documents.attempt_with_outputs(lost) is not None, "what it wrote before may still be fetched"


def test_a_wait_answers_with_code_and_time_limit() -> None:
    answer = documents.wait_document(ended_on_b(EndKind.FAILED, timed_out=True), names, "time limit")
    assert (answer["final"], answer["exit_code"], answer["timed_out"], answer["peer"], answer["attempt"]) == (
        True,
        1,
        True,
        "bob",
        1,
    )
    waiting = documents.wait_document(row(), names, None)
    assert (waiting["final"], waiting["exit_code"], waiting["attempt"], waiting["peer"]) == (False, None, None, None)


def test_a_summary_has_all_but_what_is_large() -> None:
    whole = shown(running_on_b())
    summary = documents.task_summary(running_on_b(), names, position=None, reason=None)
    assert set(whole) - set(summary) == {"spec", "parameters", "outputs", "outputs_total"}
    assert {key: whole[key] for key in summary} == summary


def test_queues_are_those_that_are_served_and_those_that_have_tasks() -> None:
    catalog = Catalog()
    catalog.put(row(birth=dot("a", 9)), Status.QUEUED)
    catalog.put(ended_on_b(EndKind.SUCCEEDED), Status.SUCCEEDED)
    listed = documents.queue_documents(catalog, {"default": 2, "gpu": 1}, 11.0)
    figures = [(each["name"], each["queued"], each["succeeded"], each["peers"]) for each in listed]
    assert figures == [("default", 1, 1, 2), ("gpu", 0, 0, 1)]
    assert listed[0]["oldest_wait_seconds"] == 10.0


def peer_facts(liveness: Liveness = Liveness.ALIVE, **given: Any) -> documents.PeerFacts:
    member = Member(peer=peer("b"), epoch=Epoch(3), incarnation=2, liveness=liveness, name="bob", addresses=(), started_at=1)
    return documents.PeerFacts(**{"member": member, "address": None, "telemetry": Telemetry(), "age": 1.0, **given})


def link(udp: bool | None, tcp: bool | None) -> Connectivity:
    return Connectivity(udp=udp, tcp=tcp, address=Address("fd00::2", 7733), rtt=0.0123456, heard_seconds=4.00049)


TRANSPORTS = [
    (True, None, "udp"), (True, False, "udp"), (False, True, "tcp"), (False, False, None), (False, None, "tcp"),
    (None, True, None), (None, None, None),
]  # fmt: skip


@pytest.mark.parametrize(("udp", "tcp", "transport"), TRANSPORTS)
def test_a_peer_says_by_which_transport_it_is_reached(udp: bool | None, tcp: bool | None, transport: str | None) -> None:
    document = documents.peer_document(peer_facts(connectivity=link(udp, tcp)))
    assert document["connectivity"] == {
        "transport": transport, "udp": udp, "tcp": tcp, "rtt_ms": 12.346, "last_heard_seconds": 4.0, "silent": False,
    }  # fmt: skip
    assert document["address"] == "[fd00::2]:7733", "the one in use, not the first that it told"


@pytest.mark.parametrize("liveness", [Liveness.DEAD, Liveness.LEFT])
def test_who_is_gone_is_reached_by_nothing(liveness: Liveness) -> None:
    gone = documents.peer_document(peer_facts(liveness, connectivity=replace(link(True, True), heard_seconds=44.0)))
    assert (gone["connectivity"]["transport"], gone["connectivity"]["silent"]) == (None, False)


@pytest.mark.parametrize("liveness", [Liveness.ALIVE, Liveness.SUSPECT])
@pytest.mark.parametrize(("udp", "tcp", "transport"), [(True, True, "udp"), (False, True, "tcp"), (None, None, None)])
def test_who_is_held_alive_and_was_not_heard_for_long_is_silent(
    liveness: Liveness, udp: bool | None, tcp: bool | None, transport: str | None
) -> None:
    for seconds, silent in ((30.0, False), (44.0, True)):
        way = replace(link(udp, tcp), heard_seconds=seconds)
        shown = documents.peer_document(peer_facts(liveness, connectivity=way))["connectivity"]
        assert (shown["transport"], shown["silent"]) == (None if silent else transport, silent)


def test_the_peer_that_answers_has_no_connectivity_and_one_never_met_has_an_unknown_one() -> None:
    mine = documents.peer_document(peer_facts(connectivity=None, address=Address("10.0.0.1", 7733)))
    assert (mine["connectivity"], mine["address"]) == (None, "10.0.0.1:7733")
    assert (mine["epoch"], mine["incarnation"], mine["started_at"]) == (3, 2, "1970-01-01T00:00:01.000Z")
    unknown = documents.peer_document(peer_facts(connectivity=documents.UNKNOWN_LINK))
    assert (unknown["connectivity"].pop("silent"), unknown["address"]) == (False, None)
    assert set(unknown["connectivity"].values()) == {None}


def test_gpus_are_shown_with_their_processes_and_instances() -> None:
    process = GpuProcess(pid=7, user="ann", memory_bytes=5)
    instance = MigInstance(uuid="MIG-x", profile="1g.5gb", memory_bytes=3, memory_used_bytes=1, foreign_pids=(7,))
    gpu = Gpu(index=1, uuid="GPU-a", name="A100", memory_bytes=9, foreign_pids=(7,), processes=(process,), mig=(instance,),
              mig_mode=True)  # fmt: skip
    [first, second] = documents.peer_document(
        peer_facts(telemetry=Telemetry(gpus=(gpu, replace(gpu, problem="lost", mig=()))))
    )["gpus"]
    assert first == {
        "index": 1, "uuid": "GPU-a", "name": "A100", "memory_bytes": 9, "memory_used_bytes": None, "utilization_percent": None,
        "temperature_c": None, "power_w": None, "task": None, "foreign_pids": [7],
        "processes": [{"pid": 7, "user": "ann", "task": None, "memory_bytes": 5, "graphics": False}],
        "mig_mode": True, "problem": None,
        "mig": [
            {"parent": 1, "uuid": "MIG-x", "profile": "1g.5gb", "memory_bytes": 3, "memory_used_bytes": 1, "foreign_pids": [7]}
        ],
    }  # fmt: skip
    assert (second["problem"], second["mig"]) == ("lost", [])


def test_what_a_peer_runs_on_is_told_and_what_it_lacks_is_null() -> None:
    versions = Versions(python="3.11.2", kernel="6.1.0-18-amd64", system="debian 12")
    telemetry = Telemetry(versions=versions, environments=("e" * 8,), gpu_problem="the NVIDIA driver has not answered for 40 s")
    told = documents.peer_document(peer_facts(telemetry=telemetry))
    assert told["versions"] == {
        "meshq": None, "python": "3.11.2", "kernel": "6.1.0-18-amd64", "system": "debian 12", "driver": None, "cuda": None,
        "docker": None,
    }  # fmt: skip
    assert (told["environments"], told["gpu_problem"]) == (["e" * 8], "the NVIDIA driver has not answered for 40 s")
    assert documents.peer_document(peer_facts())["gpu_problem"] is None


def test_a_time_that_no_calendar_has_is_unknown() -> None:
    assert documents.iso(1e300) is None
