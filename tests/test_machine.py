"""Ports, the count of starts, and what the machine has."""

import os
import socket
from contextlib import closing
from pathlib import Path

import pytest

from meshq import config, machine
from meshq.errors import StoreError, TaskFailed, UsageError
from meshq.settings import Settings


def test_udp_and_tcp_get_the_same_port() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    udp, tcp, got = machine.open_ports("127.0.0.1", port)
    with udp, tcp:
        assert got == port == udp.getsockname()[1] == tcp.getsockname()[1]


def test_a_port_that_was_asked_for_and_is_taken_is_one_clear_message() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken, pytest.raises(TaskFailed, match="cannot listen on TCP"):
        machine.open_ports("127.0.0.1", taken.getsockname()[1])


def test_without_a_wish_the_next_free_port_after_the_default_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        monkeypatch.setattr(config, "PORT_DEFAULT", taken.getsockname()[1])
        udp, tcp, port = machine.open_ports("127.0.0.1", None)
        with udp, tcp:
            assert port > taken.getsockname()[1]


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::99"])
def test_an_address_that_this_machine_lacks_is_named_with_those_that_it_has(address: str) -> None:
    with pytest.raises(UsageError, match=f"--bind: this machine does not have the address {address}") as told:
        machine.check(Settings(bind=address), ["bind"])
    assert "it has" in told.value.hint
    machine.check(Settings(bind=address), [])  # it was there when it was asked for: the agent says so when it starts
    with pytest.raises(TaskFailed, match="does not have the address"):
        machine.open_ports(address, None)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("lab3", "no IP address"), ("224.0.0.1", "multicast"), ("ff02::1", "multicast"), ("fe80::1", "link-local"),
        ("255.255.255.255", "a broadcast address"), ("127.255.255.255", "a broadcast address"),
    ],
)  # fmt: skip
def test_what_is_no_address_to_listen_on_is_wrong_usage(address: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"--bind: .*{why}") as told:
        machine.check(Settings(bind=address), ["bind"])
    assert "0.0.0.0 or ::" in told.value.hint


@pytest.mark.parametrize("address", ["", "0.0.0.0", "::", "127.0.0.1", "127.0.0.9", "::1"])
def test_what_can_be_listened_on_is_no_problem(address: str) -> None:
    assert machine.bind_problem(address) is None


@pytest.mark.parametrize(("bind", "host"), [("::ffff:127.0.0.1", "127.0.0.1"), ("0::1", "::1"), ("0.0.0.0", "0.0.0.0")])
def test_an_address_is_bound_in_its_one_form(bind: str, host: str) -> None:
    udp, tcp, _ = machine.open_ports(bind, None)
    with udp, tcp:
        assert udp.getsockname()[0] == tcp.getsockname()[0] == host


def test_each_start_counts_one_more(tmp_path: Path) -> None:
    assert [machine.next_epoch(tmp_path / "epoch") for _ in range(3)] == [1, 2, 3]


def test_a_damaged_count_begins_again_since_gossip_knows_better(tmp_path: Path) -> None:
    (tmp_path / "epoch").write_text("x")
    assert machine.next_epoch(tmp_path / "epoch") == 1


def test_a_folder_that_is_gone_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot write"):
        machine.next_epoch(tmp_path / "gone" / "epoch")


def test_capacity_is_what_there_is_unless_join_said_less() -> None:
    found = machine.measure(Settings(gpus="none"))
    assert (found.slots, found.cpus) == (1, len(os.sched_getaffinity(0)))
    assert machine.measure(Settings(slots=3, cpus=1, memory_bytes=5)) == machine.Machine(slots=3, cpus=1, memory_bytes=5)


@pytest.mark.parametrize(
    ("wanted", "option"),
    [
        (Settings(cpus=4_096), "--cpus: 4096 of the"),
        (Settings(memory_bytes=2**50), "--memory"),
        (Settings(gpus="0,63"), "--gpus: this machine has"),
    ],
)
def test_what_the_machine_does_not_have_cannot_be_given_away(wanted: Settings, option: str) -> None:
    with pytest.raises(UsageError, match=option):
        machine.check(wanted, ("cpus", "memory_bytes", "gpus"))
    machine.check(wanted, ())  # an agent whose machine lost some hardware starts all the same


def test_all_that_the_machine_has_can_be_given_away() -> None:
    machine.check(Settings(cpus=1, memory_bytes=1, gpus="all"), ("cpus", "memory_bytes", "gpus"))
