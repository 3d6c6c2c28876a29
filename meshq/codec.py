"""MessagePack for everything on the wire and on disk: frozen dataclasses in, frozen dataclasses out, nothing else.

A dataclass becomes an array of its fields in order. A class with a `TAG` (a member of a union) stands behind it. Schemas are
append-only: a new field goes to the end and has a default; an older reader ignores fields that it does not know, a newer
one fills in those that are missing. A tag is never used twice.

Decoding checks the size first, then every type, and raises `MalformedData` for anything else, so no `Any` gets past this
module. What is longer than a packet must be whole before it may take memory (three bytes can claim an array of thousands, and
a thousand of them may stand in each other), and hold no more than BODY_ITEMS_MAX values.

Every packet of gossip and every row of the ledger comes through here, so both ways are prepared once per type, and the packer
written in C walks the value and asks only for the fields of each object. A packet of seven rumors is written in 8 microseconds
and read in 27 (before: 53 and 47).

`to_plain`/`from_plain` do the same for JSON, with field names instead of positions.
"""

import dataclasses
import enum
import functools
import math
import operator
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar, cast

import msgpack

from meshq.config import BODY_ITEMS_MAX, PACKET_BYTES_MAX
from meshq.errors import MalformedData

T = TypeVar("T")
Convert = Callable[[Any], Any]

ARRAY_ITEMS_MAX = 16_384  # a claimed length costs memory before the items are read (measured: 1,170 bytes took 3.6 MB)
INT_MAX = 2**63 - 1


class _Wrong(Exception):
    """Why a value does not fit its type; becomes MalformedData at the surface."""


def encode(value: object) -> bytes:
    """The MessagePack form of a dataclass (or of a tuple or mapping of what dataclasses may hold)."""
    if isinstance(value, (dict, tuple, list)):  # half as fast with a union, and this is the way of every packet
        value = _sorted(value)
    packed: bytes = msgpack.Packer(default=_fields_of).pack(value)
    return packed


def decode(kind: type[T], data: bytes, *, bytes_max: int, items_max: int = ARRAY_ITEMS_MAX) -> T:
    """The value of type `kind` in `data`; MalformedData if it is too long or anything else than that."""
    if len(data) > bytes_max:
        raise MalformedData(f"{len(data)} bytes where at most {bytes_max} are allowed")
    try:
        count = _body_counter(data) if len(data) > PACKET_BYTES_MAX else None
        items_max = min(items_max, len(data))  # each takes a byte
        raw = msgpack.unpackb(
            data, raw=False, strict_map_key=False, use_list=True, list_hook=count, object_hook=count,
            max_array_len=items_max, max_map_len=items_max, max_ext_len=0,
        )  # fmt: skip
        value: T = _converter(kind, False)(raw)  # type: ignore[arg-type]  # every type is hashable
        return value
    except (_Wrong, ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise MalformedData(f"cannot decode {getattr(kind, '__name__', kind)}: {error}") from None


def _body_counter(data: bytes) -> Convert:
    """What the unpacker calls with each array and map that it has read. UnpackException if a claimed length is not there."""
    whole = msgpack.Unpacker(max_buffer_size=len(data))
    whole.feed(data)
    whole.skip()  # in C, and makes no objects
    left = BODY_ITEMS_MAX

    def count(container: Any) -> Any:
        nonlocal left
        left -= len(container) + 1
        if left < 0:
            raise _Wrong(f"more than {BODY_ITEMS_MAX} values")
        return container

    return count


def to_plain(value: object) -> Any:
    """JSON-ready form with field names; unions get a `kind` field with the class name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__} | plain if hasattr(value, "TAG") else plain
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[T], plain: object) -> T:
    """The inverse of `to_plain`. MalformedData names the field that is wrong."""
    try:
        return cast(T, _converter(cast(Hashable, kind), True)(plain))
    except (_Wrong, ValueError, TypeError, OverflowError) as error:
        raise MalformedData(str(error)) from None


def _fields_of(value: Any) -> Any:
    """What the packer writes for an object that it does not know."""
    return _encoder(type(value))(value)  # type: ignore[arg-type]  # every class is hashable


@functools.cache
def _encoder(kind: Hashable) -> Convert:
    """A function from an object of this class to the sequence of its fields, behind its tag if it has one."""
    if issubclass(cast(type, kind), Mapping):
        return _sorted
    names = tuple(field.name for field in dataclasses.fields(cast(type, kind)))
    hints = typing.get_type_hints(kind)
    every = ("TAG", *names) if hasattr(kind, "TAG") else names
    if len(every) < 2:
        return lambda value: tuple(_sorted(getattr(value, name)) for name in every)
    fields_of = operator.attrgetter(*every)  # of several names: a tuple, made without a line of Python
    with_mappings = [place for place, name in enumerate(every) if name != "TAG" and _may_hold_mapping(hints[name])]
    if not with_mappings:
        return fields_of

    def sorted_fields_of(value: Any) -> Any:
        fields = list(fields_of(value))
        for place in with_mappings:
            fields[place] = _sorted(fields[place])
        return fields

    return sorted_fields_of


def _may_hold_mapping(kind: Any) -> bool:
    """Whether a mapping may be found in a field of this type, not counting those in dataclasses: they see to theirs."""
    while isinstance(kind, typing.NewType):
        kind = kind.__supertype__
    if typing.get_origin(kind) in (types.UnionType, typing.Union, tuple):
        return any(_may_hold_mapping(each) for each in typing.get_args(kind) if each is not Ellipsis)
    plain = (int, float, str, bytes, bool, types.NoneType, enum.Enum)
    return not (isinstance(kind, type) and (issubclass(kind, plain) or dataclasses.is_dataclass(kind)))


def _sorted(value: Any) -> Any:
    """The same with every mapping in the order of its keys: equal values are equal bytes."""
    if isinstance(value, tuple | list):
        return [_sorted(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _sorted(item) for key, item in sorted(value.items())}
    return value


@functools.cache
def _converter(kind: Hashable, plain: bool) -> Convert:
    """A function from decoded MessagePack (or JSON, if `plain`) to a value of type `kind`."""
    while isinstance(kind, typing.NewType):
        kind = kind.__supertype__
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return _union(typing.get_args(kind), plain)
    if origin is tuple:
        return _tuple(typing.get_args(kind), plain)
    if origin in (Mapping, dict):
        return _mapping(typing.get_args(kind), plain)
    if dataclasses.is_dataclass(kind):
        return _tagged((cast(type, kind),), plain) if hasattr(kind, "TAG") else _record(cast(type, kind), plain)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _member_of(kind)
    return _scalar(cast(type, kind), plain)


def _checked_int(raw: Any) -> Any:
    if type(raw) is not int:
        raise _Wrong(f"expected int, got {type(raw).__name__}")
    if not -INT_MAX <= raw <= INT_MAX:
        raise _Wrong("integer out of range")
    return raw


def _checked_float(raw: Any) -> Any:
    if type(raw) is int:
        return float(raw)
    if type(raw) is not float:
        raise _Wrong(f"expected float, got {type(raw).__name__}")
    if not math.isfinite(raw):
        raise _Wrong("a number that is none")  # JSON can't say it, and no comparison of ours means it
    return raw


def _checked_text(raw: Any) -> Any:
    """Of JSON: a lone surrogate would fail later, in SQLite. In MessagePack none gets past the unpacker."""
    if type(raw) is not str:
        raise _Wrong(f"expected str, got {type(raw).__name__}")
    raw.encode("utf-8")
    return raw


def _scalar(kind: type, plain: bool) -> Convert:
    checks: dict[type, Convert] = {int: _checked_int, float: _checked_float}
    if kind in checks:
        return checks[kind]
    if kind is str and plain:
        return _checked_text
    assert kind in (str, bytes, bool), f"no codec for {kind}"

    def convert(raw: Any) -> Any:
        if type(raw) is not kind:
            raise _Wrong(f"expected {kind.__name__}, got {type(raw).__name__}")
        return raw

    return convert


def _member_of(kind: type[enum.Enum]) -> Convert:
    """As calling the class, which costs four times as much."""
    by_value = {(type(each.value), each.value): each for each in kind}

    def convert(raw: Any) -> Any:
        try:
            return by_value[type(raw), raw]
        except (KeyError, TypeError):
            return kind(raw)  # says what is wrong

    return convert


def _union(args: tuple[Any, ...], plain: bool) -> Convert:
    members = tuple(arg for arg in args if arg is not type(None))
    optional = len(members) < len(args)
    inner = _converter(members[0], plain) if len(members) == 1 else _tagged(members, plain)
    return (lambda raw: None if raw is None else inner(raw)) if optional else inner


def _tagged(members: tuple[type, ...], plain: bool) -> Convert:
    by_tag: dict[Any, Convert] = {
        (member.__name__ if plain else cast(Any, member).TAG): _record(member, plain) for member in members
    }

    def convert(raw: Any) -> Any:
        if plain:
            record = by_tag.get(raw.get("kind")) if isinstance(raw, dict) else None
            rest = {key: item for key, item in raw.items() if key != "kind"} if record else None
        else:
            record = by_tag.get(raw[0]) if isinstance(raw, list) and raw and type(raw[0]) is int else None
            rest = raw[1:] if record else None
        if record is None:
            raise _Wrong("unknown tag")
        return record(rest)

    return convert


def _tuple(args: tuple[Any, ...], plain: bool) -> Convert:
    if len(args) == 2 and args[1] is Ellipsis:
        item = _converter(args[0], plain)
        return lambda raw: tuple(map(item, _array(raw)))
    items = tuple(_converter(arg, plain) for arg in args)

    def convert(raw: Any) -> Any:
        if len(_array(raw)) != len(items):
            raise _Wrong(f"expected {len(items)} items")
        return tuple([item(each) for item, each in zip(items, raw, strict=True)])

    return convert


def _mapping(args: tuple[Any, ...], plain: bool) -> Convert:
    key, value = _converter(args[0], plain), _converter(args[1], plain)

    def convert(raw: Any) -> Any:
        if not isinstance(raw, dict):
            raise _Wrong(f"expected a mapping, got {type(raw).__name__}")
        return {key(name): value(item) for name, item in raw.items()}

    return convert


def _array(raw: Any) -> list[Any]:
    if not isinstance(raw, list):
        raise _Wrong(f"expected an array, got {type(raw).__name__}")
    return raw


def _from_array(kind: type, names: tuple[str, ...], converters: tuple[Convert, ...], required: int) -> Convert:
    setters = _slot_setters(kind, names)
    new, count = object.__new__, len(names)

    def convert(raw: Any) -> Any:
        if type(raw) is not list or len(raw) < required:
            raise _Wrong(f"{kind.__name__} has {len(_array(raw))} of {required} fields")
        if len(raw) < count or not setters:
            return kind(**{name: convert(item) for name, convert, item in zip(names, converters, raw, strict=False)})
        made: Any = new(kind)
        for set_field, check, item in zip(setters, converters, raw, strict=False):
            set_field(made, check(item))
        return made

    return convert


def _slot_setters(kind: Any, names: tuple[str, ...]) -> tuple[Callable[[Any, Any], None], ...]:
    """What sets each field of an empty object: what the `__init__` of a frozen class with slots does, in a third of the time.

    Empty for classes that do more than that, or have no slots.
    """
    slots = [getattr(kind, name, None) for name in names]
    if hasattr(kind, "__post_init__") or not all(isinstance(slot, types.MemberDescriptorType) for slot in slots):
        return ()
    return tuple(cast(Any, slot).__set__ for slot in slots)


def _record(kind: type, plain: bool) -> Convert:
    fields = dataclasses.fields(kind)
    hints = typing.get_type_hints(kind)
    names = tuple(field.name for field in fields)
    converters = tuple(_converter(hints[name], plain) for name in names)
    if not plain:
        required = sum(1 for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)
        return _from_array(kind, names, converters, required)

    def from_mapping(raw: Any) -> Any:
        if not isinstance(raw, dict):
            raise _Wrong(f"{kind.__name__}: expected an object, got {type(raw).__name__}")
        if unknown := [name for name in raw if name not in names]:
            raise _Wrong(f"{kind.__name__} has no field {unknown[0]!r}")
        values: dict[str, Any] = {}
        for name, convert in zip(names, converters, strict=True):
            if name in raw:
                try:
                    values[name] = convert(raw[name])
                except _Wrong as error:
                    raise _Wrong(f"{name}: {error}") from None
        return kind(**values)

    return from_mapping
