"""What a peer makes of statements about itself that it never made: clones of its home, and its own flapping."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from meshq.errors import PeerError
from meshq.gossip import wire
from meshq.gossip.effects import Cloned, Refuted, Sync
from meshq.gossip.flaps import CALM, DAMPED_MAX, DAMPED_MIN, Flaps
from meshq.gossip.member import Member
from meshq.gossip.swim import PROFILES, Swim
from meshq.gossip.wire import Ping, Rumor, SyncReply, SyncRequest
from meshq.ids import Epoch
from tests.gossip.builders import ALIVE, SUSPECT, address, member, packet, peer, run_until

Build = Callable[..., Swim]


def run_of_a(boot: int, *, started_at: int = 100, epoch: int = 1, place: str = "a") -> Member:
    return replace(member("a", epoch=epoch, addresses=(address(place),)), boot=boot, started_at=started_at)


def core_of(me: Member) -> Swim:
    core = Swim(me, PROFILES["lan"], Random(me.boot), 0.0)
    core.handle_packet(0, packet("b", rumors=(Rumor(member("b")),)), address("b"))
    return core


def tell(core: Swim, statement: Member) -> list[object]:
    """Somebody says this of the core; the effects that are about runs."""
    effects = core.handle_packet(1.0, packet("b", rumors=(Rumor(statement),)), address("b"))
    return [effect for effect in effects if isinstance(effect, Cloned | Refuted)]


def contend(first: Swim, second: Swim) -> list[Cloned]:
    """Each hears what the other says of itself, in turns, until nobody has anything new; what they found out."""
    found: list[Cloned] = []
    for _ in range(20):
        for speaker, hearer in ((first, second), (second, first)):
            found += [effect for effect in tell(hearer, speaker.me) if isinstance(effect, Cloned)]
    return found


@pytest.mark.parametrize("epochs", [(1, 1), (5, 6), (6, 5)])
def test_of_two_live_runs_of_one_identity_the_newer_falls_silent_and_both_know(epochs: tuple[int, int]) -> None:
    older, newer = (
        core_of(run_of_a(7, started_at=100, epoch=epochs[0])),
        core_of(run_of_a(3, started_at=900, epoch=epochs[1])),
    )
    found = contend(older, newer)
    assert sorted(each.newer for each in found) == [False, True]
    assert newer.silent and not older.silent
    assert older.clone is not None and older.clone.boot == 3
    assert newer.clone is not None and newer.clone.boot == 7


def test_two_that_began_in_the_same_second_settle_it_by_their_random_numbers() -> None:
    one, other = core_of(run_of_a(3)), core_of(run_of_a(7, place="z"))
    contend(one, other)
    assert (one.silent, other.silent) == (False, True)


def test_a_home_that_was_restored_outbids_its_former_run_and_sees_no_clone() -> None:
    core = core_of(run_of_a(7, started_at=900))
    former = run_of_a(3, started_at=100, epoch=9)
    assert tell(core, former) == [Refuted(former)]
    for late in (former, replace(former, incarnation=4), replace(former, liveness=SUSPECT)):
        tell(core, late)
    assert core.clone is None and core.me.epoch == 10


def test_late_rumors_of_a_run_that_is_over_are_no_clone() -> None:
    core = core_of(run_of_a(7, started_at=900))
    for late in (replace(run_of_a(3), incarnation=3), replace(run_of_a(3), incarnation=5, liveness=SUSPECT)):
        tell(core, late)
    assert core.clone is None and not core.silent and core.me.incarnation == 6


def test_who_is_silent_stays_silent_whoever_else_turns_up() -> None:
    core = core_of(run_of_a(7, started_at=500))
    for other in (run_of_a(3, started_at=100), run_of_a(4, started_at=900)):
        core.handle_sync_reply(1, peer("a"), wire.encode_sync(SyncReply(other, (), ())))
    assert core.silent


def test_statements_of_many_invented_runs_take_no_memory_and_prove_nothing() -> None:
    core = core_of(run_of_a(7))
    for boot in range(10, 200):
        tell(core, run_of_a(boot, epoch=boot))
    assert core.clone is None and len(core._beliefs._other_runs._heard) == 8


def test_an_answer_of_myself_over_tls_proves_a_clone_at_once_on_both_sides() -> None:
    older, newer = core_of(run_of_a(7)), core_of(run_of_a(3, started_at=900, place="z"))
    [sync] = [effect for effect in newer.join(1, [address("a")]) if isinstance(effect, Sync)]
    reply, effects = older.handle_sync_request(1, peer("a"), sync.request)
    assert effects == [Cloned(newer.me, False)]
    assert newer.handle_sync_reply(1, peer("a"), reply) == [Cloned(older.me, True)]


def test_a_member_that_claims_to_be_me_is_refused_and_proves_nothing() -> None:
    core = core_of(run_of_a(7, started_at=900))
    with pytest.raises(PeerError):
        core.handle_sync_request(1, peer("b"), wire.encode_sync(SyncRequest(run_of_a(3), (), ())))
    with pytest.raises(PeerError):
        core.handle_sync_reply(1, peer("b"), wire.encode_sync(SyncReply(run_of_a(3), (), ())))
    assert core.clone is None


def test_a_silent_clone_calls_nobody_so_that_the_older_may_restart() -> None:
    silent = core_of(run_of_a(3, started_at=900))
    silent.handle_sync_reply(1, peer("a"), wire.encode_sync(SyncReply(run_of_a(7), (), ())))
    assert silent.join(2, [address("b")]) == []


def test_the_older_forgets_the_clone_when_nothing_was_heard_of_it_for_minutes() -> None:
    older = core_of(run_of_a(7))
    older.handle_sync_reply(1, peer("a"), wire.encode_sync(SyncReply(run_of_a(3, started_at=900), (), ())))
    assert older.clone is not None
    older.handle_timeout(200)
    assert older.clone is not None
    run_until(older, 500)
    assert older.clone is None


def test_a_silent_clone_sends_answers_and_announces_nothing_any_more() -> None:
    silent = core_of(run_of_a(3, started_at=900))
    silent.handle_sync_reply(1, peer("a"), wire.encode_sync(SyncReply(run_of_a(7), (), ())))
    assert silent.silent
    assert silent.handle_packet(2, packet("b", Ping(1, peer("a"))), address("b")) == []
    assert silent.handle_stream_packet(2, peer("b"), packet("b", Ping(1, peer("a")))) == []
    assert silent.rename(2, "other") == [] and silent.publish(2, b"record") == []
    assert run_until(silent, 200) == []
    with pytest.raises(PeerError):
        silent.handle_sync_request(3, peer("b"), wire.encode_sync(SyncRequest(member("b"), (), ())))
    silent.check()


# Flapping


def suspect(core: Swim, now: float, by: str) -> None:
    suspicion = replace(core.me, liveness=SUSPECT)
    rumor = Rumor(suspicion, (wire.observer(peer(by)),))
    core.handle_packet(now, packet("b", rumors=(rumor,)), address("b"))
    assert core.me.liveness is ALIVE and core.me.incarnation == suspicion.incarnation + 1


def test_who_is_suspected_three_times_within_a_minute_claims_nothing_for_a_while(swim: Build) -> None:
    core = swim("a", *map(member, "bcd"))
    for number, by in enumerate("bcb"):
        assert core.damped(100 + 20 * number) == 0
        suspect(core, 100 + 20 * number, by)
    assert core.damped(140) == DAMPED_MIN
    assert core.damped(140 + DAMPED_MIN) == 0


def test_three_suspicions_in_three_minutes_or_by_one_observer_are_no_flapping(swim: Build) -> None:
    for times, by in (((100, 190, 280), "bcb"), ((100, 110, 120), "bbb")):
        core = swim("a", *map(member, "bcd"))
        for now, observer in zip(times, by, strict=True):
            suspect(core, now, observer)
        assert core.damped(times[-1]) == 0


def test_each_time_that_it_flaps_again_it_waits_twice_as_long_up_to_an_hour_until_it_was_calm() -> None:
    flaps, now, waits = Flaps(), 1000.0, []
    for _ in range(8):
        for by in ("b", "c", "b"):
            flaps.refuted(now, (by,))
        waits.append(flaps.left(now))
        now += flaps.left(now)
    assert waits == [120, 240, 480, 960, 1920, DAMPED_MAX, DAMPED_MAX, DAMPED_MAX]
    now += CALM + 1
    for by in ("b", "c", "b"):
        flaps.refuted(now, (by,))
    assert flaps.left(now) == DAMPED_MIN


def test_being_outbid_by_another_run_is_no_flapping(swim: Build) -> None:
    core = swim("a", *map(member, "bcd"))
    for number in range(5):
        tell(core, member("a", epoch=Epoch(10 + 2 * number)))
    assert core.damped(1) == 0
