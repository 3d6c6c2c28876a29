"""What a person at this machine may ask of the agent: HTTP with JSON over a Unix socket.

The gate lets in only users who may connect (peer credentials); every request, whatever its method and path, must then show
the cookie before anything else. Handlers only translate: the answers come from the `Desk`.
"""

import functools
import json
import logging
from typing import Any, Final

from aiohttp import web

from meshq import config
from meshq.errors import MalformedData, MeshqError, PeerError, StoreError, TaskFailed, Unplaceable, Unreachable, UsageError
from meshq.gitobjects import decode_frames
from meshq.pieces import CONTENT_TYPE, encode_piece
from meshq.trust.cookie import same_cookie
from meshq.trust.hardening import peer_credentials
from meshq.web.desk import Desk
from meshq.web.following import parse_position
from meshq.web.gate import Handler, read_capped
from meshq.web.streams import answer_in_chunks
from meshq.web.submitting import parse_copies

log = logging.getLogger("meshq.web")

WAIT_SECONDS_MAX: Final = 60.0

_HTTP_STATUS: Final[dict[type[MeshqError], int]] = {
    UsageError: 400,
    MalformedData: 400,
    Unplaceable: 409,
    TaskFailed: 409,
    StoreError: 507,
    Unreachable: 502,
    PeerError: 502,
}

_USER = web.RequestKey("user", int)


class ControlApi:
    """The routes of the Unix socket. `uid` owns the agent. Who may connect at all was decided by the gate."""

    def __init__(self, desk: Desk, cookie: str, uid: int) -> None:
        self._desk = desk
        self._cookie = cookie
        self._uid = uid

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._authenticate, _answer_errors], client_max_size=config.JSON_BYTES_MAX)
        app.add_routes(
            [
                web.get("/v1/me", self._me),
                web.get("/v1/status", self._status),
                web.get("/v1/peers", self._peers),
                web.get("/v1/tasks", self._tasks),
                web.post("/v1/tasks", self._submit),
                web.get("/v1/tasks/{task}", self._show),
                web.get("/v1/tasks/{task}/wait", self._wait),
                web.get("/v1/tasks/{task}/log", self._log),
                web.get("/v1/tasks/{task}/outputs", self._outputs),
                web.get("/v1/tasks/{task}/outputs/{path:[\\s\\S]+}", self._output),
                web.post("/v1/tasks/{task}/cancel", self._cancel),
                web.post("/v1/tasks/{task}/retry", self._retry),
                web.post("/v1/tasks/{task}/move", self._move),
                web.get("/v1/queues", self._queues),
                web.get("/v1/queues/{queue}", self._show_queue),
                web.post("/v1/queues/{queue}/{step:create|delete|pause|resume|clear}", self._change_queue),
                web.get("/v1/retention", self._retention),
                web.post("/v1/retention", self._keep),
                web.post("/v1/objects/missing", self._missing),
                web.post("/v1/objects", self._put),
                web.post("/v1/leave", self._leave),
                web.get("/v1/key", self._key),
                web.get("/v1/keys", self._keys),
                web.post("/v1/keys/{step:install|use|remove}", self._change_key),
                web.get("/v1/doctor", self._doctor),
            ]
        )
        return app

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        transport = request.transport
        socket = transport.get_extra_info("socket") if transport is not None else None
        if socket is None:
            return _failure(UsageError("the connection is gone"), 400)
        _, uid, _ = peer_credentials(socket)
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not same_cookie(given, self._cookie):
            return _failure(UsageError("the cookie is wrong", "the agent was started anew: try again"), 403)
        request[_USER] = uid
        return await handler(request)

    async def _me(self, request: web.Request) -> web.Response:
        return web.json_response(self._desk.me())

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(self._desk.status())

    async def _peers(self, request: web.Request) -> web.Response:
        return web.json_response(self._desk.peers())

    async def _tasks(self, request: web.Request) -> web.Response:
        query = request.query
        limit = _number(query.get("limit", "50"), "limit", 0, 1_000_000)
        return web.json_response(
            self._desk.tasks(queue=query.get("queue"), status=query.get("status"), user=query.get("user"), limit=int(limit))
        )

    async def _submit(self, request: web.Request) -> web.Response:
        document = await _read_json(request)
        if not isinstance(document, dict) or not isinstance(document.get("specs"), list):
            raise UsageError("a submit needs `specs`")
        copies, hold = parse_copies(document.get("copies", 1)), document.get("hold") is True
        answer = await self._desk.submit(request[_USER], document["specs"], hold=hold, copies=copies)
        return web.json_response(answer)

    async def _show(self, request: web.Request) -> web.Response:
        return web.json_response(self._desk.show(request.match_info["task"]))

    async def _wait(self, request: web.Request) -> web.Response:
        seconds = _number(request.query.get("timeout", "30"), "timeout", 0, WAIT_SECONDS_MAX)
        return web.json_response(await self._desk.wait(request.match_info["task"], seconds))

    async def _log(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        attempt = int(_number(query["attempt"], "attempt", 1, 1_000_000)) if "attempt" in query else None
        tail = int(_number(query["tail"], "tail", 0, 1_000_000_000)) if "tail" in query else None
        task = request.match_info["task"]
        if query.get("follow") != "1":
            return await answer_in_chunks(request, self._desk.log(task, attempt=attempt, tail=tail))
        start = parse_position(query["from"]) if "from" in query else None
        pieces = self._desk.follow_log(task, attempt=attempt, tail=tail, start=start)
        return await answer_in_chunks(request, (encode_piece(piece) async for piece in pieces), kind=CONTENT_TYPE)

    async def _outputs(self, request: web.Request) -> web.Response:
        return web.json_response(await self._desk.outputs(request.match_info["task"]))

    async def _output(self, request: web.Request) -> web.StreamResponse:
        async with self._desk.output(request.match_info["task"], request.match_info["path"]) as (size, chunks):
            return await answer_in_chunks(request, chunks, size)

    async def _cancel(self, request: web.Request) -> web.Response:
        return web.json_response(await self._desk.cancel(request[_USER], request.match_info["task"]))

    async def _retry(self, request: web.Request) -> web.Response:
        return web.json_response(await self._desk.retry(request[_USER], request.match_info["task"]))

    async def _move(self, request: web.Request) -> web.Response:
        document = await _read_json(request)
        place, target = (document.get(name, "") if isinstance(document, dict) else None for name in ("place", "target"))
        if not isinstance(place, str) or not isinstance(target, str):
            raise UsageError("a move needs `place`, and `before` and `to` a `target`")
        return web.json_response(await self._desk.queues.move(request.match_info["task"], place, target))

    async def _queues(self, request: web.Request) -> web.Response:
        return web.json_response(self._desk.queues.all())

    async def _show_queue(self, request: web.Request) -> web.Response:
        return web.json_response(self._desk.queues.show(request.match_info["queue"]))

    async def _change_queue(self, request: web.Request) -> web.Response:
        queues, queue, uid = self._desk.queues, request.match_info["queue"], request[_USER]
        match request.match_info["step"]:
            case "create":
                answer = await queues.create(uid, queue)
            case "delete":
                answer = await queues.delete(queue)
            case "pause":
                answer = await queues.pause(uid, queue)
            case "resume":
                answer = await queues.resume(queue)
            case _:
                answer = await queues.clear(uid, queue)
        return web.json_response(answer)

    async def _retention(self, request: web.Request) -> web.Response:
        return web.json_response(self._desk.retention())

    async def _keep(self, request: web.Request) -> web.Response:
        document = await _read_json(request)
        days, tasks = (document.get("days"), document.get("tasks")) if isinstance(document, dict) else ("", "")
        if not isinstance(days, int | float | None) or not isinstance(tasks, int | None):
            raise UsageError("`days` must be a number and `tasks` a whole number, or null")
        return web.json_response(await self._desk.keep(days, tasks))

    async def _missing(self, request: web.Request) -> web.Response:
        document = await _read_json(request, bytes_max=config.SOURCE_FILES_MAX * 64)
        ids = document.get("ids") if isinstance(document, dict) else None
        if not isinstance(ids, list) or not all(isinstance(each, str) for each in ids):
            raise UsageError("`ids` must be a list of object ids")
        return web.json_response({"ids": await self._desk.missing_objects(ids)})

    async def _put(self, request: web.Request) -> web.Response:
        body = await read_capped(request, config.SOURCE_FILE_BYTES_MAX + config.OBJECTS_BATCH_BYTES)
        return web.json_response({"stored": await self._desk.put_objects(decode_frames(body))})

    async def _leave(self, request: web.Request) -> web.Response:
        document = await _read_json(request)
        if request[_USER] not in (0, self._uid):
            raise UsageError("only the user who runs the agent may make it leave")
        if not isinstance(document, dict):
            raise UsageError("a leave needs an object")
        seconds = document.get("timeout")
        if seconds is not None and (type(seconds) not in (int, float) or not 0 <= seconds < float("inf")):
            raise UsageError(f"timeout: {seconds!r} is no number of seconds")
        stuck = await self._desk.leave(drain=document.get("drain") is True, seconds=seconds)
        return web.json_response({"still_running": stuck})

    async def _key(self, request: web.Request) -> web.Response:
        if request[_USER] not in (0, self._uid):
            raise UsageError("only the user who runs the agent may see the mesh key")
        return web.json_response({"key": self._desk.key()})

    async def _keys(self, request: web.Request) -> web.Response:
        return web.json_response(self._desk.keys.document())

    async def _change_key(self, request: web.Request) -> web.Response:
        if request[_USER] not in (0, self._uid):
            raise UsageError("only the user who runs the agent may change the mesh key")
        document = await _read_json(request)
        if not isinstance(document, dict):
            raise UsageError("a change of keys needs an object")
        without, ids = _texts(document, "without"), _texts(document, "ids")
        match request.match_info["step"]:
            case "install":
                key = document.get("key")
                if not isinstance(key, str | None):
                    raise UsageError("`key` must be a text")
                answer = await self._desk.keys.install(key, without)
            case "use":
                answer = await self._desk.keys.use(" ".join(ids), without)
            case _:
                answer = await self._desk.keys.remove(ids, without)
        return web.json_response(answer)

    async def _doctor(self, request: web.Request) -> web.Response:
        return web.json_response(await self._desk.doctor())


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except MeshqError as error:
        return _failure(error, _HTTP_STATUS.get(type(error), 500))
    except web.HTTPException as error:
        return _failure(UsageError(f"{request.method} {request.path}: {error.reason}"), error.status)
    except (ConnectionError, TimeoutError):
        raise
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return _failure(MeshqError("the agent met a bug; its log has the details", "see agent.log in the home"), 500)


def _failure(error: MeshqError, status: int) -> web.Response:
    document = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
    return web.json_response(document, status=status, dumps=functools.partial(json.dumps, ensure_ascii=True))


async def _read_json(request: web.Request, bytes_max: int = config.JSON_BYTES_MAX) -> Any:
    body = await read_capped(request, bytes_max)
    try:
        return json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the request is no JSON: {error}") from None


def _texts(document: dict[str, Any], name: str) -> list[str]:
    found = document.get(name, [])
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise UsageError(f"`{name}` must be a list of texts")
    return found


def _number(text: str, name: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{name}: {text!r} is no number") from None
    if not low <= value <= high:
        raise UsageError(f"{name}: {text} is not between {low:.0f} and {high:.0f}")
    return value
