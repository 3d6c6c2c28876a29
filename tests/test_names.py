"""Unique names: who is there keeps its name, who comes takes another one, and all agree in the end."""

from dataclasses import replace
from itertools import count
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from meshq.config import NAME_CHARS_MAX
from meshq.gossip.member import Liveness, Member, merge
from meshq.ids import Epoch, PeerId
from meshq.names import STEPS, HeldName, first_name, free_name

A, B, C, D = (PeerId(letter * 52) for letter in "abcd")
WANTED = ("lab", "lab-2", "gpu")


def member(peer: PeerId, name: str = "lab", named: int = 0, liveness: Liveness = Liveness.ALIVE) -> Member:
    return Member(peer=peer, epoch=Epoch(1), incarnation=0, liveness=liveness, name=name, addresses=(), named=named)


def test_a_newcomer_takes_no_name_from_who_is_there_whatever_their_ids() -> None:
    for there, comes in ((A, B), (B, A)):
        holder, newcomer = member(there, named=2), member(comes)
        assert free_name("lab", newcomer, [holder, newcomer]) == "lab-2"
        assert free_name("lab", holder, [holder, newcomer]) == "lab"


def test_of_two_that_took_a_name_at_the_same_moment_the_smaller_id_keeps_it() -> None:
    both = [member(A, named=1), member(B, named=1)]
    assert [free_name("lab", each, both) for each in both] == ["lab", "lab-2"]


def test_the_suffix_is_one_of_the_wanted_name_and_the_first_that_nobody_has() -> None:
    me = member(C, "lab-2")
    others = [member(A, "lab"), member(B, "lab-2", named=1)]
    assert free_name("lab", me, [*others, me]) == "lab-3"
    assert free_name("lab", me, [*others, member(D, "lab-3"), me]) == "lab-4"


def test_who_has_a_name_to_itself_keeps_it_though_the_wanted_one_became_free() -> None:
    assert free_name("lab", member(B, "lab-2"), [member(A, "gpu", named=3)]) == "lab-2"


def test_the_dead_are_expected_back_and_those_who_left_are_not() -> None:
    for liveness, name in ((Liveness.SUSPECT, "lab-2"), (Liveness.DEAD, "lab-2"), (Liveness.LEFT, "lab")):
        assert free_name("lab", member(A), [member(B, named=1, liveness=liveness)]) == name


def test_the_longest_name_with_a_suffix_is_still_a_name() -> None:
    long = "x" * NAME_CHARS_MAX
    assert free_name(long, None, [member(A, long)]) == "x" * (NAME_CHARS_MAX - 2) + "-2"


def test_who_starts_has_the_name_of_the_last_run_and_none_of_those_who_are_remembered() -> None:
    lab = member(A, liveness=Liveness.DEAD)
    held = HeldName(peer=B, wanted="lab", name="lab-3", named=1)
    assert first_name("lab", None, []) == "lab"
    assert first_name("lab", None, [lab]) == "lab-2"
    assert first_name("lab", held, [lab]) == "lab-3"
    assert first_name("lab", held, []) == "lab", "nobody has it any more"
    assert first_name("lab", HeldName(peer=B, wanted="lab", name="lab", named=2), [lab]) == "lab", (
        "it had it, too: they will see"
    )


class Machine:
    """One peer, and what it believes of all. It comes anew, or after a run in which it had a name."""

    def __init__(self, number: int, wanted: str) -> None:
        self.wanted = wanted
        self.renames = 0
        self.me = member(PeerId(f"{number:052d}"), wanted)
        self.beliefs = {self.me.peer: self.me}

    def say(self, name: str, named: int) -> None:
        self.renames += name != self.me.name
        self.me = replace(self.me, incarnation=self.me.incarnation + 1, name=name, named=named)
        self.beliefs[self.me.peer] = self.me

    def hear(self, said: Member) -> None:
        if said.peer != self.me.peer:
            self.beliefs[said.peer] = merge(said, self.beliefs.get(said.peer, said))
            name = free_name(self.wanted, self.me, self.beliefs.values())
            if name != self.me.name:
                self.say(name, 0)

    def age(self) -> None:
        if self.me.named < len(STEPS):
            self.say(self.me.name, self.me.named + 1)

    def restart(self) -> None:
        """It remembers its name, and whom it knew."""
        held = HeldName(peer=self.me.peer, wanted=self.wanted, name=self.me.name, named=self.me.named)
        others = [belief for belief in self.beliefs.values() if belief.peer != self.me.peer]
        name = first_name(self.wanted, held, others)
        named = held.named if name == held.name else 0
        self.me = replace(self.me, epoch=Epoch(self.me.epoch + 1), incarnation=0, name=name, named=named)
        self.beliefs[self.me.peer] = self.me


def talk(machines: list[Machine], rng: Random, words: int) -> None:
    """So many of their beliefs, old and new, reach one of the others each."""
    for _ in range(words if len(machines) > 1 else 0):
        teller, hearer = rng.sample(machines, 2)
        hearer.hear(rng.choice(list(teller.beliefs.values())))


def settle(machines: list[Machine], rng: Random) -> None:
    """All hear all, in any order, until nothing is new."""
    for rounds in count():
        assert rounds < 4 * len(machines), "they go on renaming themselves"
        before = [machine.me for machine in machines]
        pairs = [(teller, hearer) for teller in machines for hearer in machines]
        for teller, hearer in rng.sample(pairs, len(pairs)):
            for belief in list(teller.beliefs.values()):
                hearer.hear(belief)
        if before == [machine.me for machine in machines] and all(
            machine.beliefs == machines[0].beliefs for machine in machines
        ):
            return


def check(machines: list[Machine]) -> None:
    names = [machine.me.name for machine in machines]
    assert len(set(names)) == len(names)
    for machine in machines:
        suffix = machine.me.name.removeprefix(machine.wanted)
        assert not suffix or suffix.removeprefix("-").isdigit(), f"{machine.me.name} for {machine.wanted}"


def live(machines: list[Machine], rng: Random) -> None:
    """They come in any order, grow older, restart, and hear some of what is said on their side."""
    here: list[Machine] = []
    for machine in rng.sample(machines, len(machines)):
        here.append(machine)
        for _ in range(rng.randrange(4)):
            talk(here, rng, rng.randrange(6))
            rng.choice(here).age()
        if rng.random() < 0.3:
            rng.choice(here).restart()


@given(st.lists(st.sampled_from(WANTED), min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_two_healed_sides_have_unique_names_without_chains_and_then_keep_them(wanted: list[str], rng: Random) -> None:
    machines = [Machine(number, name) for number, name in enumerate(wanted)]
    rng.shuffle(machines)
    cut = rng.randrange(len(machines))
    for side in (machines[:cut], machines[cut:]):
        live(side, rng)
    talk(machines, rng, rng.randrange(40))
    settle(machines, rng)
    check(machines)
    names = [machine.me.name for machine in machines]
    for machine in machines:
        machine.age()
    settle(machines, rng)
    assert [machine.me.name for machine in machines] == names, "growing older changes nothing"


@given(st.lists(st.sampled_from(WANTED), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_nobody_who_comes_renames_anybody_who_was_there(wanted: list[str], rng: Random) -> None:
    """Their ids are in any order."""
    numbers = rng.sample(range(100), len(wanted) + 1)
    there = [Machine(numbers[0], "lab")]
    there[0].age()
    for number, name in zip(numbers[1:], wanted, strict=True):
        before = [machine.renames for machine in there]
        newcomer = Machine(number, name)
        talk([*there, newcomer], rng, rng.randrange(10))
        settle([*there, newcomer], rng)
        assert [machine.renames for machine in there] == before
        newcomer.age()
        there.append(newcomer)
        settle(there, rng)
    check(there)
    assert there[0].me.name == "lab"


@given(st.lists(st.sampled_from(WANTED), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_a_name_survives_the_restart_of_its_peer(wanted: list[str], rng: Random) -> None:
    machines = [Machine(number, name) for number, name in enumerate(wanted)]
    settle(machines, rng)
    names = [machine.me.name for machine in machines]
    for machine in rng.sample(machines, len(machines)):
        machine.restart()
        talk(machines, rng, rng.randrange(6))
    settle(machines, rng)
    assert [machine.me.name for machine in machines] == names
