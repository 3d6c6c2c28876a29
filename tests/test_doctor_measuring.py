"""What the doctor measures, for real: multicast probes on loopback and on a LAN, docker daemons of all kinds, the disk."""

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from meshq import doctor
from meshq.doctor import measuring, multicast
from meshq.doctor.facts import Disk, Docker, Measured, Probe
from tests.processes.netns import lan

Answer = TypeVar("Answer")


def run(work: Awaitable[Answer]) -> Answer:
    async def go() -> Answer:
        return await asyncio.wait_for(work, 10.0)

    return asyncio.run(go())


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_a_multicast_probe_comes_back_on_loopback_and_this_machine_is_not_another() -> None:
    began = time.monotonic()
    port = free_port()
    first, second = run(multicast.probe_all([("lo", "127.0.0.1"), ("lo", "127.0.0.1")], frozenset({"127.0.0.1"}), port))
    assert first == second == Probe(interface="lo", host="127.0.0.1", came_back=True, heard=0)
    assert time.monotonic() - began < 5 * multicast.LISTEN_SECONDS


@pytest.mark.parametrize(("own", "heard"), [({"127.0.0.1"}, 1), ({"127.0.0.1", "127.0.0.2"}, 0)])
def test_another_machine_is_heard_and_an_own_address_is_none(own: set[str], heard: int) -> None:
    async def go(port: int) -> tuple[Probe, ...]:
        talker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with talker:
            talker.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            talker.bind(("127.0.0.2", 0))
            probing = asyncio.ensure_future(multicast.probe_all([("lo", "127.0.0.1")], frozenset(own), port))
            while not probing.done():
                talker.sendto(b"an answer", (multicast.GROUP_V4, port))
                await asyncio.wait({probing}, timeout=0.01)
            return await probing

    assert run(go(free_port())) == (Probe(interface="lo", host="127.0.0.1", came_back=True, heard=heard),)


def test_an_address_that_is_gone_is_a_problem_in_words() -> None:
    [probe] = run(multicast.probe_all([("eth9", "10.254.254.254")], frozenset(), free_port()))
    assert not probe.came_back and probe.problem


def test_the_question_is_one_that_zeroconf_can_read() -> None:
    from zeroconf import DNSIncoming  # type: ignore[attr-defined]  # it is there, though in no `__all__`

    parsed = DNSIncoming(multicast.question("0123456789abcdef"))
    assert parsed.valid
    assert [each.name for each in parsed.questions] == ["0123456789abcdef._meshq._udp.local.", "_services._dns-sd._udp.local."]


PROBE_PROGRAM = """
import asyncio
from pathlib import Path
from meshq.doctor import measure
found = asyncio.run(measure(Path("/"), mdns=True, bind=""))
print([(each.interface, each.came_back, each.heard > 0) for each in found.probes if ":" not in each.host])
"""
TALK_PROGRAM = """
import socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(sys.argv[1]))
    sock.bind(("", 5353))
    print("up", flush=True)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        sock.sendto(b"hello", ("224.0.0.251", 5353))
        time.sleep(0.05)
"""


def inside(netns: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", netns, *command]


def probe_in(netns: str) -> str:
    done = subprocess.run(inside(netns, sys.executable, "-c", PROBE_PROGRAM), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.netns
@pytest.mark.xdist_group("processes")
def test_on_a_lan_a_neighbour_is_heard() -> None:
    with lan(2) as net:
        here, there = net.machines
        assert probe_in(here.netns) == "[('lan', True, False)]"
        with subprocess.Popen(
            inside(there.netns, sys.executable, "-c", TALK_PROGRAM, there.address), stdout=subprocess.PIPE
        ) as talker:
            assert talker.stdout is not None and talker.stdout.readline() == b"up\n"
            assert probe_in(here.netns) == "[('lan', True, True)]"
            talker.kill()


@pytest.mark.netns
@pytest.mark.xdist_group("processes")
def test_a_firewall_that_drops_mdns_is_noticed() -> None:
    with lan(1) as net:
        [here] = net.machines
        here.drop("INPUT", "-p", "udp", "--dport", "5353")
        assert probe_in(here.netns) == "[('lan', False, False)]"


# --- docker, the disk, and all of it together ---------------------------------------------------------------------------


@contextmanager
def a_daemon(path: Path, answer: bytes | None) -> Iterator[None]:
    """Listens there and gives every client this answer; None: none at all."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        kept: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                if answer is None:
                    kept.append(connection)
                    continue
                with connection:
                    connection.recv(4096)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in kept:
                connection.close()


ANSWERS: list[tuple[bytes | None, str, str]] = [
    (b'HTTP/1.0 200 OK\r\n\r\n{"Version": "27.1.1"}', "27.1.1", ""),
    (b"HTTP/1.0 500 no\r\n\r\n{}", "", "its answer cannot be read"),
    (b"HTTP/1.0 200 OK\r\n\r\n" + b"[" * 100_000, "", "its answer cannot be read"),
    (b'HTTP/1.0 200 OK\r\n\r\n{"Version": "\\u001b[2J"}', "", "its answer cannot be read"),
    (b'HTTP/1.0 200 OK\r\n\r\n{"Version": "27", "more": "' + b"x" * 100_000 + b'"}', "", "its answer cannot be read"),
    (b"HTTP/1.0 200 OK\r\n\r\n[]", "", "its answer cannot be read"),
    (b"", "", "its answer cannot be read"),
    (None, "", "it does not answer"),
]


@pytest.mark.parametrize(("answer", "version", "problem"), ANSWERS)
def test_a_docker_daemon_says_its_version_or_is_of_no_use(
    tmp_path: Path, answer: bytes | None, version: str, problem: str
) -> None:
    path = tmp_path / "s"
    with a_daemon(path, answer):
        found = run(measuring.ask_docker(str(path), 0.5))
    assert (found.path, found.version, found.problem) == (str(path), version, problem)


def test_a_docker_socket_that_nobody_serves_or_that_is_another_s_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    assert run(measuring.ask_docker(str(tmp_path / "s"))).problem == "Connection refused"
    assert run(measuring.ask_docker("")) == Docker()


def test_docker_is_asked_where_docker_host_says(tmp_path: Path) -> None:
    assert measuring.docker_socket({"DOCKER_HOST": "unix:///elsewhere"}) == "/elsewhere"
    assert measuring.docker_socket({"DOCKER_HOST": "tcp://1.2.3.4"}) == ""


def test_the_disk_and_the_open_files_of_this_process_are_known(tmp_path: Path) -> None:
    disk = measuring.look_at_disk(tmp_path)
    assert disk.free_bytes and disk.kind
    assert measuring.look_at_disk(Path("/proc")).kind == "proc"
    before = measuring.count_files()
    with (tmp_path / "file").open("w"):
        assert measuring.count_files().open == before.open + 1
    assert before.limit > before.open > 0


def test_what_hangs_is_left_out_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(measuring, "look_at_disk", lambda home: go_on.wait(30))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/s")

    async def go() -> tuple[Measured, float]:
        began = time.monotonic()
        found = await doctor.measure(tmp_path, mdns=False, bind="", seconds=0.5)
        took = time.monotonic() - began
        go_on.set()
        return found, took

    with a_daemon(tmp_path / "s", None):
        found, took = run(go())
    assert found.disk == Disk() and found.docker.problem == "it does not answer"
    assert found.interfaces and found.files.limit and not found.probes
    assert took < 5.0


def test_a_disk_that_is_gone_is_not_known_and_nothing_is_raised(tmp_path: Path) -> None:
    found = run(doctor.measure(tmp_path / "none", mdns=False, bind=""))
    assert (found.disk, found.probes) == (Disk(), ())


def test_with_mdns_each_network_is_probed_and_with_a_bind_that_one_alone(tmp_path: Path) -> None:
    found = run(doctor.measure(tmp_path, mdns=True, bind="127.0.0.1", seconds=5.0))
    assert [(each.interface, each.host) for each in found.probes] == [("lo", "127.0.0.1")]
