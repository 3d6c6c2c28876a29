"""Versions and cached environments: what is told of them, and that nothing that hangs or lies is more than unknown."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from meshq.exec import inventory
from meshq.exec.environment import DURABLE
from meshq.exec.inventory import ENVIRONMENTS_MAX, LOOK_SECONDS, Inventory, cached_environments, docker_version
from meshq.exec.shim import boot_id
from tests.exec.bench import LIMIT_SECONDS

ANSWER = b'HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{"Platform": {}, "Version": "24.0.7"}'
Serve = Callable[[bytes | None], str]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serve one answer to everybody at a socket; None: never answer."""
    servers: list[socket.socket] = []

    def start(answer: bytes | None) -> str:
        path = str(tmp_path / f"{len(servers)}.sock")
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.bind(path)
        server.listen()
        servers.append(server)
        if answer is not None:
            threading.Thread(target=answer_all, args=(server, answer), daemon=True).start()
        return path

    yield start
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def answer_all(server: socket.socket, answer: bytes) -> None:
    try:
        while True:
            connection, _ = server.accept()
            with closing(connection):
                connection.settimeout(LIMIT_SECONDS)
                assert connection.recv(4096).startswith(b"GET /version HTTP/1.0\r\n")
                connection.sendall(answer)
    except OSError:
        return  # the test is over


def test_the_version_of_docker_is_what_its_server_says(serve: Serve) -> None:
    assert docker_version([serve(ANSWER)]) == "24.0.7"


def test_the_first_server_that_answers_counts(serve: Serve, tmp_path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as dead:
        dead.bind(str(tmp_path / "dead"))
    assert docker_version([str(tmp_path / "none"), str(tmp_path / "dead"), serve(b"nonsense"), serve(ANSWER)]) == "24.0.7"
    assert docker_version([str(tmp_path / "none")]) == docker_version([]) == ""


def test_a_docker_that_hangs_costs_a_moment(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "DOCKER_SECONDS", 0.05)
    assert docker_version([serve(None)]) == ""


def test_a_docker_that_answers_byte_by_byte_costs_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "DOCKER_SECONDS", 0.05)
    monkeypatch.setattr(inventory, "DOCKER_BYTES_MAX", 1000)
    sent: list[bytes] = []

    def drip() -> None:
        """One byte whenever the client has waited for a moment, until it hangs up."""
        connection, _ = server.accept()
        with closing(connection), suppress(ConnectionError):
            connection.recv(4096)
            connection.settimeout(0.005)
            while True:
                try:
                    if not connection.recv(1):
                        break
                except TimeoutError:
                    connection.sendall(b"x")
                    sent.append(b"x")

    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as server:
        server.bind(str(tmp_path / "slow"))
        server.listen()
        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        assert docker_version([str(tmp_path / "slow")]) == ""
        thread.join(LIMIT_SECONDS)
    assert 0 < len(sent) < 500


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"HTTP/1.0 500 Oops\r\n\r\n", b"\r\n\r\n[]", b"\r\n\r\n{}", b'\r\n\r\n{"Version": 24}', b"\xff" * 200_000,
        b'\r\n\r\n{"Version": "24\\u001b[2J"}', b'\r\n\r\n"Version"', b"\r\n\r\n" + b"[" * 60_000,
        b'\r\n\r\n{"Version": "24", "more": "' + b"x" * inventory.DOCKER_BYTES_MAX + b'"}',
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_no_docker(serve: Serve, answer: bytes) -> None:
    assert docker_version([serve(answer)]) == ""


def build(folder: Path, key: str, state: str, used: float) -> None:
    (folder / key).mkdir(parents=True)
    (folder / key / ".complete").write_text(state)
    os.utime(folder / key / ".complete", (used, used))


def test_cached_environments_are_told_by_the_heads_of_their_keys_the_last_used_first(tmp_path: Path) -> None:
    build(tmp_path, "a" * 32, DURABLE, 100.0)
    build(tmp_path, "b" * 32, boot_id(), 300.0)
    build(tmp_path, "c" * 32, DURABLE, 200.0)
    build(tmp_path, "d" * 32, "an earlier boot", 400.0)
    build(tmp_path, "e" * 32 + ".old-1234", DURABLE, 500.0)
    (tmp_path / ("f" * 32)).mkdir()
    (tmp_path / ("a" * 32 + ".lock")).touch()
    assert cached_environments(tmp_path) == ("b" * 8, "c" * 8, "a" * 8)
    assert cached_environments(tmp_path / "none") == ()


def test_of_many_environments_the_last_used_are_told(tmp_path: Path) -> None:
    for n in range(ENVIRONMENTS_MAX + 4):
        build(tmp_path, f"{n:032}"[::-1], DURABLE, float(n + 1))
    assert len(cached_environments(tmp_path)) == ENVIRONMENTS_MAX
    assert cached_environments(tmp_path)[0] == f"{ENVIRONMENTS_MAX + 3:032}"[::-1][:8]


def test_the_inventory_is_looked_at_now_and_then(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "environments"
    known = Inventory(folder, [serve(ANSWER)])
    assert known.versions("", "").docker == ""
    known.look(1000.0)
    told = known.versions("550.54.14", "12.4")
    assert (told.docker, told.driver, told.cuda) == ("24.0.7", "550.54.14", "12.4")
    assert (told.kernel, bool(told.python), bool(told.system)) == (os.uname().release, True, True)
    build(folder, "a" * 32, DURABLE, 1.0)
    seen = []
    for now in (1000.0 + LOOK_SECONDS - 0.1, 1000.0 + LOOK_SECONDS):
        known.look(now)
        seen.append(known.environments)
    assert seen == [(), ("a" * 8,)]
