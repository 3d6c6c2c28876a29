"""The object store keeps what it was given, refuses what is none, and is a repository that git understands."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshq import config
from meshq.errors import MalformedData, StoreError
from meshq.exec.objects import ObjectStore
from meshq.gitobjects import (
    BLOB,
    COMMIT,
    MODE_EXECUTABLE,
    MODE_FILE,
    MODE_FOLDER,
    MODE_REPOSITORY,
    MODE_SYMLINK,
    TREE,
    Entry,
    FrameDecoder,
    decode_commit,
    decode_frames,
    decode_tree,
    encode_commit,
    encode_frame,
    encode_tree,
    object_id,
)
from meshq.ids import ObjectId

Frame = tuple[int, bytes]
NOBODY = ObjectId("0" * 40)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(tmp_path / "objects.git")


def source(content: bytes = b"print(1)\n") -> tuple[ObjectId, list[Frame]]:
    """A commit with one file in one folder, and its four objects, the commit first."""
    inner = encode_tree([Entry(MODE_FILE, b"a.py", object_id(BLOB, content))])
    outer = encode_tree([Entry(MODE_FOLDER, b"folder", object_id(TREE, inner))])
    commit = encode_commit(object_id(TREE, outer))
    return object_id(COMMIT, commit), [(COMMIT, commit), (TREE, outer), (TREE, inner), (BLOB, content)]


# ---- frames and formats

frames = st.lists(st.tuples(st.sampled_from([COMMIT, TREE, BLOB]), st.binary(max_size=200)), max_size=8)


@given(frames, st.lists(st.integers(1, 50)))
def test_frames_come_out_as_they_went_in_however_they_are_cut(given_frames: list[Frame], cuts: list[int]) -> None:
    data = b"".join(encode_frame(kind, content) for kind, content in given_frames)
    decoder = FrameDecoder()
    got: list[Frame] = []
    for size in [*cuts, len(data) + 1]:
        got += decoder.feed(data[:size])
        data = data[size:]
    decoder.finish()
    assert got == given_frames


@given(st.binary(max_size=300))
def test_garbage_is_malformed_and_nothing_else(data: bytes) -> None:
    for decode in (lambda raw: list(decode_frames(raw, 100)), decode_tree, decode_commit):
        try:
            decode(data)
        except MalformedData:
            continue


@given(frames)
def test_a_body_that_was_cut_is_noticed(given_frames: list[Frame]) -> None:
    data = b"".join(encode_frame(kind, content) for kind, content in given_frames)
    for end in range(max(0, len(data) - 6), len(data)):
        if end and end not in ends_of(given_frames):
            with pytest.raises(MalformedData, match="middle"):
                list(decode_frames(data[:end]))


def ends_of(given_frames: list[Frame]) -> set[int]:
    ends, place = set(), 0
    for _, content in given_frames:
        place += 5 + len(content)
        ends.add(place)
    return ends


def test_a_claimed_size_is_refused_before_its_bytes_come() -> None:
    with pytest.raises(MalformedData, match="4294967295 bytes"):
        FrameDecoder().feed(b"\x03\xff\xff\xff\xff")
    with pytest.raises(MalformedData, match="kind 9"):
        FrameDecoder().feed(b"\x09\x00\x00\x00\x00")


names = st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name and b"/" not in name)
entries = st.lists(
    st.builds(
        Entry,
        st.sampled_from([MODE_FILE, MODE_EXECUTABLE, MODE_FOLDER, MODE_SYMLINK, MODE_REPOSITORY]),
        names,
        st.binary(min_size=20, max_size=20).map(lambda raw: ObjectId(raw.hex())),
    ),
    max_size=10,
    unique_by=lambda entry: entry.name,
)


@given(entries)
def test_a_tree_is_the_same_for_dulwich(given_entries: list[Entry]) -> None:
    from dulwich.objects import ObjectID, Tree

    tree = Tree()
    for entry in given_entries:
        tree.add(entry.name, entry.mode, ObjectID(entry.id.encode()))
    content = encode_tree(given_entries)
    assert content == tree.as_raw_string()
    assert object_id(TREE, content).encode() == tree.id
    assert sorted(decode_tree(content), key=lambda each: each.name) == sorted(given_entries, key=lambda each: each.name)


# ---- the store


def test_what_was_put_is_there_and_complete(store: ObjectStore) -> None:
    commit, objects = source()
    ids = [object_id(kind, content) for kind, content in objects]
    assert store.missing(ids) == ids
    assert not store.complete(commit)
    assert store.put(objects) == 4
    assert store.missing([*ids, NOBODY]) == [NOBODY]
    assert store.complete(commit)
    assert store.reachable(commit) == ids
    assert list(store.get([ids[3], NOBODY, ids[0]])) == [objects[3], objects[0]]
    assert store.read(ids[3], BLOB) == objects[3][1]


def test_a_commit_tells_step_by_step_what_it_still_wants(store: ObjectStore) -> None:
    commit, objects = source()
    ids = [object_id(kind, content) for kind, content in objects]
    for count, each in enumerate(objects):
        assert store.wanted(commit) == [ids[count]]
        store.put([each])
    assert store.wanted(commit) == []
    with pytest.raises(StoreError, match="is not in"):
        store.reachable(NOBODY)


def test_a_store_outlives_its_process_and_is_a_repository_for_git(store: ObjectStore, tmp_path: Path) -> None:
    commit, objects = source()
    store.put(objects)
    assert ObjectStore(tmp_path / "objects.git").complete(commit)
    path = str(tmp_path / "objects.git")
    listed = subprocess.run(
        ["git", "-C", path, "ls-tree", "-r", "--name-only", commit], capture_output=True, text=True, check=True
    )
    assert listed.stdout == "folder/a.py\n"
    subprocess.run(["git", "-C", path, "fsck", "--strict", "--full", commit], check=True, capture_output=True)


def test_a_store_that_somebody_packed_still_answers(store: ObjectStore, tmp_path: Path) -> None:
    commit, objects = source()
    store.put(objects)
    path = str(tmp_path / "objects.git")
    subprocess.run(["git", "-C", path, "update-ref", "refs/heads/main", commit], check=True)
    subprocess.run(["git", "-C", path, "repack", "-a", "-d", "-q"], check=True)
    assert [file for file in (tmp_path / "objects.git" / "objects").glob("??/*")] == []
    packed = ObjectStore(tmp_path / "objects.git")
    ids = [object_id(kind, content) for kind, content in objects]
    assert packed.missing([*ids, NOBODY]) == [NOBODY]
    assert packed.reachable(commit) == ids
    assert [content for _, content in packed.get(ids)] == [content for _, content in objects]
    packed.put(objects)
    packed.close()
    assert [file for file in (tmp_path / "objects.git" / "objects").glob("??/*")] == []


def test_only_a_packed_store_needs_dulwich(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.exec.test_objects import source; "
        "from meshq.exec.objects import ObjectStore; from meshq.exec.checkout import checkout; "
        "before = 'dulwich' in sys.modules; commit, objects = source(); store = ObjectStore(Path(sys.argv[1]) / 'o.git'); "
        "store.put(objects); checkout(store, commit, Path(sys.argv[1]) / 'work'); print(before, 'dulwich' in sys.modules)"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_what_is_no_object_is_refused(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ((0, b""), (4, b"tag"), (TREE, b"nonsense"), (COMMIT, b"author me\n"), (TREE, b"100644 a\0short")):
        with pytest.raises(MalformedData):
            store.put([bad])
    monkeypatch.setattr(config, "SOURCE_FILE_BYTES_MAX", 10)
    with pytest.raises(MalformedData, match="11 bytes where at most 10"):
        store.put([(BLOB, b"x" * 11)])
    assert store.put([]) == 0


def test_a_tree_that_calls_a_file_a_folder_is_malformed_not_an_endless_walk(store: ObjectStore) -> None:
    blob = object_id(BLOB, b"x")
    tree = encode_tree([Entry(MODE_FOLDER, b"a", blob)])
    commit = encode_commit(object_id(TREE, tree))
    store.put([(BLOB, b"x"), (TREE, tree), (COMMIT, commit)])
    with pytest.raises(MalformedData, match="is no tree"):
        store.complete(object_id(COMMIT, commit))


def test_another_repositorys_commit_is_not_part_of_a_source(store: ObjectStore) -> None:
    tree = encode_tree([Entry(MODE_REPOSITORY, b"inner", NOBODY)])
    commit = encode_commit(object_id(TREE, tree))
    store.put([(TREE, tree), (COMMIT, commit)])
    assert store.complete(object_id(COMMIT, commit))


def test_damage_on_the_disk_is_found(store: ObjectStore, tmp_path: Path) -> None:
    first, second = object_id(BLOB, b"one"), object_id(BLOB, b"two")
    store.put([(BLOB, b"one"), (BLOB, b"two")])

    def file(each: ObjectId) -> Path:
        return tmp_path / "objects.git" / "objects" / each[:2] / each[2:]

    file(first).write_bytes(file(second).read_bytes())
    with pytest.raises(StoreError, match="is damaged"):
        store.read(first, BLOB)
    file(first).write_bytes(b"garbage")
    with pytest.raises(StoreError, match="cannot read the object"):
        store.read(first, BLOB)


def test_a_disk_that_refuses_leaves_nothing_half_made(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        store.put([(BLOB, b"x")])
    monkeypatch.undo()
    assert [file for file in (tmp_path / "objects.git" / "objects").glob("??/*")] == []
    assert store.missing([object_id(BLOB, b"x")]) == [object_id(BLOB, b"x")]


def test_objects_are_synced_before_they_have_their_name_and_folders_after(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def noted_sync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        sync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        events.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    store.put([(BLOB, b"one"), (BLOB, b"two")])
    assert events == ["file", "file", "name", "name", "folder", "folder"]


def test_many_threads_may_put_the_same(store: ObjectStore) -> None:
    commit, objects = source()
    failures: list[BaseException] = []

    def put() -> None:
        try:
            for _ in range(5):
                store.put(objects)
                assert store.complete(commit)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=put) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_what_nobody_needs_goes_after_a_day_unless_somebody_asked(store: ObjectStore) -> None:
    kept, objects = source(b"kept")
    old, other = source(b"old")
    store.put([*objects, *other, (BLOB, b"loose"), (BLOB, b"asked for")])
    now = 2_000_000_000.0  # long after the objects' times
    assert store.discard_unused([kept], now=0.0) == 0
    asked = object_id(BLOB, b"asked for")
    os.utime(store._file(asked), (now, now))
    assert store.complete(old)
    assert store.discard_unused([kept], now=now) == 4 + 1
    assert store.complete(kept) and not store.complete(old)
    assert store.missing([asked]) == []
