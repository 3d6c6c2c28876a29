"""`scripts/soak partitions`: machines in network namespaces are cut off from each other while tasks run, and healed.

Each cut is between two random sides. One in three is one-way: the one side is not heard by the other any more. Then all is
healed and the seconds are counted until all ledgers are equal, while tasks go on. Needs root and iptables.
"""

from soaks.field import Field
from soaks.place import Place, now
from tests.processes.mesh import Mesh
from tests.processes.netns import Lan, Machine, lan

PORT = 7733
SHORT = (2.0, 10.0)  # seconds
LONG = (20.0, 40.0)
ONE_WAY = 1 / 3
EQUAL_LIMIT = 60.0  # for the ledgers to be equal; what takes longer than the checker allows is counted to here
STOPPING = 0.3  # the share of tasks under `--on-isolation stop`
BETWEEN = (1.0, 4.0)  # seconds from equal ledgers to the next cut


def run(place: Place, *, seconds: tuple[float, float] = (3.0, 25.0), slots: int = 2) -> None:
    """All cuts that are still to do, in random order of their kinds."""
    mesh = Mesh(place.folder)
    with lan(place.options.peers) as net:
        agents = [
            mesh.add(name, address=machine.address, port=PORT, netns=machine.netns)
            for name, machine in zip(place.names(), net.machines, strict=True)
        ]
        field = Field(place, mesh, agents, seconds, slots, STOPPING)
        try:
            field.start()
            while left := _left(place):
                kind = field.rng.choices(list(left), list(left.values()))[0]
                _cut_once(field, net, kind)
            place.note("finishing")
            field.finish()
            field.end()
        finally:
            mesh.stop()


def _left(place: Place) -> dict[str, int]:
    """How many cuts of each kind are still to do."""
    done = [entry["kind"] for entry in place.record() if entry["event"] == "equal"]
    left = {"short": place.options.short - done.count("short"), "long": place.options.long - done.count("long")}
    return {kind: count for kind, count in left.items() if count > 0}


def _cut_once(field: Field, net: Lan, kind: str) -> None:
    place, rng = field.place, field.rng
    number = sum(entry["event"] == "cut" for entry in place.record()) + 1
    names = list(place.names())
    rng.shuffle(names)
    size = rng.randint(1, len(names) - 1)
    one, other = sorted(names[:size]), sorted(names[size:])
    one_way = rng.random() < ONE_WAY
    _live(field, rng.uniform(*BETWEEN))

    seconds = rng.uniform(*(SHORT if kind == "short" else LONG))
    machines = dict(zip(place.names(), net.machines, strict=True))
    place.note("cut", number=number, kind=kind, one=one, other=other, one_way=one_way, seconds=seconds)
    _part(tuple(machines[name] for name in one), tuple(machines[name] for name in other), one_way=one_way)
    _live(field, seconds)
    differed, healed = not field.equal(), now()  # healing takes a moment, too, and counts
    lost = sum(machine.forgive() for machine in net.machines)
    place.note("healed", number=number, lost=lost, differed=differed)
    assert lost > 0, "the fault happened"

    while not field.equal() and now() < healed + EQUAL_LIMIT:
        field.tend()
    place.note("equal", number=number, kind=kind, seconds=now() - healed)


def _part(one: tuple[Machine, ...], other: tuple[Machine, ...], *, one_way: bool) -> None:
    """Those of `other` don't hear those of `one` any more; and the other way round, unless it is one-way."""
    for machine in one:
        for far in other:
            far.drop("INPUT", "-s", machine.address)
            if not one_way:
                machine.drop("INPUT", "-s", far.address)


def _live(field: Field, seconds: float) -> None:
    """Tasks go on for so long."""
    until = now() + seconds
    while now() < until:
        field.tend()
        field.feed(most=10**9, open_most=3 * len(field.agents))
