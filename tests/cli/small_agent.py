"""An agent that knows nothing but fixed answers: HTTP over the Unix socket of a home, for tests of client and commands."""

import json
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from meshq import control
from meshq.config import Home
from meshq.pieces import Piece, encode_piece

COOKIE = "a-cookie-for-tests"


@dataclass
class Answer:
    """What to answer: a document, bytes (chunked if `chunks` has any), or an error; cut off in its middle if `cut`."""

    document: Any = None
    status: int = 200
    chunks: tuple[bytes, ...] | None = None
    cut: bool = False


def error(code: str, message: str, hint: str = "", status: int = 400) -> Answer:
    return Answer({"error": {"code": code, "message": message, "hint": hint}}, status)


def pieces(*texts: bytes, attempt: int = 1, offset: int = 0, cut: bool = False) -> Answer:
    """A followed log: these pieces of one attempt, the first of which stands at `offset`."""
    frames = [encode_piece(piece(attempt, offset))]
    for text in texts:
        frames.append(encode_piece(piece(attempt, offset, text)))
        offset += len(text)
    return Answer(chunks=tuple(frames), cut=cut)


def piece(attempt: int, offset: int, data: bytes = b"", broke_off: bool = False) -> Piece:
    fence, peer = f"{attempt}.{'p' * 26}.1.7", f"lab-{attempt}"
    return Piece(fence=fence, attempt=attempt, peer=peer, offset=offset, data=data, broke_off=broke_off)


def together(*answers: Answer) -> Answer:
    """One answer with all their chunks, cut if the last one is."""
    return Answer(chunks=tuple(chunk for answer in answers for chunk in answer.chunks or ()), cut=answers[-1].cut)


@dataclass
class SmallAgent:
    """`answers` maps "METHOD path" to what is answered; a list is used up one by one, its last for ever."""

    home: Home
    answers: dict[str, Answer | list[Answer]] = field(default_factory=dict)
    requests: list[tuple[str, bytes]] = field(default_factory=list)

    def set(self, route: str, *answers: Any) -> None:
        found = [each if isinstance(each, Answer) else Answer(each) for each in answers]
        self.answers[route] = found

    def answer(self, route: str) -> Answer:
        found = self.answers.get(route)
        if found is None:
            return error("usage", f"no answer for {route}")
        if isinstance(found, list):
            return found.pop(0) if len(found) > 1 else found[0]
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    agent: ClassVar[SmallAgent]

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.agent.requests.append((f"{self.command} {self.path}", body))
        if self.headers.get("Authorization") != f"Bearer {COOKIE}":
            self._send(error("usage", "the cookie is wrong", status=403))
        else:
            self._send(self.agent.answer(f"{self.command} {urlsplit(self.path).path}"))

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        if answer.chunks is None:
            data = json.dumps(answer.document).encode()
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if answer.cut else data)
            self.close_connection |= answer.cut
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in answer.chunks:
            self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        self.wfile.flush()
        if answer.cut:
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Serves a socket that listens already: the agent's own `control.listen` made it."""

    daemon_threads = True

    def __init__(self, agent: SmallAgent) -> None:
        handler = type("Handler", (_Handler,), {"agent": agent})
        super().__init__(("", 0), handler)
        self.socket = control.listen(agent.home)
        self._connections: list[Any] = []

    def fileno(self) -> int:
        return self.socket.fileno()

    def get_request(self) -> tuple[Any, Any]:
        connection, address = self.socket.accept()
        self._connections.append(connection)
        return connection, address

    def close_request(self, request: Any) -> None:
        request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no failure of the test."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        """As when an agent dies: nobody listens, and every connection is gone."""
        self.socket.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()


@contextmanager
def running(folder: Path, answers: Mapping[str, Any] | None = None) -> Iterator[SmallAgent]:
    """A small agent in the home `folder` until the end of the block."""
    home = Home(folder)
    home.socket.parent.mkdir(parents=True, exist_ok=True)
    home.cookie.write_text(COOKIE + "\n")
    agent = SmallAgent(home)
    for route, answer in (answers or {}).items():
        agent.set(route, answer)
    server = _Server(agent)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield agent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        home.socket.unlink(missing_ok=True)
