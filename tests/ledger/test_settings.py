"""The settings of the mesh: the laws of their merge, how they travel and are kept, and what a pause does to a queue."""

import contextlib
import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshq import codec
from meshq.config import SYNC_BYTES_MAX, Home
from meshq.errors import MalformedData, TaskFailed, UsageError
from meshq.ids import ActorId, Dot
from meshq.ledger import settings as module
from meshq.ledger.buckets import bucket_of
from meshq.ledger.core import Ledger
from meshq.ledger.effects import Effect, Persist, Push, PushReply, SendPush, SendSync, SyncOffer, SyncPage
from meshq.ledger.row import Claim, TextRegister
from meshq.ledger.schema import SCHEMA_VERSION
from meshq.ledger.settings import (
    NOTHING_SET,
    SETTINGS_MAX,
    Retention,
    Settings,
    broken,
    changed,
    created,
    keeping,
    merge_settings,
    paused,
    queues_with,
    retention,
)
from meshq.ledger.shell import merge_persists
from meshq.ledger.store import Store
from tests.ledger.builders import actor, dot, ledger, peer, spec, telemetry, view, views
from tests.ledger.mesh import Mesh
from tests.ledger.syncs import Pull, pull
from tests.ledger.test_core import among, only, row_in
from tests.ledger.test_replica import replica

A, B, C = peer("a"), peer("b"), peer("c")
GOLDEN = Path(__file__).parents[1] / "golden" / "ledger"
PAUSED = {paused("default"): "ann@a"}

NAMES = ["queue/gpu/paused", "queue/gpu/created", "retention/days", "later/versions/know"]
registers = st.builds(
    TextRegister, st.integers(1, 4), st.sampled_from([actor(name) for name in "abc"]), st.sampled_from(["", "x", "7", "ann@a"])
)
vectors = st.dictionaries(st.sampled_from([actor(name) for name in "abc"]), st.integers(1, 9))
some_settings = st.builds(Settings, st.dictionaries(st.sampled_from(NAMES), registers), vectors)


# ---- the lattice


@given(some_settings, some_settings, some_settings)
def test_merge_is_commutative_associative_and_idempotent(a: Settings, b: Settings, c: Settings) -> None:
    assert merge_settings(a, b) == merge_settings(b, a)
    assert merge_settings(merge_settings(a, b), c) == merge_settings(a, merge_settings(b, c))
    assert merge_settings(a, a) == a
    assert merge_settings(merge_settings(a, b), b) == merge_settings(a, b)


@given(some_settings, some_settings, some_settings)
def test_the_laws_hold_for_a_map_that_is_full(a: Settings, b: Settings, c: Settings) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SETTINGS_MAX", 2)
        assert merge_settings(a, b) == merge_settings(b, a) or a == b
        a, b, c = (merge_settings(each, NOTHING_SET) for each in (a, b, c))
        assert merge_settings(merge_settings(a, b), c) == merge_settings(a, merge_settings(b, c))
        assert len(merge_settings(a, b).entries) <= 2


@settings(max_examples=50)
@given(some_settings)
def test_settings_survive_their_encoding(one: Settings) -> None:
    assert codec.decode(Settings, codec.encode(one), bytes_max=SYNC_BYTES_MAX) == one


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_garbage_is_no_settings(data: bytes) -> None:
    with contextlib.suppress(MalformedData):
        assert isinstance(broken(codec.decode(Settings, data, bytes_max=SYNC_BYTES_MAX)), str)


def test_whoever_has_seen_a_value_replaces_it_and_of_two_who_have_not_one_wins_everywhere() -> None:
    first = changed(NOTHING_SET, dot("z", 1), {"queue/q/paused": "zoe"})
    later = changed(first, dot("a", 1), {"queue/q/paused": ""})
    assert merge_settings(first, later).value("queue/q/paused") == ""
    rival = changed(first, dot("b", 1), {"queue/q/paused": "bob"})
    assert merge_settings(later, rival) == merge_settings(rival, later)
    assert merge_settings(later, rival).value("queue/q/paused") in ("", "bob")


def test_a_full_map_with_the_longest_names_and_values_fits_a_page_of_a_sync() -> None:
    long = {f"{number:04}".ljust(module.NAME_CHARS_MAX, "n"): "v" * module.VALUE_BYTES_MAX for number in range(SETTINGS_MAX)}
    actors = {ActorId(f"{'a' * 26}.{number}"): 2**53 for number in range(module.ACTORS_MAX)}
    full = changed(Settings({}, actors), Dot(ActorId(f"{'a' * 26}.1"), 2**53), long)
    assert broken(full) == "" and len(codec.encode(full)) < SYNC_BYTES_MAX


def entry(
    name: str = "queue/q/paused", value: str = "", revision: int = 1, vector: Mapping[ActorId, int] | None = None
) -> Settings:
    covered = {actor("b"): 1} if vector is None else vector
    return Settings({name: TextRegister(revision, actor("b"), value)}, covered)


@pytest.mark.parametrize(
    ("hostile", "why"),
    [
        (entry(name="queue//paused"), "malformed"),
        (entry(name="../etc"), "malformed"),
        (entry(name="n" * (module.NAME_CHARS_MAX + 1)), "malformed"),
        (entry(value="v" * (module.VALUE_BYTES_MAX + 1)), "malformed"),
        (entry(value="\N{SNOWMAN}" * 86), "malformed"),
        (entry(revision=0), "malformed"),
        (entry(revision=2**60), "malformed"),
        (entry(vector={}), "malformed"),
        (entry(vector={actor("b"): 2**60}), "malformed"),
        (entry(vector={ActorId("elsewhere"): 1, actor("b"): 1}), "malformed"),
        (
            Settings({f"n{each}": TextRegister(1, actor("b"), "") for each in range(SETTINGS_MAX + 1)}, {actor("b"): 1}),
            "too_large",
        ),
        (Settings({}, {ActorId(f"{'b' * 26}.{each}"): 1 for each in range(module.ACTORS_MAX + 1)}), "too_large"),
    ],
)
def test_settings_that_break_the_rules_are_refused_whole_counted_and_not_covered(hostile: Settings, why: str) -> None:
    one = replica("a")
    assert one.absorb_settings(hostile) is False
    assert (one.settings, one.counters, one.take_changes()) == (NOTHING_SET, {f"settings_refused_{why}": 1}, None)
    core = among()
    before = core.vector
    reply, effects = core.handle_push(1.0, B, Push(number=1, rows=(), dots=(Dot(actor("b"), 1),), settings=hostile))
    assert (reply, effects, core.vector) == (PushReply(number=1), [], before)


def test_what_cannot_be_set_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    core = among()
    with pytest.raises(UsageError, match="no name"):
        core.change_settings(1.0, {"no name": "x"})
    with pytest.raises(UsageError, match="too long"):
        core.change_settings(1.0, {"queue/q/paused": "x" * 300})
    monkeypatch.setattr(module, "SETTINGS_MAX", 1)
    core.change_settings(1.0, PAUSED)
    with pytest.raises(TaskFailed, match="at most 1 settings"):
        core.change_settings(1.0, {paused("other"): "ann@a"})
    core.change_settings(1.0, {paused("default"): ""})
    assert core.vector == {actor("a"): 2}


# ---- how they travel and are kept


def test_a_setting_is_one_write_that_is_committed_durably_and_pushed_to_all() -> None:
    core = among()
    effects = core.change_settings(1.0, PAUSED)
    at = Dot(actor("a"), 1)
    now_set = Settings({paused("default"): TextRegister(1, actor("a"), "ann@a")}, {actor("a"): 1})
    push = Push(number=1, rows=(), dots=(at,), settings=now_set)
    assert effects == [Persist((), {actor("a"): 1}, {}, True, now_set), *(SendPush(each, push) for each in sorted((B, C)))]


def test_a_pushed_setting_advances_the_vector_as_a_row_does() -> None:
    a, b = among(), among(name="b")
    pushes = [only(a.change_settings(1.0, {paused("default"): by}), SendPush)[0].push for by in ("ann@a", "")]
    b.handle_push(1.0, A, pushes[1])
    assert (b.vector, b.settings.value(paused("default"))) == ({}, ""), "the first write is still missing"
    _, effects = b.handle_push(1.0, A, pushes[0])
    assert b.vector == {actor("a"): 1}
    assert only(effects, Persist) == [Persist((), {actor("a"): 1}, {}, False)], "the later map had it all"


def test_a_resume_that_lets_a_task_be_claimed_goes_out_with_the_claim_in_one_push() -> None:
    core = paused_core()
    core.submit(2.0, [spec()], hold=False)
    [sent] = only(core.change_settings(3.0, {paused("default"): ""}), SendPush)
    assert [at.seq for at in sent.push.dots] == [3, 4]
    assert sent.push.settings == core.settings and len(sent.push.rows) == 1


def test_a_sync_brings_settings_to_whoever_lacks_a_write_of_them() -> None:
    a, b = replica("a"), replica("b")
    a.change_settings(PAUSED)
    for _ in range(2):
        a.create(spec(), 1)
    first, second = Pull(b, a).run(), Pull(b, a).run()
    assert (b.settings, b.vector) == (a.settings, a.vector)
    offers = [each for each in (first.answers[0], second.answers[0]) if isinstance(each, SyncOffer)]
    assert [each.settings for each in offers] == [a.settings, None]


def test_a_sync_whose_settings_are_refused_is_not_adopted() -> None:
    core = among()
    [asked] = only(core.handle_peers(3.0, views(view("a"), view("d"))), SendSync)
    upto = {actor("b"): 9}
    wrong = entry(revision=0, vector=upto)
    parts = (bucket_of(actor("b")),)
    offer = SyncOffer(number=asked.question.number, run=1, parts=parts, vector=upto, settings=wrong)
    [more] = only(core.handle_sync_answer(3.1, asked.peer, offer), SendSync)
    core.handle_sync_answer(3.1, asked.peer, SyncPage(number=more.question.number))
    assert (core.vector, core.counters["settings_refused_malformed"]) == ({}, 1)


def test_settings_that_i_wrote_and_do_not_know_mean_a_lost_database() -> None:
    a, b = replica("a"), replica("b")
    a.change_settings(PAUSED)
    pull(b, a)
    restored = replica("a")
    pull(restored, b)
    assert (restored.ledger_epoch, restored.settings) == (2, a.settings)
    assert restored.change_settings({paused("default"): ""}) == Dot(actor("a", 2), 1)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


SET = changed(changed(NOTHING_SET, dot("a", 1), PAUSED), dot("b", 4), {"later/versions/know": "kept"})


def test_settings_are_there_after_reopening_and_the_last_of_several_commits_counts(home: Home) -> None:
    store = Store.open(home, A)
    early, late = Persist((), {}, {}, True, NOTHING_SET), Persist((), {}, {}, True, SET)
    store.commit(merge_persists([early, late, Persist((), {}, {}, True)]))
    store.commit(Persist((), {actor("b"): 7}, {}, False))
    store.close()
    store = Store.open(home, A)
    assert store.load().settings == SET
    store.close()


def test_damaged_settings_are_set_aside_and_asked_for_anew_by_a_new_actor(home: Home) -> None:
    store = Store.open(home, A)
    store.commit(Persist((), {actor("a"): 1}, {}, True, SET))
    store.close()
    with sqlite3.connect(home.ledger) as connection:
        [[data]] = connection.execute("SELECT data FROM settings")
        connection.execute("UPDATE settings SET data = ?", (data[:-1] + bytes([data[-1] ^ 1]),))
    connection.close()
    store = Store.open(home, A)
    stored = store.load()
    assert (stored.settings, stored.vector, stored.ledger_epoch > 1) == (NOTHING_SET, {}, True)
    assert store.counters["rows_quarantined"] == 1
    store.close()


def test_a_database_of_the_first_schema_opens_with_all_that_is_in_it(home: Home) -> None:
    """The file was written by the code of that time, and so it stays."""
    home.root.mkdir(parents=True)
    shutil.copy(GOLDEN / "schema-1.sqlite", home.ledger)
    home.ledger_epoch.write_text("1")
    store = Store.open(home, A)
    stored = store.load()
    assert sorted(each.spec.name for each in stored.rows) == ["cancelled", "done", "train"]
    assert (stored.vector, stored.floors, stored.ledger_epoch) == ({actor("a"): 4, actor("b"): 3}, {actor("c"): 9}, 1)
    assert (stored.settings, store.counters) == (NOTHING_SET, {})
    store.commit(Persist((), {}, {}, True, SET))
    store.close()
    store = Store.open(home, A)
    assert (store.load().settings, len(store.load().rows)) == (SET, 3)
    store.close()
    with sqlite3.connect(home.ledger) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    connection.close()


# ---- what they mean


def test_what_stands_under_names_of_queues_is_found_by_queue() -> None:
    one = changed(NOTHING_SET, dot("a", 1), {paused("gpu"): "ann@a", created("gpu"): "bob@b", paused("x.y"): ""})
    assert queues_with(one, "paused") == {"gpu": "ann@a", "x.y": ""}
    assert queues_with(one, "created") == {"gpu": "bob@b"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Retention(seconds=7 * 86_400, tasks=50_000)),
        ({"retention/days": "0.5", "retention/tasks": "10"}, Retention(seconds=43_200, tasks=10)),
        ({"retention/days": "nan", "retention/tasks": "-1"}, Retention()),
        ({"retention/days": "a week", "retention/tasks": "1e99"}, Retention()),
    ],
)
def test_retention_is_what_the_settings_say_and_the_default_where_they_make_no_sense(
    values: Mapping[str, str], expected: Retention
) -> None:
    assert retention(changed(NOTHING_SET, dot("a", 1), values)) == expected


def test_what_is_kept_can_be_set_within_bounds_that_leave_time_to_see_an_end() -> None:
    kept = retention(changed(NOTHING_SET, dot("a", 1), keeping(0.5, None)))
    assert kept == Retention(seconds=43_200)
    assert retention(changed(NOTHING_SET, dot("a", 1), keeping(3.0, 1_000))) == Retention(seconds=3 * 86_400, tasks=1_000)
    for days, tasks in ((0.0, None), (float("nan"), None), (4_000.0, None), (None, 10), (None, 10**6)):
        with pytest.raises(UsageError, match="out of range"):
            keeping(days, tasks)


def claims(effects: Sequence[Effect]) -> list[Claim]:
    """Those of this peer, `a` by default, that the rows to be stored hold."""
    rows = [row for persist in only(effects, Persist) for row in persist.rows]
    return [fact for row in rows for _, fact in row.facts if isinstance(fact, Claim)]


def paused_core(by: str = "ann@a") -> Ledger:
    core = among(views(view("a"), view("b", telemetry(queues=()))))
    core.change_settings(1.0, {paused("default"): by})
    return core


def test_a_paused_queue_is_not_bid_for_and_says_by_whom_it_is_paused() -> None:
    core = paused_core()
    [task], effects = core.submit(2.0, [spec()], hold=False)
    assert claims(effects) == [] and claims(core.handle_timeout(60.0)) == []
    assert core.waiting_reason(60.0, task) == "the queue default is paused by ann@a"
    assert len(claims(core.change_settings(61.0, {paused("default"): ""}))) == 1
    assert core.waiting_reason(61.0, task) == ""


def test_a_pause_that_another_peer_wrote_holds_here_and_after_a_restart() -> None:
    core = among(views(view("a"), view("b", telemetry(queues=()))))
    theirs = changed(NOTHING_SET, dot("b", 1), PAUSED)
    core.handle_push(1.0, B, Push(number=1, rows=(), dots=(dot("b", 1),), settings=theirs))
    [task], effects = core.submit(2.0, [spec()], hold=False)
    assert claims(effects) == []
    again = Ledger(A, 1, core._config, [row_in(core, task)], core.vector, {}, core._rng, 9.0, core.settings)
    again.adopt(9.0, [])
    assert claims(again.handle_peers(9.0, views(view("a")))) == []


def test_a_pause_leaves_what_is_claimed_or_runs_and_other_queues_alone() -> None:
    core = ledger()
    core.adopt(0.0, [])
    core.handle_peers(0.0, views(view("a", telemetry(slots_total=3, slots_free=3, queues=("default", "gpu")))))
    [task], _ = core.submit(1.0, [spec()], hold=False)
    before = row_in(core, task)
    core.change_settings(2.0, PAUSED)
    assert row_in(core, task) == before
    _, effects = core.submit(3.0, [spec(queue="gpu")], hold=False)
    assert len(claims(effects)) == 1


def test_after_a_resume_the_contenders_bid_in_their_ranks_and_not_all_at_once() -> None:
    """A task that has waited for an hour must not look to each of them as if it were its turn."""
    cores = {name: among(name=name) for name in "abc"}
    for core in cores.values():
        core.handle_push(1.0, B if core is not cores["b"] else A, Push(number=9, rows=(), dots=(), settings=SET))
    _, effects = cores["a"].submit(2.0, [spec()], hold=False)
    [sent, _] = only(effects, SendPush)
    for name in "bc":
        cores[name].handle_push(2.1, A, sent.push)
    resumed = changed(SET, dot("a", 2), {paused("default"): ""})
    bids = 0
    for core in cores.values():
        _, effects = core.handle_push(3600.0, A, Push(number=10, rows=(), dots=(), settings=resumed))
        bids += len(claims(effects))
    assert bids == 1


def test_settings_reach_everybody_in_spite_of_loss_and_two_parts_of_a_mesh_agree_afterwards() -> None:
    mesh = Mesh(5, 4, loss=0.3, reliable=False)
    peers = list(mesh.peers.values())

    def change(at: int, name: str, value: str) -> None:
        core = peers[at].core
        assert core is not None
        peers[at].feed(core.change_settings(mesh.world.now, {name: value}))

    mesh.world.run_until(5.0)
    mesh.network.partition([["a", "b"], ["c", "d"]])
    for number in range(20):
        change(number % 4, paused(f"q{number % 3}"), f"writer {number}")
        mesh.world.run_until(mesh.world.now + 0.2)
    mesh.network.heal()
    assert mesh.world.run_until_true(mesh.settled, mesh.world.now + 600.0)
    first = peers[0].core
    assert first is not None and len(first.settings.entries) == 3
