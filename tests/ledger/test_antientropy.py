"""When a core asks whom, what it asks next, and that nobody who is slow, busy or talks nonsense holds up the others."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from meshq.ids import Dot, PeerId
from meshq.ledger import antientropy as module
from meshq.ledger.antientropy import SLOW_SECONDS, SYNC_SECONDS, VERIFY_SECONDS, AntiEntropy
from meshq.ledger.buckets import BUCKETS, NOTE_BYTES, RECENT_MAX, Buckets, bucket_of, differing, note_with, part
from meshq.ledger.donor import INBOUND_MAX, SERVE_IDLE_SECONDS, SERVE_SECONDS, Donor
from meshq.ledger.effects import (
    Answer,
    Prepare,
    Push,
    PushReply,
    SendPush,
    SendSync,
    SyncBusy,
    SyncCompare,
    SyncOffer,
    SyncOpen,
    SyncOver,
    SyncPage,
    SyncPull,
    SyncRanges,
)
from meshq.ledger.pushes import PUSH_ALL_MAX, audience
from meshq.ledger.row import Cancel
from meshq.ledger.timing import LAN
from meshq.ledger.transfer import packed_rows
from tests.ledger.builders import actor, ledger, nothing_new, peer, row, spec, telemetry, view, views
from tests.ledger.syncs import DONOR, Pull
from tests.ledger.test_core import among, only
from tests.ledger.test_replica import replica

B, C, D, E = (peer(name) for name in "bcde")
NEWS = {actor("z"): 5}


def asking(*alive: PeerId) -> AntiEntropy:
    one = AntiEntropy(LAN, Random(1), replica("a"), 0.0)
    one.peers_changed(alive)
    return one


def offer(sent: SendSync, **more: object) -> SyncOffer:
    """Of a donor that knows more."""
    values = {"run": 1, "parts": (bucket_of(actor("z")),), "vector": NEWS} | more
    return SyncOffer(number=sent.question.number, **values)  # type: ignore[arg-type]  # as the test says


def opened(one: AntiEntropy, *peers: PeerId, now: float = 0.0) -> list[SendSync]:
    for each in peers:
        one.ask(each)
    return one.begin(now)


def pulling(one: AntiEntropy, who: PeerId = B) -> SendSync:
    """Rows are coming from this peer."""
    [sent] = opened(one, who)
    progress = one.handle_answer(0.0, who, offer(sent))
    assert progress is not None
    [pull] = progress.more
    return pull


# ---- the steps of one sync


def test_a_sync_sends_the_hashes_of_the_parts_and_then_asks_for_what_the_donor_knows_more() -> None:
    one = asking(B)
    [sent] = opened(one, B)
    assert sent == SendSync(B, SyncOpen(number=1, buckets=Buckets({}).pack()))
    progress = one.handle_answer(0.1, B, offer(sent))
    assert progress is not None
    assert progress.more == (SendSync(B, SyncPull(number=2, run=1, vector={actor("z"): 0})),)
    last = one.handle_answer(0.2, B, SyncPage(number=2))
    assert last is not None and (last.adopt, last.more) == (NEWS, ())


def test_only_the_parts_that_differ_are_exchanged() -> None:
    vector = {actor("p", epoch): epoch for epoch in range(1, 400)}
    a, b = Buckets(vector), Buckets(vector)
    assert a.note() == b.note()
    b.change(actor("p", 7), 7, 8)
    parts = differing(a.pack(), b.pack())
    assert parts == {bucket_of(actor("p", 7))} and actor("p", 7) in part(vector, parts)
    assert len(part(vector, parts)) < 400 / BUCKETS * 4
    b.change(actor("p", 7), 8, 7)
    assert a.note() == b.note()


def test_a_sync_with_a_refused_row_is_not_adopted() -> None:
    one = asking(B)
    pulling(one)
    one.handle_rows(B, 2, (), accepted=False)
    last = one.handle_answer(0.2, B, SyncPage(number=2))
    assert last is not None and last.adopt is None


def test_a_donor_that_has_forgotten_what_was_agreed_is_asked_anew() -> None:
    one = asking(B)
    pulling(one)
    one.handle_answer(0.1, B, SyncOver(number=2))
    assert one.begin(0.1) == [SendSync(B, SyncOpen(number=3, buckets=Buckets({}).pack()))]


def test_answers_that_nobody_asked_for_change_nothing() -> None:
    one = asking(B)
    [sent] = opened(one, B)
    strangers: Sequence[tuple[PeerId, Answer]] = (
        (C, offer(sent)), (B, replace(offer(sent), number=9)), (B, SyncPage(number=1)), (B, SyncRanges(number=1)),
    )  # fmt: skip
    assert [one.handle_answer(0.1, who, answer) for who, answer in strangers] == [None] * 4
    assert one.handle_answer(0.1, B, nothing_new(sent)) is not None


@pytest.mark.parametrize(
    "wrong",
    [{"vector": {"nobody": 1}}, {"vector": {actor("z"): 0}}, {"vector": {actor("z"): 2**62}}, {"floors": {"": 1}}],
    ids=["no actor", "nothing", "beyond all numbers", "floors"],
)
def test_a_donor_that_offers_nonsense_is_given_up(wrong: dict[str, object]) -> None:
    one = asking(B)
    [sent] = opened(one, B)
    progress = one.handle_answer(0.1, B, offer(sent, **wrong))
    assert progress is not None and (progress.more, progress.adopt) == ((), None)
    assert one.counters["syncs_given_up_on_nonsense"] == 1


def test_a_donor_whose_pages_get_nowhere_is_given_up() -> None:
    one = asking(B)
    pulling(one)
    one.handle_answer(0.1, B, SyncPage(number=2, at=0, last=False))
    assert one.counters["syncs_given_up_on_nonsense"] == 1


# ---- the slow, the busy, the many


def test_while_one_peer_brings_rows_no_other_begins_to_unless_it_is_slow() -> None:
    one = asking(B, C)
    pulling(one)
    one.ask(C)
    assert one.begin(0.1) == []
    assert one.deadline() <= SLOW_SECONDS
    assert [sent.peer for sent in one.begin(SLOW_SECONDS)] == [C]


def test_an_offer_that_comes_while_another_peer_brings_rows_waits() -> None:
    one = asking(B, C)
    first, second = opened(one, B, C)
    one.handle_answer(0.0, B, offer(first))
    progress = one.handle_answer(0.1, C, offer(second))
    assert progress is not None and progress.more == ()
    one.handle_answer(0.2, B, SyncPage(number=3))
    assert [sent.peer for sent in one.begin(0.2)] == [C]


def test_a_donor_that_sends_a_page_now_and_then_is_left_after_a_while() -> None:
    one = asking(B)
    pull = pulling(one)
    now, number, at = 0.0, pull.question.number, 0
    while now < SYNC_SECONDS:
        now, at = now + 9.0, at + 1
        one.handle_timeout(now)
        progress = one.handle_answer(now, B, SyncPage(number=number, at=at, last=False))
        if progress is None:
            break
        number = progress.more[0].question.number
    assert now >= SYNC_SECONDS and B not in one._underway


def test_pages_that_always_come_too_late_are_not_asked_for_again_and_again() -> None:
    """Over a slow line: what a page has brought stays, and the next sync asks for what is missing."""
    one = asking(B)
    sent = pulling(one)
    one.handle_timeout(LAN.sync_timeout)
    one.handle_rows(B, sent.question.number, (row().task,), accepted=True)
    [again] = opened(one, B, now=LAN.sync_timeout + 1.0)
    progress = one.handle_answer(LAN.sync_timeout + 1.0, B, offer(again))
    assert progress is not None and isinstance(progress.more[0].question, SyncCompare)


def test_several_rows_of_one_answer_come_over_a_slow_line_before_the_asker_gives_up() -> None:
    """F17 halved: 0.5 Mbit/s, of which others use half."""
    a, b = replica("a"), replica("b")
    for _ in range(40):
        a.create(spec(env={"X": "x" * 30_000}), 1)
    sync = Pull(b, a).run()
    assert sync.completed and len(b) == 40
    assert max(sum(map(len, packed_rows(answer))) for answer in sync.answers) < 0.25e6 / 8 * LAN.sync_timeout


def test_a_busy_donor_is_left_in_peace_and_another_is_asked_at_once_but_not_all() -> None:
    one = asking(B, C, D, E)
    asked, now = [B], 0.0
    [sent] = opened(one, B)
    while True:
        progress = one.handle_answer(now, asked[-1], SyncBusy(number=sent.question.number))
        assert progress is not None
        again = one.begin(now)
        if not again:
            break
        [sent] = again
        asked.append(sent.peer)
    assert len(asked) == len(set(asked)) == 3
    assert one.deadline() <= 2.0, "and then they are looked at again"


def test_a_donor_serves_two_at_a_time_and_tells_the_third_so() -> None:
    a = replica("a")
    a.create(spec(), 1)
    donor = Donor(a, run=1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("meshq.ledger.donor.SYNC_ROWS_MAX", 1)
        a.create(spec(), 1)
        question = SyncPull(number=1, run=1, vector={actor("a"): 0})
        pages = [donor.answer(0.0, who, question) for who in (B, C)]
        assert all(isinstance(page, SyncPage) and not page.last for page in pages) and len(pages) == INBOUND_MAX
        assert donor.answer(0.1, D, question) == SyncBusy(number=1)
        assert isinstance(donor.answer(0.1, D, SyncOpen(number=2, buckets=Buckets({}).pack())), SyncOffer), "that costs nothing"
        assert isinstance(donor.answer(0.2, B, replace(question, at=1)), SyncPage), "it goes on, and is content"
        assert isinstance(donor.answer(0.3, D, question), SyncPage)
        assert donor.answer(0.4, E, question) == SyncBusy(number=1)
        assert isinstance(donor.answer(0.4 + SERVE_IDLE_SECONDS, E, question), SyncPage), (
            "who asks nothing more loses its place"
        )
    assert donor.counters["syncs_refused_busy"] == 2


def test_a_peer_that_asks_and_asks_keeps_its_place_for_so_long_only() -> None:
    donor = Donor(replica("a"), run=1)
    question = SyncCompare(number=1, run=1, prefixes=("",))
    now = 0.0
    while now < SERVE_SECONDS:
        for who in (B, C):
            assert isinstance(donor.answer(now, who, question), SyncRanges)
        now += 5.0
    assert isinstance(donor.answer(now, D, question), SyncRanges)


# ---- the schedule


def test_a_peer_whose_note_is_mine_is_not_asked() -> None:
    one = asking(B, C)
    for who in (B, C):
        one.heed(0.0, who, one._replica.note)
    now = 0.0
    while (now := one.deadline()) < VERIFY_SECONDS[0]:
        one.handle_timeout(now)
        assert one.begin(now) == []


def test_every_ten_minutes_the_rows_themselves_are_compared_with_one_peer() -> None:
    one = asking(B)
    one.heed(0.0, B, one._replica.note)
    now, asked = 0.0, []
    while (now := one.deadline()) <= VERIFY_SECONDS[1]:
        one.handle_timeout(now)
        for sent in one.begin(now):
            progress = one.handle_answer(now, B, SyncOffer(number=sent.question.number, run=4))
            assert progress is not None
            asked += [more.question for more in progress.more]
            assert one.failed(B, progress.more[0].question.number)
    [question] = asked
    assert question == SyncCompare(number=2, run=4, root=one._replica.fingerprints.root(), prefixes=("",))


def test_rows_that_differ_though_all_has_been_seen_are_found_mended_and_counted() -> None:
    whole = row((Dot(actor("c"), 1), Cancel(by="x")))
    a, b = replica("a", whole, vector=whole.vector), replica("b", row(), vector=whole.vector)
    assert Pull(b, a).run().completed and b.get(whole.task) == row(), "a routine sync sees nothing"
    verify = Pull(b, a)
    verify.asks._wanted = {DONOR: True}
    verify.run()
    assert b.get(whole.task) == whole and b.counters["bug_covered_writes_were_missing"] == 1


def test_in_a_large_mesh_two_peers_are_asked_at_a_time() -> None:
    one = asking(*(peer(f"p{number}") for number in range(101)))
    now = one.deadline()
    one.handle_timeout(now)
    assert len(one.begin(now)) == 2


def test_a_note_names_the_latest_writes_and_whoever_lacks_one_asks_soon() -> None:
    one = asking(B, C)
    named = note_with(b"x" * NOTE_BYTES, [Dot(actor("z"), seq) for seq in range(5, 5 + RECENT_MAX)])
    assert len(named) <= 64
    one.heed(10.0, B, named)
    assert one._look_at[B] < 10.5
    one.heed(10.0, C, b"x" * NOTE_BYTES)
    assert one._look_at[C] == 10.0 + module.NOTE_PATIENCE
    one._replica.adopt({actor("z"): 9}, {})
    one.heed(20.0, D, named)
    assert one._look_at[D] == 20.0 + module.NOTE_PATIENCE, "all of that is here"


def test_a_write_is_pushed_to_everybody_or_in_a_large_mesh_to_a_few() -> None:
    everybody = tuple(peer(f"p{number}") for number in range(1_000))
    assert audience(Random(1), everybody[:PUSH_ALL_MAX]) == everybody[:PUSH_ALL_MAX]
    assert len(audience(Random(1), everybody)) == 9


def test_in_a_large_mesh_the_note_of_a_core_names_its_writes() -> None:
    seen = views(view("a"), *(view(f"p{number}") for number in range(PUSH_ALL_MAX + 1)))
    core = among(seen)
    _, effects = core.submit(1.0, [spec(queue="elsewhere")], hold=True)
    assert len(only(effects, SendPush)) == 8
    other = Buckets({})
    assert other.names_news(core.note, {}) and not other.names_news(core.note[:NOTE_BYTES], {})
    assert not Buckets(core.vector).names_news(core.note, core.vector)


# ---- no claim before the first sync


def test_nothing_is_claimed_before_the_first_sync_is_complete_however_long_its_rows_come() -> None:
    core = ledger()
    core.adopt(0.0, [])
    [sent] = only(core.handle_peers(0.0, views(view("a"), view("b"))), SendSync)
    core.submit(1.0, [spec()], hold=True)
    [pull] = only(core.handle_sync_answer(1.0, B, offer(sent)), SendSync)
    now, at = 1.0, 0
    while now < 100.0:
        now, at = now + 5.0, at + 1
        assert (
            only(
                core.handle_sync_rows(now, B, pull.question.number, [row(birth=Dot(actor("z"), at), queue="elsewhere")]),
                Prepare,
            )
            == []
        )
        page = SyncPage(number=pull.question.number, at=at, last=False)
        [pull] = only(core.handle_sync_answer(now, B, page), SendSync)
    effects = core.handle_sync_answer(now, B, SyncPage(number=pull.question.number))
    assert len(only(effects, Prepare)) == 1 and core.vector[actor("z")] == 5


def test_an_acknowledged_push_is_no_first_sync() -> None:
    core = ledger()
    core.adopt(0.0, [])
    core.handle_peers(0.0, views(view("a"), view("b")))
    _, effects = core.submit(1.0, [spec()], hold=True)
    [sent] = only(effects, SendPush)
    assert sent.push == Push(number=1, rows=sent.push.rows, dots=sent.push.dots)
    assert only(core.handle_push_reply(1.1, B, PushReply(number=1)), Prepare) == []


def test_a_peer_that_nobody_answers_claims_after_all() -> None:
    core = ledger()
    core.adopt(0.0, [])
    core.handle_peers(0.0, views(view("a"), view("b", telemetry(queues=()))))
    core.submit(1.0, [spec()], hold=True)
    assert only(core.handle_timeout(29.0), Prepare) == []
    assert len(only(core.handle_timeout(30.0), Prepare)) == 1
