"""The home, the control socket, the cookie and the agent's own process: who of one machine gets in."""

import grp
import os
import pwd
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from meshq import control
from meshq.config import Home
from meshq.errors import StoreError, UsageError
from meshq.trust import cookie, hardening, keys, secret_file

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="plays several users, which needs root")
NOBODY = 65534
OTHER_UID = 54321
OWN_GROUP = grp.getgrgid(os.getegid()).gr_name


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def test_a_new_home_is_closed_to_others(home: Home) -> None:
    assert cookie.prepare_home(home) is None
    made = [home.root, *sorted(home.root.iterdir())]
    assert [(path.name, mode(path)) for path in made] == [
        ("home", 0o700), ("attempts", 0o700), ("control", 0o700), ("kept", 0o700), ("trust", 0o700),
    ]  # fmt: skip


def test_a_home_that_others_could_read_is_closed(home: Home) -> None:
    home.root.mkdir(mode=0o755)
    cookie.prepare_home(home)
    assert mode(home.root) == 0o700


def test_a_group_may_pass_to_the_control_folder_only_until_the_agent_is_no_longer_shared(home: Home) -> None:
    gid = cookie.prepare_home(home, OWN_GROUP)
    assert gid == os.getegid()
    assert [mode(path) for path in (home.root, home.cookie.parent, home.key.parent)] == [0o710, 0o750, 0o700]
    cookie.make_cookie(home, gid)
    with control.listen(home, gid):
        assert [mode(path) for path in (home.cookie, home.socket)] == [0o640, 0o660]
    cookie.prepare_home(home)
    cookie.make_cookie(home)
    with control.listen(home):
        assert [mode(path) for path in (home.root, home.cookie.parent, home.cookie, home.socket)] == [
            0o700,
            0o700,
            0o600,
            0o600,
        ]


def test_an_unknown_group_is_named(home: Home) -> None:
    with pytest.raises(UsageError, match="no group 'no-such-group'"):
        cookie.prepare_home(home, "no-such-group")
    assert not home.root.exists()


@pytest.mark.parametrize("name", ["", "trust", "control", "attempts"])
def test_a_folder_that_others_may_write_to_is_refused(home: Home, name: str) -> None:
    cookie.prepare_home(home)
    (home.root / name).chmod(0o722)
    with pytest.raises(UsageError, match="others may write") as caught:
        cookie.prepare_home(home)
    assert "chmod" in caught.value.hint


@needs_root
@pytest.mark.parametrize("name", ["", "trust", "control"])
def test_a_folder_of_somebody_else_is_refused(home: Home, name: str) -> None:
    cookie.prepare_home(home)
    os.chown(home.root / name, OTHER_UID, -1)
    with pytest.raises(UsageError, match=f"belongs to user id {OTHER_UID}"):
        cookie.prepare_home(home)


@pytest.mark.parametrize("name", ["", "trust", "control"])
def test_a_symlink_in_place_of_a_folder_is_refused_and_nothing_behind_it_is_touched(
    home: Home, tmp_path: Path, name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    if name:
        home.root.mkdir(mode=0o700)
    (home.root / name).symlink_to(elsewhere)
    with pytest.raises(UsageError, match="symlink") as caught:
        cookie.prepare_home(home)
    assert str(elsewhere) in caught.value.hint
    assert mode(elsewhere) == 0o755 and list(elsewhere.iterdir()) == []


def test_a_file_in_place_of_the_home_is_refused(home: Home) -> None:
    home.root.write_text("x")
    with pytest.raises(StoreError, match="cannot use"):
        cookie.prepare_home(home)


# --- socket and cookie ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 30], ids=["short path", "path longer than a socket's address"])
def test_the_command_line_reaches_the_agent_and_both_have_one_cookie(tmp_path: Path, depth: int) -> None:
    home = Home(tmp_path.joinpath(*["nested"] * depth))
    cookie.prepare_home(home)
    made = cookie.make_cookie(home)
    with control.listen(home) as listener, control.connect(home, 10) as client:
        connection, _ = listener.accept()
        with connection:
            assert hardening.peer_credentials(connection) == (os.getpid(), os.geteuid(), os.getegid())
            client.sendall(control.read_cookie(home).encode())
            assert connection.recv(1000).decode() == made
    assert (len(str(home.socket)) > control.SOCKET_PATH_BYTES_MAX) == (depth > 1)


def test_the_socket_of_an_earlier_run_is_replaced(home: Home) -> None:
    cookie.prepare_home(home)
    control.listen(home).close()
    with control.listen(home), control.connect(home, 10):
        pass


def test_without_an_agent_the_command_line_can_tell(home: Home) -> None:
    with pytest.raises(FileNotFoundError):
        control.connect(home)
    with pytest.raises(FileNotFoundError):
        control.read_cookie(home)
    cookie.prepare_home(home)
    control.listen(home).close()
    with pytest.raises(ConnectionRefusedError):
        control.connect(home)


def test_each_start_has_a_new_cookie_of_256_bits(home: Home) -> None:
    cookie.prepare_home(home)
    made = [cookie.make_cookie(home) for _ in range(2)]
    assert made[0] != made[1] == control.read_cookie(home)
    assert len(bytes.fromhex(made[1])) == 32
    assert [path.name for path in home.cookie.parent.iterdir()] == ["cookie"]


@pytest.mark.parametrize("given", ["", "x", "é", "\udc80", "\ud800", "a" * 63, "a" * 65, "A" * 64])
def test_any_other_cookie_is_refused(given: str) -> None:
    assert not cookie.same_cookie(given, "a" * 64)


def test_the_right_cookie_is_accepted() -> None:
    assert cookie.same_cookie("a" * 64, "a" * 64)


@needs_root
@pytest.mark.parametrize("shared", [True, False])
def test_only_members_of_the_group_of_a_shared_agent_get_cookie_and_connection(shared: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, whose parents are closed to other users
        Path(folder).chmod(0o711)
        home = Home(Path(folder) / "home")
        gid = cookie.prepare_home(home, OWN_GROUP if shared else None)
        cookie.make_cookie(home, gid)
        with control.listen(home, gid):
            assert attempts_as_nobody(home, groups=()) == [False, False]
            assert attempts_as_nobody(home, groups=(os.getegid(),)) == [shared, shared]


def attempts_as_nobody(home: Home, groups: tuple[int, ...]) -> list[bool]:
    """Whether a process of user nobody with these groups could connect, and read the cookie."""

    def attempt() -> list[bool]:
        os.setgroups(groups)
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        return [allowed(lambda: control.connect(home, 10).close()), allowed(lambda: control.read_cookie(home))]

    return in_child(attempt)


def allowed(action: Callable[[], object]) -> bool:
    try:
        action()
    except PermissionError:
        return False
    return True


def in_child(action: Callable[[], list[bool]]) -> list[bool]:
    """What `action` answers in a child process, which may give up rights that this one needs."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, bytes(action()))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        answers = file.read()
    os.waitpid(child, 0)
    assert answers, "the child failed"
    return [bool(answer) for answer in answers]


def test_who_may_connect() -> None:
    me = pwd.getpwuid(os.geteuid())
    assert hardening.may_connect(1000, 1000, None)
    assert hardening.may_connect(0, 1000, None)
    assert not hardening.may_connect(1001, 1000, None)
    assert hardening.may_connect(me.pw_uid, OTHER_UID, me.pw_gid)
    assert not hardening.may_connect(OTHER_UID, 1000, me.pw_gid)  # a user without a name is in no group


def test_a_user_without_a_name_is_shown_by_number() -> None:
    assert hardening.user_name(OTHER_UID) == str(OTHER_UID)
    assert hardening.user_name(os.geteuid()) == pwd.getpwuid(os.geteuid()).pw_name


# --- secret files ---------------------------------------------------------------------------------------------------


@needs_root
def test_a_secret_that_belongs_to_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    secret_file.create(path, b"x")
    os.chown(path, OTHER_UID, -1)
    with pytest.raises(UsageError, match="belongs to user id"):
        secret_file.read(path, "secret", 10)


def test_a_secret_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot write"):
        secret_file.create(tmp_path / "missing" / "secret", b"x")
    (tmp_path / "taken").mkdir()
    with pytest.raises(StoreError, match="cannot write"):
        secret_file.replace(tmp_path / "taken", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_secret_never_follows_a_symlink_when_written(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("keep")
    (tmp_path / "secret").symlink_to("victim")
    with pytest.raises(FileExistsError):
        secret_file.create(tmp_path / "secret", b"x")
    secret_file.replace(tmp_path / "secret", b"x")
    assert (tmp_path / "victim").read_text() == "keep"
    assert not (tmp_path / "secret").is_symlink()


# --- the agent's process --------------------------------------------------------------------------------------------

HARDENED = """
import os, sys
from meshq.trust import certificates, hardening, identity, keys
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
warnings = hardening.harden()
key = keys.parse(os.environ["MESHQ_KEY"])
hardening.forget_settings()
certificates.Credentials(key, identity.Identity(identity.Ed25519PrivateKey.generate())).server_context()
print(sorted(name for name in os.environ if name.startswith("MESHQ_")), warnings, flush=True)
sys.stdin.read()
"""
SNOOP = """
import os, sys
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
for name in ("environ", "mem", "fd"):
    try:
        os.listdir(f"/proc/{sys.argv[1]}/fd") if name == "fd" else open(f"/proc/{sys.argv[1]}/{name}", "rb")
        print(name)
    except PermissionError:
        pass
"""


def test_another_process_of_the_same_user_can_read_nothing_of_a_hardened_agent() -> None:
    environ = os.environ | {"MESHQ_KEY": "meshq1-000410-61050r-3gg28a-1c60t3-gfchsn", "MESHQ_HOME": "x"}
    with subprocess.Popen(
        [sys.executable, "-c", HARDENED], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as agent:
        assert agent.stdin is not None and agent.stdout is not None
        assert agent.stdout.readline() == "[] []\n"
        seen = subprocess.run([sys.executable, "-c", SNOOP, str(agent.pid)], capture_output=True, text=True, check=True)
        assert seen.stdout.split() == []
        agent.stdin.close()
    with subprocess.Popen(
        [sys.executable, "-c", SOFT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as control_group:
        assert control_group.stdin is not None and control_group.stdout is not None
        control_group.stdout.readline()
        seen = subprocess.run([sys.executable, "-c", SNOOP, str(control_group.pid)], capture_output=True, text=True, check=True)
        assert "environ" in seen.stdout.split()  # so the first half fails when hardening does nothing
        control_group.stdin.close()


SOFT = """
import os, sys
from meshq.trust import hardening
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
import ctypes; ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # undo what changing the user did
print(flush=True)
sys.stdin.read()
"""


def test_root_is_warned_about() -> None:
    def warnings() -> list[bool]:
        return [os.geteuid() == 0, any("root" in warning for warning in hardening.harden())]

    runs_as_root, warned = in_child(warnings)
    assert warned == runs_as_root


def test_the_limit_of_open_files_is_raised_to_the_hard_one() -> None:
    def raise_limit() -> list[bool]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 500))
        raised = hardening.raise_file_limit()
        return [raised == 500, resource.getrlimit(resource.RLIMIT_NOFILE) == (500, 500)]

    assert in_child(raise_limit) == [True, True]


def test_peer_credentials_are_those_of_the_other_process() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert hardening.peer_credentials(ours) == (os.getpid(), os.geteuid(), os.getegid())


def test_what_a_task_opened_to_others_is_closed_again_and_told(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    cookie.prepare_home(home)
    keys.write(home.key, keys.generate())
    cookie.make_cookie(home)
    assert cookie.mend_modes(home) == []
    for path, mode in ((home.root, 0o777), (home.key.parent, 0o755), (home.key, 0o644), (home.cookie, 0o666)):
        path.chmod(mode)
    assert cookie.mend_modes(home) == [
        f"{home.root} had mode 0777",
        f"{home.key.parent} had mode 0755",
        f"{home.key} had mode 0644",
        f"{home.cookie} had mode 0666",
    ]
    assert cookie.mend_modes(home) == []
    assert cookie.prepare_home(home) is None, "the next start finds nothing wrong"
