"""`meshq key` and its steps: the real command against a small agent, and in a home without one."""

import json
import subprocess
from pathlib import Path

import pytest

from meshq.config import Home
from meshq.ids import PeerId
from meshq.trust import cookie, keyring, keys, offline, ring_file
from meshq.trust.keyring import ring_of
from meshq.trust.keys import MeshKey
from tests.cli.conftest import Meshq
from tests.cli.small_agent import SmallAgent, error

K0, K1, K2 = (MeshKey(bytes([number] * 16)) for number in range(3))
DONE = {"id": K1.id, "peers": ["ada", "bob"], "failed": []}


def said(done: subprocess.CompletedProcess[bytes]) -> tuple[int, str, str]:
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def sent(agent: SmallAgent) -> tuple[str, object]:
    route, body = agent.requests[-1]
    return route, json.loads(body)


def key_file(folder: Path, key: MeshKey) -> str:
    path = folder / "a.key"
    path.write_text(f"{key.text}\n")
    path.chmod(0o600)
    return str(path)


# --- with an agent --------------------------------------------------------------------------------------------------


def test_the_list_shows_which_key_is_used_and_who_lacks_which(meshq: Meshq, agent: SmallAgent) -> None:
    in_use = {"id": K1.id, "in_use": True, "peers": ["ada", "bob"], "used_by": ["ada", "bob"], "lacking": ["cyd"]}
    old = {"id": K0.id, "in_use": False, "peers": ["ada", "bob", "cyd"], "used_by": ["cyd"], "lacking": []}
    spare = {"id": K2.id, "in_use": False, "peers": ["ada"], "used_by": [], "lacking": ["bob", "cyd"]}
    document = {"keys": [in_use, spare, old], "removed": []}
    agent.set("GET /v1/keys", document)
    assert said(meshq("key", "list")) == (
        0,
        "KEY       USED    MACHINES  LACKING\n"
        f"{K1.id}  yes            2  cyd\n"
        f"{K2.id}  no             1  bob, cyd\n"
        f"{K0.id}  by cyd         3  -\n",
        "",
    )
    assert json.loads(meshq("key", "list", "--json").stdout) == document


def test_the_list_names_who_is_off_without_a_key_in_a_pipe_and_on_a_narrow_terminal(meshq: Meshq, agent: SmallAgent) -> None:
    off = [f"lab-{number}" for number in range(30)]
    old = {"id": K0.id, "in_use": False, "peers": ["ada"], "used_by": [], "lacking": [], "off": []}
    agent.set("GET /v1/keys", {"keys": [old | {"id": K1.id, "in_use": True, "off": off}, old], "removed": []})
    assert meshq("key", "list").stdout.decode().splitlines()[3:] == [f"off, and not known to have {K1.id}: {', '.join(off)}"]
    narrow = meshq("key", "list", COLUMNS="60").stdout.decode().splitlines()
    assert " ".join(narrow[3:]).endswith(", ".join(off)) and max(map(len, narrow)) <= 60


def test_install_says_who_has_the_key_and_what_comes_next(meshq: Meshq, agent: SmallAgent, tmp_path: Path) -> None:
    agent.set("POST /v1/keys/install", DONE | {"later": ["dan"], "left_out": ["eve"]})
    code, out, err = said(meshq("key", "install", "--key-file", key_file(tmp_path, K1), "--without", "eve"))
    assert (code, out) == (0, f"key {K1.id} is installed at 2 machines: ada, bob\n")
    assert err == (
        "note: off, and get the key when they come back: dan\n"
        "note: do not get the key: eve\n"
        f"hint: when `meshq key list` shows it everywhere: `meshq key use {K1.id}`\n"
    )
    assert sent(agent) == ("POST /v1/keys/install", {"key": K1.text, "without": ["eve"]})


def test_install_without_a_file_asks_for_a_new_key(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set("POST /v1/keys/install", DONE | {"later": [], "left_out": []})
    assert json.loads(meshq("key", "install", "--json", MESHQ_KEY=K2.text).stdout)["id"] == K1.id
    assert sent(agent) == ("POST /v1/keys/install", {"key": None, "without": []})


def test_use_and_remove_name_their_keys_and_tell_of_those_who_did_not_hear(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set("POST /v1/keys/use", DONE | {"failed": [{"name": "cyd", "reason": "does not answer"}]})
    assert said(meshq("key", "use", K1.id[:4])) == (
        0,
        f"key {K1.id} is in use at 2 machines: ada, bob\n",
        "warning: cyd does not answer; it hears of this when it can\n"
        "hint: before `meshq key remove` of the old one see in `meshq key list` who is off and would be locked out\n",
    )
    assert sent(agent) == ("POST /v1/keys/use", {"ids": [K1.id[:4]], "without": []})

    agent.set("POST /v1/keys/remove", DONE | {"id": f"{K0.id},{K2.id}", "stranded": ["dan", "eve"]})
    code, out, err = said(meshq("key", "remove", K0.id, K2.id, "--without", "eve"))
    assert (code, out) == (0, f"keys {K0.id}, {K2.id} were removed at 2 machines: ada, bob\n")
    assert err == (
        "warning: off, and locked out now, as far as is known: dan, eve\n"
        "hint: on each of them: `meshq key install --key-file F` with what `meshq key` prints here in F, then "
        "`meshq key use ID`, then `meshq join` if no agent runs there\n"
    )
    assert sent(agent) == ("POST /v1/keys/remove", {"ids": [K0.id, K2.id], "without": ["eve"]})
    agent.set("POST /v1/keys/remove", DONE | {"id": K0.id, "stranded": []})
    assert said(meshq("key", "remove", K0.id)) == (0, f"key {K0.id} was removed at 2 machines: ada, bob\n", "")


def test_a_step_that_is_refused_exits_with_1_and_passes_on_the_reason(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set("POST /v1/keys/use", error("failed", "not every live machine has the key: cyd lacks it", "wait", status=409))
    done = meshq("key", "use", K1.id, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] == {
        "code": "failed", "message": "not every live machine has the key: cyd lacks it", "hint": "wait",
    }  # fmt: skip


def test_the_names_of_machines_cannot_play_with_the_terminal(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set("POST /v1/keys/use", DONE | {"peers": ["a\x1b[2J"], "failed": [{"name": "b\x1b[2J", "reason": "x"}]})
    done = meshq("key", "use", K1.id)
    assert b"\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["key", "usee"], "no such command `usee`"),
        (["key", "use"], "missing argument `ID`"),
        (["key", "remove"], "missing argument `ID"),
        (["key", "install", "--key-file", "/nowhere"], "--key-file"),
        (["key", "--jsn"], "no such option `--jsn`"),
    ],
)
def test_wrong_usage_is_named(meshq: Meshq, arguments: list[str], says: str) -> None:
    code, out, err = said(meshq(*arguments))
    assert (code, out) == (2, "")
    assert says in err


def test_a_file_that_others_can_read_is_warned_of_and_the_key_is_nowhere_shown(
    meshq: Meshq, agent: SmallAgent, tmp_path: Path
) -> None:
    agent.set("POST /v1/keys/install", DONE)
    path = Path(key_file(tmp_path, K1))
    path.chmod(0o644)
    done = meshq("key", "install", "--key-file", str(path))
    assert b"can be read by other users" in done.stderr
    assert K1.text.encode() not in done.stdout + done.stderr


# --- without an agent -----------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home that belongs to the mesh of K0, in which no agent runs."""
    made = Home(tmp_path / "home")
    cookie.prepare_home(made)
    keys.write(made.key, K0)
    return made


def test_a_home_that_its_mesh_no_longer_accepts_is_given_the_new_key(meshq: Meshq, home: Home, tmp_path: Path) -> None:
    code, out, err = said(meshq("key", "install", "--key-file", key_file(tmp_path, K1)))
    assert (code, out) == (0, f"key {K1.id} is installed in this home\n")
    assert "no agent runs here" in err and K1.text not in err
    assert err.endswith(f"hint: to have this machine use it: `meshq key use {K1.id}`\n")
    ring = ring_file.load(home.key)
    assert ([each.id for each in ring.ordered], ring.use) == ([K0.id, K1.id], ring_of(K0).use)

    code, out, err = said(meshq("key", "use", K1.id[:5]))
    assert (code, out) == (0, f"key {K1.id} is in use in this home\n")
    assert err.endswith("hint: start the agent: `meshq join`\n")
    ring = ring_file.load(home.key)
    assert (ring.current.id, ring.use.mesh, ring.use.revision) == (K1.id, K0.mesh_id, 0)
    assert home.key.stat().st_mode & 0o777 == 0o600
    shown = json.loads(meshq("key", "list", "--json").stdout)
    assert [(each["id"], each["in_use"]) for each in shown["keys"]] == [(K1.id, True), (K0.id, False)]


def test_what_such_a_home_claims_never_beats_its_mesh(meshq: Meshq, home: Home, tmp_path: Path) -> None:
    mesh = keyring.install(ring_of(K0), PeerId("a" * 52), K1, (), (), K1)[0]  # K1 waits there: it is not in use
    meshq("key", "install", "--key-file", key_file(tmp_path, K1))
    meshq("key", "use", K1.id)
    assert keyring.merge(mesh, ring_file.load(home.key)).current.id == K0.id


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["install"], 2, "nobody to hand a new key to"),
        (["use", "ffffffff"], 2, "no key ffffffff"),
        (["remove", K0.id], 69, "no agent runs here"),
    ],
)
def test_what_cannot_be_done_without_an_agent_is_refused(
    meshq: Meshq, home: Home, arguments: list[str], code: int, says: str
) -> None:
    before = home.key.read_bytes()
    done = said(meshq("key", *arguments))
    assert (done[0], done[1]) == (code, "")
    assert says in done[2]
    assert home.key.read_bytes() == before


def test_without_a_home_there_is_no_key_to_list(meshq: Meshq, tmp_path: Path) -> None:
    for arguments in (["list"], ["use", K0.id], ["install", "--key-file", key_file(tmp_path, K1)]):
        code, out, err = said(meshq("key", *arguments))
        assert (code, out) == (69, "")
        assert "no agent runs here" in err
    assert not (tmp_path / "home").exists()


def test_a_file_that_holds_no_key_changes_nothing_and_is_not_repeated(meshq: Meshq, home: Home, tmp_path: Path) -> None:
    path = tmp_path / "wrong"
    path.write_text("hunter2\n")
    path.chmod(0o600)
    before = home.key.read_bytes()
    code, out, err = said(meshq("key", "install", "--key-file", str(path)))
    assert (code, out) == (2, "")
    assert "passphrase is not accepted" in err and "hunter2" not in err
    assert home.key.read_bytes() == before


def test_a_home_whose_agent_holds_the_lock_is_left_alone(meshq: Meshq, home: Home, tmp_path: Path) -> None:
    before = home.key.read_bytes()
    with offline.locked(home):
        code, out, err = said(meshq("key", "install", "--key-file", key_file(tmp_path, K1)))
    assert (code, out) == (1, "")
    assert "an agent runs in" in err
    assert home.key.read_bytes() == before


def test_a_damaged_key_file_is_named_and_not_replaced(meshq: Meshq, home: Home, tmp_path: Path) -> None:
    home.key.write_text(f"{K0.text}\nring1 AAAA\n")
    code, out, err = said(meshq("key", "list"))
    assert (code, out) == (1, "")
    assert "is damaged" in err and K0.text not in err
    assert home.key.read_text().endswith("ring1 AAAA\n")
