"""The codec: what goes in comes out, and anything else is one kind of error."""

import dataclasses
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshq import codec
from meshq.errors import MalformedData
from meshq.ids import ActorId, Dot, Fence, TaskId
from meshq.task import EndKind, Environment, Gpu, Isolation, Needs, Outcome, OutputFile, Source, TaskSpec, Telemetry

LIMIT = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Apple:
    TAG: ClassVar[int] = 1
    weight: int
    dot: Dot
    seen: Mapping[ActorId, int]
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pear:
    TAG: ClassVar[int] = 2
    name: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Basket:
    fruit: tuple[Apple | Pear, ...]
    sizes: tuple[int, float] = (1, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BasketOfNextYear:
    fruit: tuple[Apple | Pear, ...]
    sizes: tuple[int, float] = (1, 2.0)
    owner: str = "nobody"


APPLE = Apple(weight=3, dot=Dot(ActorId("a.1"), 2), seen={ActorId("a.1"): 2}, names=("x",))
BASKET = Basket(fruit=(APPLE, Pear(name=None)))

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.integers(-(2**63) + 1, 2**63 - 1)
specs = st.builds(
    TaskSpec,
    name=texts,
    argv=st.lists(texts, max_size=4).map(tuple),
    submitted_by=texts,
    submitted_at=st.floats(0, 1e10),
    submitted_peer=texts,
    needs=st.builds(Needs, cpus=numbers, labels=st.dictionaries(texts, texts, max_size=3)),
    source=st.builds(Source, commit=st.none() | texts, folder=texts),
    environment=st.builds(Environment, lock=texts, needs_python=st.booleans()),
    env=st.dictionaries(texts, texts, max_size=3),
    time_limit=st.none() | st.floats(0, 1e9),
    isolation=st.sampled_from([each.value for each in Isolation]),
    retry_of=st.none() | texts.map(TaskId),
)


@given(specs)
def test_a_task_survives_the_wire_and_json(spec: TaskSpec) -> None:
    assert codec.decode(TaskSpec, codec.encode(spec), bytes_max=LIMIT) == spec
    assert codec.from_plain(TaskSpec, codec.to_plain(spec)) == spec


def test_unions_mappings_and_nested_classes_survive() -> None:
    assert codec.decode(Basket, codec.encode(BASKET), bytes_max=LIMIT) == BASKET
    assert codec.from_plain(Basket, codec.to_plain(BASKET)) == BASKET


def test_a_class_with_a_tag_carries_it_also_when_it_stands_alone() -> None:
    assert msgpack.unpackb(codec.encode(Pear(name="p"))) == [2, "p"]
    assert codec.decode(Pear, codec.encode(Pear(name="p")), bytes_max=LIMIT) == Pear(name="p")


def test_enumerations_survive_by_value() -> None:
    outcome = Outcome(kind=EndKind.RELEASED, outputs=(OutputFile(path="a", bytes=1, sha256="b"),))
    assert codec.decode(Outcome, codec.encode(outcome), bytes_max=LIMIT) == outcome


def test_a_telemetry_record_of_eight_gpus_fits_one_packet() -> None:
    gpus = tuple(Gpu(index=n, uuid="GPU-" + "a" * 36, name="NVIDIA H100", memory_bytes=80 << 30) for n in range(8))
    assert len(codec.encode(Telemetry(gpus=gpus, queues=("default", "gpu"), running=(TaskId("a" * 16),) * 8))) <= 1_000


def test_an_older_reader_ignores_new_fields_and_a_newer_one_fills_in_old_ones() -> None:
    new = BasketOfNextYear(fruit=(APPLE,), owner="me")
    assert codec.decode(Basket, codec.encode(new), bytes_max=LIMIT) == Basket(fruit=(APPLE,))
    assert codec.decode(BasketOfNextYear, codec.encode(BASKET), bytes_max=LIMIT).owner == "nobody"


@pytest.mark.parametrize(
    "raw",
    [
        [], None, 7, {"fruit": []}, [[[9, "x"]]], [[["1", "x"]]], [[[]]], [["x"]], [[[2, 5]]], [[], [1, "x"]], [[], [1]],
        [[[1, 2**64 - 1, ["a.1", 1], {}]]], [[[1, True, ["a.1", 1], {}]]], [[[1, 1, ["a.1"], {}]]], [[[1, 1, ["a.1", 1], []]]],
    ],
)  # fmt: skip
def test_what_does_not_fit_the_type_is_malformed(raw: object) -> None:
    with pytest.raises(MalformedData):
        codec.decode(Basket, msgpack.packb(raw), bytes_max=LIMIT)


@given(st.binary(max_size=200))
def test_garbage_is_malformed_or_decodes(data: bytes) -> None:
    try:
        basket = codec.decode(Basket, data, bytes_max=LIMIT)
    except MalformedData:
        return
    assert isinstance(basket, Basket)


def test_the_size_is_checked_before_anything_is_read() -> None:
    with pytest.raises(MalformedData, match="at most 10"):
        codec.decode(Basket, codec.encode(BASKET), bytes_max=10)


def test_claimed_lengths_beyond_the_limit_are_refused() -> None:
    with pytest.raises(MalformedData):
        codec.decode(Basket, b"\xdc\x04\x92" * 390, bytes_max=LIMIT, items_max=256)


def memory_for(data: bytes) -> tuple[str, int]:
    """Why these bytes were refused, and what it took at its peak to find out."""
    tracemalloc.start()
    try:
        with pytest.raises(MalformedData) as refused:
            codec.decode(Basket, data, bytes_max=2**23)
        return refused.value.message, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def array(*items: bytes) -> bytes:
    """What begins an array in MessagePack and counts up to 65,535 items, and these."""
    return b"\xdc" + len(items).to_bytes(2, "big") + b"".join(items)


@pytest.mark.parametrize("empty", [b"\x90", b"\x80", b"\x91\x01", b"\x81\x01\x01"], ids=["list", "map", "of one", "map of one"])
def test_small_bytes_do_not_become_millions_of_objects(empty: bytes) -> None:
    bomb = array(*[array(*[empty] * 4_096)] * 512)
    message, peak = memory_for(bomb)
    assert "more than 524288 values" in message
    assert len(bomb) >= 2**21 and peak < 100 * 2**20


def test_a_body_of_many_values_that_each_are_something_is_read() -> None:
    apples = tuple(dataclasses.replace(APPLE, names=("",) * 16_000) for _ in range(32))
    basket = Basket(fruit=apples)
    assert codec.decode(Basket, codec.encode(basket), bytes_max=LIMIT) == basket


@pytest.mark.parametrize("length", [1_300, 8_192, LIMIT])
def test_arrays_in_arrays_that_claim_what_is_not_there_take_no_memory(length: int) -> None:
    bomb = (b"\xdc\x3e\x80" * length)[:length]
    _, peak = memory_for(bomb)
    assert peak < 2**16 + 2 * length, "it took 66 MiB for each 3,000 bytes"


def test_json_errors_name_the_field() -> None:
    with pytest.raises(MalformedData, match="needs: cpus: expected int, got str"):
        codec.from_plain(TaskSpec, {"needs": {"cpus": "many"}})
    with pytest.raises(MalformedData, match="no field 'nme'"):
        codec.from_plain(TaskSpec, {"nme": "x"})
    with pytest.raises(MalformedData):
        codec.from_plain(TaskSpec, {"name": "x"})
    with pytest.raises(MalformedData):
        codec.from_plain(Pear, {"kind": "Pear", "name": "\ud800"})


@dataclass(frozen=True)
class Holder:
    fences: Mapping[Fence, int] = field(default_factory=dict)


def test_mappings_are_written_in_the_order_of_their_keys() -> None:
    one, two = Holder({Fence("b"): 1, Fence("a"): 2}), Holder({Fence("a"): 2, Fence("b"): 1})
    assert codec.encode(one) == codec.encode(two)


@dataclass(frozen=True, slots=True)
class Stone:
    """No field but a tag."""

    TAG: ClassVar[int] = 3


@dataclass(frozen=True, slots=True)
class Shelf:
    """One field and no tag; mappings where they are easily overlooked."""

    rows: tuple[Mapping[str, tuple[Mapping[str, int], ...]] | None, ...]


@dataclass(frozen=True, slots=True)
class Even:
    number: int

    def __post_init__(self) -> None:
        if self.number % 2:
            raise ValueError("odd")


def by_the_rule(value: Any) -> Any:
    """The form of the module's first paragraph, without any of its haste: what every release has written."""
    if isinstance(value, str | bytes | bool | int | float) or value is None:
        return value
    if isinstance(value, tuple | list):
        return [by_the_rule(item) for item in value]
    if isinstance(value, Mapping):
        return {key: by_the_rule(item) for key, item in sorted(value.items())}
    fields = [by_the_rule(getattr(value, each.name)) for each in dataclasses.fields(value)]
    return [value.TAG, *fields] if hasattr(value, "TAG") else fields


counted = st.dictionaries(texts, numbers, max_size=4)
apples = st.builds(
    Apple,
    weight=numbers,
    dot=st.builds(Dot, texts.map(ActorId), numbers),
    seen=st.dictionaries(texts.map(ActorId), numbers, max_size=4),
    names=st.lists(texts, max_size=2).map(tuple),
)
rows = st.none() | st.dictionaries(texts, st.tuples(counted, counted), max_size=3)
shelves = st.builds(Shelf, st.lists(rows, max_size=3).map(tuple))
baskets = st.builds(Basket, fruit=st.lists(apples | st.builds(Pear, name=st.none() | texts), max_size=3).map(tuple))
everything = st.one_of(
    specs, apples, shelves, baskets, st.just(Stone()),
    counted, counted.map(MappingProxyType), st.lists(apples, max_size=2).map(tuple),
)  # fmt: skip


@given(everything)
def test_every_value_has_the_bytes_that_the_rule_gives_it(value: object) -> None:
    assert codec.encode(value) == msgpack.packb(by_the_rule(value), use_bin_type=True)


def test_the_bytes_of_a_known_value_never_change() -> None:
    shelf = Shelf(rows=({"b": (), "a": ({"d": 1, "c": 2},)}, None))
    assert codec.encode(BASKET).hex() == "929295010392a3612e310281a3612e310291a1789202c09201cb4000000000000000"
    assert codec.encode(shelf).hex() == "919282a1619182a16302a16401a16290c0"
    assert codec.encode(Stone()).hex() == "9103"


@given(shelves)
def test_mappings_inside_of_tuples_survive(shelf: Shelf) -> None:
    assert codec.decode(Shelf, codec.encode(shelf), bytes_max=LIMIT) == shelf


def test_what_is_decoded_is_as_good_as_what_was_made() -> None:
    apple = codec.decode(Apple, codec.encode(APPLE), bytes_max=LIMIT)
    pear = codec.decode(Pear, codec.encode(Pear(name="p")), bytes_max=LIMIT)
    assert repr(apple) == repr(APPLE) and dataclasses.replace(apple, weight=4).weight == 4
    assert hash(pear) == hash(Pear(name="p"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        pear.name = "q"  # type: ignore[misc]  # it must not be possible


def test_a_class_that_checks_itself_does_so_when_it_is_decoded() -> None:
    assert codec.decode(Even, codec.encode(Even(2)), bytes_max=LIMIT) == Even(2)
    with pytest.raises(MalformedData, match="odd"):
        codec.decode(Even, msgpack.packb([1]), bytes_max=LIMIT)


@pytest.mark.parametrize("value", [7, True, 1.0, None, "nothing", [], b"lost"])
def test_a_value_that_is_none_of_the_enumeration_is_malformed(value: object) -> None:
    with pytest.raises(MalformedData):
        codec.decode(Outcome, msgpack.packb([value]), bytes_max=LIMIT)
