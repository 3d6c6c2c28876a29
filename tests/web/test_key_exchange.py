"""How rings of keys spread among peers, and what each step of a change needs of them: real keys and files, no network."""

import asyncio
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from meshq.errors import MeshqError, TaskFailed, Unreachable, UsageError
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.roster import KnownPeer
from meshq.ids import Epoch, PeerId
from meshq.peers import Peers
from meshq.task import Telemetry
from meshq.trust import keyring, ring_file
from meshq.trust.certificates import server_name
from meshq.trust.keyholder import KeyHolder
from meshq.trust.keyring import Keyring, ring_of
from meshq.web import key_exchange
from meshq.web.key_exchange import KeyExchange
from meshq.web.key_steps import KeySteps
from tests.trust.test_certificates import member as identity_of
from tests.trust.test_keyholder import in_loop
from tests.trust.test_keyring import K0, K1, K2


class Machine:
    """One peer's keys, and what it believes of the others."""

    def __init__(self, lab: "Lab", name: str, number: int, ring: Keyring) -> None:
        path = lab.folder / f"{name}.key"
        ring_file.save(path, ring)
        self.name = name
        self.identity = identity_of(number)
        self.peer = self.identity.peer
        self.holder = KeyHolder(path, self.identity)
        self.peers = Peers(self.member(Liveness.ALIVE), Telemetry(), 0.0)
        self.exchange = KeyExchange(holder=self.holder, peers=self.peers, ask=self.ask)
        self.steps = KeySteps(self.exchange, self.peers)
        self.answers = True
        self.asked: list[str] = []
        self._lab = lab

    def member(self, liveness: Liveness) -> Member:
        return Member(
            peer=self.peer, epoch=Epoch(1), incarnation=0, liveness=liveness, name=self.name,
            addresses=(Address("127.0.0.1", 1),), version="0.2.0",
        )  # fmt: skip

    async def ask(self, peer: PeerId, body: bytes) -> bytes:
        """What TLS does: nobody gets through without a key in common, and the certificate is of the caller's key."""
        other = self._lab.by_peer(peer)
        self.asked.append(other.name)
        proven = self.holder.ids[0] if self.holder.ids[0] in other.holder.ids else ""
        if not other.answers or not set(self.holder.ids) & set(other.holder.ids):
            raise Unreachable("no answer")
        return await other.exchange.answer(self.peer, proven, body)

    @property
    def ids(self) -> list[str]:
        return list(self.holder.ids)


class Lab:
    """Machines that know each other, ada first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines: list[Machine] = []

    def add(self, name: str, ring: Keyring) -> Machine:
        machine = Machine(self, name, len(self.machines) + 1, ring)
        self.machines.append(machine)
        for other in self.machines[:-1]:
            self.believe(other, machine, Liveness.ALIVE)
            self.believe(machine, other, Liveness.ALIVE)
        return machine

    def believe(self, who: Machine, of: Machine, liveness: Liveness) -> None:
        who.peers.handle_member(1.0, of.member(liveness))

    def everybody_believes(self, of: Machine, liveness: Liveness) -> None:
        for who in self.machines:
            if who is not of:
                self.believe(who, of, liveness)

    def gossip(self) -> None:
        """Everybody hears everybody's telemetry."""
        for who in self.machines:
            for of in self.machines:
                if who is not of:
                    entry = who.peers._entries[of.peer]
                    entry.telemetry = Telemetry(keys=of.holder.ids, ring=of.holder.digest)

    def by_peer(self, peer: PeerId) -> Machine:
        return next(each for each in self.machines if each.peer == peer)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def three(lab: Lab) -> list[Machine]:
    machines = [lab.add(name, ring_of(K0)) for name in ("ada", "bob", "cyd")]
    lab.gossip()
    return machines


# --- the three steps ------------------------------------------------------------------------------------------------


@in_loop
async def test_a_change_of_keys_in_three_steps_reaches_everybody(lab: Lab) -> None:
    ada, bob, cyd = three(lab)
    done = await ada.steps.install(K1.text, ())
    assert done == {"id": K1.id, "peers": ["ada", "bob", "cyd"], "failed": [], "later": [], "left_out": []}
    assert [each.ids for each in (ada, bob, cyd)] == [[K0.id, K1.id]] * 3

    assert await bob.steps.use(K1.id, ()) == {"id": K1.id, "peers": ["ada", "bob", "cyd"], "failed": []}
    assert [each.holder.text for each in (ada, bob, cyd)] == [K1.text] * 3

    assert (await cyd.steps.remove([K0.id], ()))["stranded"] == []
    assert [each.ids for each in (ada, bob, cyd)] == [[K1.id]] * 3
    assert [each.holder.mesh_id for each in (ada, bob, cyd)] == [K0.mesh_id] * 3
    assert len({each.holder.digest for each in (ada, bob, cyd)}) == 1


@in_loop
async def test_each_step_may_be_repeated_anywhere(lab: Lab) -> None:
    ada, bob, cyd = three(lab)
    first = await ada.steps.install(None, ())
    assert (await bob.steps.install(None, ()))["id"] == first["id"]
    for machine in (ada, bob):
        await machine.steps.use(first["id"], ())
    for machine in (cyd, ada):
        await machine.steps.remove([K0.id], ())
    assert {each.holder.digest for each in (ada, bob, cyd)} == {ada.holder.digest}


@in_loop
async def test_using_is_refused_while_a_live_machine_does_not_answer_and_names_it(lab: Lab) -> None:
    ada, bob, cyd = three(lab)
    await ada.steps.install(K1.text, ())
    cyd.answers = False
    lab.everybody_believes(cyd, Liveness.SUSPECT)  # no verdict: it counts as alive
    with pytest.raises(TaskFailed, match="cyd does not answer") as caught:
        await ada.steps.use(K1.id, ())
    assert "bob" not in caught.value.message and "--without" in caught.value.hint
    assert [each.holder.text for each in (ada, bob, cyd)] == [K0.text] * 3
    lab.everybody_believes(cyd, Liveness.DEAD)
    assert (await ada.steps.use(K1.id, ()))["peers"] == ["ada", "bob"]


@in_loop
async def test_using_is_refused_while_a_live_machine_lacks_the_key_and_a_second_install_mends_that(lab: Lab) -> None:
    ada, *_ = three(lab)
    await ada.steps.install(K1.text, ())
    dan = lab.add("dan", ring_of(K0))
    with pytest.raises(TaskFailed, match="dan was not there when it was installed"):
        await ada.steps.use(K1.id, ())
    assert dan.ids == [K0.id]
    await ada.steps.install(None, ())
    assert (await ada.steps.use(K1.id, ()))["peers"] == ["ada", "bob", "cyd", "dan"]


@in_loop
async def test_who_comes_when_the_key_is_in_use_already_is_handed_that_one_by_installing_it_again(lab: Lab) -> None:
    ada, bob, _ = three(lab)
    await ada.steps.install(K1.text, ())
    await ada.steps.use(K1.id, ())
    dan = lab.add("dan", ring_of(K0))
    done = await bob.steps.install(bob.holder.text, ())
    assert (done["id"], done["peers"], dan.ids) == (K1.id, ["ada", "bob", "cyd", "dan"], [K1.id, K0.id])
    assert {each.holder.digest for each in (ada, dan)} == {bob.holder.digest}


@in_loop
async def test_a_machine_that_is_too_old_to_change_keys_is_named_with_its_version(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada, bob, _ = three(lab)
    await ada.steps.install(K1.text, ())

    async def answer(peer: PeerId, proven: str, body: bytes) -> bytes:
        raise MeshqError("POST /trust/ring: 404 Not Found")

    monkeypatch.setattr(bob.exchange, "answer", answer)
    ada.peers._entries[bob.peer].telemetry = Telemetry()
    with pytest.raises(TaskFailed, match=r"bob has meshq 0\.2\.0, which can't change keys"):
        await ada.steps.use(K1.id, ())


@in_loop
async def test_removing_is_refused_while_a_live_machine_uses_the_key(lab: Lab) -> None:
    ada, bob, cyd = three(lab)
    await ada.steps.install(K1.text, ("cyd",))
    await ada.steps.use(K1.id, ("cyd",))
    with pytest.raises(TaskFailed, match=f"cyd uses {K0.id}"):
        await bob.steps.remove([K0.id], ())
    assert K0.id in bob.ids
    assert (await bob.steps.remove([K0.id], ("cyd",)))["peers"] == ["ada", "bob"]
    assert [each.ids for each in (ada, bob, cyd)] == [[K1.id], [K1.id], [K0.id]]


@in_loop
async def test_several_keys_go_in_one_step(lab: Lab) -> None:
    """So that who installed one of them has no time to install another."""
    ada, bob, cyd = three(lab)
    for key in (K1, K2):
        await ada.steps.install(key.text, ())
    await ada.steps.use(K2.id, ())
    await ada.steps.remove([K0.id, K1.id], ())
    assert [each.ids for each in (ada, bob, cyd)] == [[K2.id]] * 3


@in_loop
async def test_what_is_refused_asks_nobody_and_changes_nothing(lab: Lab) -> None:
    ada, *_ = three(lab)
    before = ada.holder.ring
    for step in (
        ada.steps.use("ffffffff", ()), ada.steps.use("", ()), ada.steps.remove([K0.id], ()), ada.steps.remove(["ff"], ()),
        ada.steps.install("hunter2", ()), ada.steps.install(K1.text, ("nobody",)), ada.steps.use(K0.id, ("ada",)),
    ):  # fmt: skip
        with pytest.raises(UsageError) as caught:
            await step
        assert "hunter2" not in caught.value.message + caught.value.hint
    assert (ada.holder.ring, ada.asked) == (before, [])


@in_loop
async def test_machines_that_are_off_get_the_key_later_and_those_that_left_do_not(lab: Lab) -> None:
    ada, bob, cyd = three(lab)
    lab.everybody_believes(bob, Liveness.DEAD)
    lab.everybody_believes(cyd, Liveness.LEFT)
    done = await ada.steps.install(K1.text, ())
    assert (done["peers"], done["later"], done["left_out"]) == (["ada"], ["bob"], [])
    await ada.steps.use(K1.id, ())
    await bob.exchange.exchange(ada.peer)
    assert bob.holder.text == K1.text
    await cyd.exchange.exchange(ada.peer)
    assert cyd.holder.text == K0.text


@in_loop
async def test_removing_warns_of_machines_that_are_off_and_have_nothing_else(lab: Lab) -> None:
    ada, bob, cyd = three(lab)
    lab.everybody_believes(cyd, Liveness.DEAD)
    await ada.steps.install(K1.text, ())
    await ada.steps.use(K1.id, ())
    lab.gossip()
    ada.peers._entries[cyd.peer].telemetry = Telemetry(keys=(K0.id,), ring="00000000")
    assert (await ada.steps.remove([K0.id], ()))["stranded"] == ["cyd"]
    assert bob.ids == [K1.id]


@in_loop
async def test_of_machines_that_are_off_those_are_named_that_are_not_known_to_have_a_key(lab: Lab) -> None:
    ada, bob, cyd = three(lab)
    eve = lab.add("eve", ring_of(K0))
    lab.gossip()
    lab.everybody_believes(bob, Liveness.DEAD)
    lab.everybody_believes(cyd, Liveness.LEFT)
    ada.peers.remember(2.0, [KnownPeer(peer=identity_of(9).peer, name="dan", addresses=(), unseen_for=1.0)])
    await ada.steps.install(K1.text, ("eve",))
    lab.everybody_believes(eve, Liveness.DEAD)  # it was shut out: nobody misses it
    keys = {each["id"]: each["off"] for each in ada.steps.document()["keys"]}
    assert keys == {K0.id: ["dan"], K1.id: ["bob", "cyd", "dan"]}
    done = await ada.steps.use(K1.id, ())
    assert done["peers"] == ["ada"]
    assert (await ada.steps.remove([K0.id], ("dan",)))["stranded"] == ["bob", "cyd"]
    assert (await ada.steps.remove([K0.id], ()))["stranded"] == ["bob", "cyd", "dan"]

    ada.peers._entries[bob.peer].telemetry = Telemetry(keys=(K0.id, K1.id))  # as it said before it went off
    assert [each["off"] for each in ada.steps.document()["keys"]] == [["cyd", "dan"]]


@in_loop
async def test_a_machine_that_fails_to_hear_of_a_use_is_named_and_catches_up(lab: Lab) -> None:
    ada, bob, cyd = three(lab)
    await ada.steps.install(K1.text, ())
    asked = ada.ask

    async def deaf_the_second_time(peer: PeerId, body: bytes) -> bytes:
        if peer == cyd.peer and ada.asked.count("cyd") >= 2:
            ada.asked.append("cyd")
            raise Unreachable("no answer")
        return await asked(peer, body)

    ada.exchange._ask = deaf_the_second_time
    done = await ada.steps.use(K1.id, ())
    assert done == {"id": K1.id, "peers": ["ada", "bob"], "failed": [{"name": "cyd", "reason": "does not answer"}]}
    await cyd.exchange.exchange(bob.peer)
    assert cyd.holder.text == K1.text


# --- who may have what ----------------------------------------------------------------------------------------------


@in_loop
async def test_who_has_the_old_key_alone_learns_the_new_one_from_nobody(lab: Lab) -> None:
    ada, bob, _ = three(lab)
    await ada.steps.install(K1.text, ())
    eve = lab.add("eve", ring_of(K0))
    lab.gossip()
    for machine in (ada, bob):
        await eve.exchange.exchange(machine.peer)
        await machine.exchange.exchange(eve.peer)
    await ada.steps.use(K1.id, ("eve",))
    for machine in (ada, bob):
        await eve.exchange.exchange(machine.peer)
    assert eve.ids == [K0.id]
    assert not [each for each in (ada, bob) if "eve" in each.steps.document()["keys"][0]["peers"]]


@in_loop
async def test_a_machine_that_an_install_leaves_out_stays_out_also_of_the_next_ones(lab: Lab) -> None:
    ada, _, cyd = three(lab)
    done = await ada.steps.install(K1.text, ("cyd",))
    assert (done["peers"], done["left_out"]) == (["ada", "bob"], ["cyd"])
    assert (await ada.steps.install(None, ()))["left_out"] == ["cyd"]
    assert cyd.ids == [K0.id]
    assert cyd.name not in ada.asked


@in_loop
async def test_no_document_and_no_log_line_holds_a_secret(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    ada, *_ = three(lab)
    said: list[Any] = [await ada.steps.install(None, ()), await ada.steps.use(ada.ids[1], ())]
    new = ada.holder.ring.current.key
    said += [await ada.steps.remove([K0.id], ()), ada.steps.document(), ada.exchange.counters, caplog.text]
    assert not [key for key in (K0, new) if key.text in str(said) or key.secret.hex() in str(said)]
    assert not [key for key in (K0, new) if repr(key.secret)[2:-1] in str(said)]


# --- catching up ----------------------------------------------------------------------------------------------------


@in_loop
async def test_whoever_sees_another_ring_asks_once_and_leaves_its_owner_alone_until_something_changes(lab: Lab) -> None:
    ada, bob, _ = three(lab)
    assert ada.exchange.due(0.0) is None
    await bob.holder.change(lambda held: keyring.install(held, bob.peer, K1, (bob.peer,), (), K1)[0])
    lab.gossip()
    assert ada.exchange.due(0.0) == bob.peer
    assert [ada.exchange.due(now) for now in (0.1, key_exchange.PAUSE_MIN - 0.1)] == [None, None]
    assert ada.exchange.due(key_exchange.PAUSE_MIN) == bob.peer
    assert ada.exchange.due(2 * key_exchange.PAUSE_MIN) is None  # the next pause is twice as long
    await bob.holder.change(lambda held: keyring.install(held, bob.peer, K2, (bob.peer,), (), K2)[0])
    lab.gossip()
    assert ada.exchange.due(2 * key_exchange.PAUSE_MIN) == bob.peer


@in_loop
async def test_the_pauses_end_growing(lab: Lab) -> None:
    ada, bob, _ = three(lab)
    await bob.holder.change(lambda held: keyring.install(held, bob.peer, K1, (), (), K1)[0])
    lab.gossip()
    asked = [now for now in range(0, 4_000, 1) if ada.exchange.due(float(now)) is not None]
    gaps = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert gaps[:5] == [2, 4, 8, 16, 32]
    assert max(gaps) == key_exchange.PAUSE_MAX


@in_loop
async def test_a_lab_in_which_everybody_missed_something_becomes_one_by_asking(lab: Lab) -> None:
    ada, bob, cyd = three(lab)
    everybody = [each.peer for each in (ada, bob, cyd)]
    await ada.holder.change(lambda held: keyring.install(held, ada.peer, K1, everybody, (), K1)[0])
    await bob.holder.change(lambda held: keyring.install(held, bob.peer, K2, everybody, (), K2)[0])
    await ada.holder.change(lambda held: keyring.use(held, ada.peer, K1.id))
    for now in range(60):
        lab.gossip()
        for machine in (ada, bob, cyd):
            if (peer := machine.exchange.due(float(now))) is not None:
                await machine.exchange.exchange(peer)
    assert [each.ids[0] for each in (ada, bob, cyd)] == [K1.id] * 3
    assert {each.holder.digest for each in (ada, bob, cyd)} == {ada.holder.digest}
    lab.gossip()
    assert [each.exchange.due(1e6) for each in (ada, bob, cyd)] == [None] * 3


@in_loop
async def test_those_that_say_nothing_of_their_ring_are_not_asked(lab: Lab) -> None:
    ada, bob, _ = three(lab)
    ada.peers._entries[bob.peer].telemetry = Telemetry()  # meshq 0.1
    assert ada.exchange.due(0.0) is None


@in_loop
async def test_a_newcomer_learns_the_name_of_the_mesh_when_it_settles(lab: Lab) -> None:
    ada, bob, _ = three(lab)
    await ada.steps.install(K1.text, ())
    await ada.steps.use(K1.id, ())
    newcomer = lab.add("new", ring_of(K1))
    await newcomer.exchange.settle()
    assert newcomer.holder.mesh_id == bob.holder.mesh_id == K0.mesh_id
    newcomer.asked.clear()
    await newcomer.exchange.settle()
    assert newcomer.asked == []


# --- what is said ---------------------------------------------------------------------------------------------------


@in_loop
async def test_the_list_says_of_each_key_who_has_it_who_uses_it_and_who_lacks_it(lab: Lab) -> None:
    ada, _, cyd = three(lab)
    await ada.steps.install(K1.text, ("cyd",))
    await ada.steps.use(K1.id, ("cyd",))
    lab.gossip()
    assert ada.steps.document() == {
        "keys": [
            {"id": K1.id, "in_use": True, "peers": ["ada", "bob"], "used_by": ["ada", "bob"], "lacking": ["cyd"], "off": []},
            {"id": K0.id, "in_use": False, "peers": ["ada", "bob", "cyd"], "used_by": ["cyd"], "lacking": [], "off": []},
        ],
        "removed": [],
    }
    assert cyd.steps.document()["keys"][0]["id"] == K0.id


@in_loop
async def test_who_finds_nobody_but_unknown_keys_where_others_were_says_what_to_do(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = lab.add("ada", ring_of(K0))
    gone = identity_of(9).peer
    ada.peers.remember(0.0, [KnownPeer(peer=gone, name="lab-9", addresses=(), unseen_for=1.0)])
    assert ada.exchange.problem == ""
    monkeypatch.setattr(ada.holder._contexts, "_strangers", {server_name(gone): None})
    assert ada.exchange.refusing == ("lab-9",)
    assert "lab-9" in ada.exchange.problem and "meshq key install --key-file" in ada.exchange.problem
    lab.add("bob", ring_of(K0))
    assert ada.exchange.problem == ""  # somebody accepts it: then it is no change of the key


def test_a_long_list_of_names_is_cut() -> None:
    names = [f"lab-{number}" for number in range(20)]
    assert key_exchange.listed(names).endswith("lab-7, 12 more")
    assert key_exchange.listed(names[:8]).endswith("lab-7")


@in_loop
async def test_a_thousand_machines_are_asked_a_few_at_a_time(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    ada, *_ = three(lab)
    running, most = 0, 0

    async def slow(peer: PeerId, body: bytes) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        raise Unreachable("no answer")

    ada.exchange._ask = slow
    peers: Sequence[PeerId] = [identity_of(number % 250).peer for number in range(100)]
    answers = await ada.exchange.exchange_with_all(peers)
    assert most == key_exchange.AT_ONCE
    assert all(isinstance(answer, Unreachable) for answer in answers.values())
