"""TLS contexts that follow the keys of the mesh: made once for a listener or a client, right for each connection.

Whoever listens or calls keeps one context for the life of the agent; it hands each new connection to the context that fits
the ring of now. A server shows a leaf of the key that its caller named. A client shows a leaf of the key in use, except to
who showed a leaf of another key when it was last called: it does not know the one that was named, so it would not accept
a leaf of it. So two peers that have any key in common get through to each other, at the second try at the latest.
"""

import functools
import ssl
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Self, TypeVar

from meshq.config import MEMBERS_MAX
from meshq.trust.certificates import ClientContext, Credentials, authority_name, authority_of, key_named
from meshq.trust.identity import Identity
from meshq.trust.keyring import Keyring

Value = TypeVar("Value")

NAMES_MAX: Final = 2 * MEMBERS_MAX  # that were called and are remembered: peers, and addresses of seeds


class LiveContext(ssl.SSLContext):
    """Chooses, by the name that is called, the context for one connection. By itself it trusts nobody."""

    def __new__(cls, protocol: int, choose: Callable[[str | bytes | None], ssl.SSLContext]) -> Self:
        return super().__new__(cls, protocol)

    def __init__(self, protocol: int, choose: Callable[[str | bytes | None], ssl.SSLContext]) -> None:
        self._choose = choose

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, server_side: bool = False,
        server_hostname: str | bytes | None = None, session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:  # fmt: skip
        """What asyncio and aiohttp call. Blocking code is given no such context."""
        context = self._choose(server_hostname)
        return context.wrap_bio(incoming, outgoing, server_side, server_hostname, session)


class Contexts:
    """The contexts of one peer. `change` before the first use."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._servers: dict[str, ssl.SSLContext] = {}  # by the id of the key whose leaf they show
        self._clients: dict[str, ClientContext] = {}
        self._seeds: dict[str, ClientContext] = {}
        self._keys: dict[str, str] = {}  # ids by the names of their authorities
        self._current = ""
        self._spoken: OrderedDict[str, str] = OrderedDict()  # by the name called: the key that was shown there
        self._strangers: OrderedDict[str, None] = OrderedDict()
        self.server = LiveContext(ssl.PROTOCOL_TLS_SERVER, lambda name: self._servers[self._current])
        self.client = LiveContext(ssl.PROTOCOL_TLS_CLIENT, functools.partial(self._choose, lambda: self._clients))
        self.seed = LiveContext(ssl.PROTOCOL_TLS_CLIENT, functools.partial(self._choose, lambda: self._seeds))

    def change(self, ring: Keyring) -> None:
        """From the next connection on, these keys. Connections that are open stay so: see `admits`."""
        keys = [each.key for each in ring.keys]
        made = {key.id: Credentials(key, self._identity, keys) for key in keys}
        self._servers = {key: each.server_context() for key, each in made.items()}
        for context in self._servers.values():
            context.sni_callback = self._answer
        self._clients = {key: self._listening(each.client_context()) for key, each in made.items()}
        self._seeds = {key: self._listening(each.seed_context()) for key, each in made.items()}
        self._keys = {authority_name(key): key.id for key in keys}
        self._current = ring.current.id
        self._spoken.clear()
        self._strangers.clear()

    def key_of(self, connection: ssl.SSLObject | ssl.SSLSocket) -> str:
        """The id of the key of ours that the other side of a finished handshake has proved to have; empty: it is gone."""
        return self._keys.get(authority_of(connection), "")

    def admits(self, connection: ssl.SSLObject | ssl.SSLSocket) -> bool:
        """Whether an open connection would still be accepted: its key may have been removed since."""
        return self.key_of(connection) != ""

    @property
    def strangers(self) -> tuple[str, ...]:
        """The names that were called last and answered with a key that is unknown here."""
        return tuple(self._strangers)

    def _listening(self, context: ClientContext) -> ClientContext:
        context.on_handshake = functools.partial(self._heard, context.key_id)
        return context

    def _choose(self, contexts: Callable[[], dict[str, ClientContext]], name: str | bytes | None) -> ssl.SSLContext:
        return contexts()[self._spoken.get(str(name), self._current)]

    def _answer(self, connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
        """OpenSSL asks which leaf to show to a caller that sent this name."""
        if (chosen := self._servers.get(key_named(name))) is not None:
            connection.context = chosen

    def _heard(self, named: str, name: str, authority: str | None) -> None:
        self._strangers.pop(name, None)
        if authority is None:
            _keep(self._strangers, name, None)
        elif (shown := self._keys.get(authority, named)) != named:
            _keep(self._spoken, name, shown)


def _keep(kept: OrderedDict[str, Value], name: str, value: Value) -> None:
    kept[name] = value
    kept.move_to_end(name)
    if len(kept) > NAMES_MAX:
        kept.popitem(last=False)
