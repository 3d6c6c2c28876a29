"""The mesh key: what people type is the key or an error, and what is derived is the same everywhere."""

import hmac
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshq.errors import UsageError
from meshq.trust import keys
from meshq.trust.keys import ALPHABET, MeshKey, generate, parse

SECRETS = st.binary(min_size=16, max_size=16)
KEY = MeshKey(bytes(range(16)))
TYPEABLE = ALPHABET + ALPHABET.upper() + "oiluOILU-_ $é"


def parsed(text: str) -> MeshKey | None:
    try:
        return parse(text)
    except UsageError:
        return None


@given(SECRETS)
def test_every_key_survives_its_text_form(secret: bytes) -> None:
    assert parse(MeshKey(secret).text) == MeshKey(secret)


def test_the_text_form_never_changes() -> None:
    assert KEY.text == "meshq1-000410-61050r-3gg28a-1c60t3-gfchsn"


def test_the_derived_values_never_change() -> None:
    assert KEY.gossip_key.hex() == "86d183274a6a097ac4fff61e7831f0047eb41b0d5cb30793233f1e7dc9f17c53"
    assert KEY.authority_seed.hex() == "1bf3af0d87d8efb0b9684fd00ce80c814c14be23452d95980d5a3be8cfc9a9e0"
    assert KEY.mesh_id == "3uwzdna7xddq75t2"
    assert KEY.mdns_tag == "44a2e696db9b524d"


def test_a_derived_value_is_hkdf_as_the_rfc_describes_it() -> None:
    extracted = hmac.digest(bytes(32), KEY.secret, "sha256")  # RFC 5869: no salt is a salt of zeros
    assert KEY.gossip_key == hmac.digest(extracted, b"meshq/v1/gossip\x01", "sha256")


def test_the_derived_values_differ_from_each_other_and_from_the_secret() -> None:
    derived = [KEY.gossip_key, KEY.authority_seed, KEY.mesh_id.encode(), bytes.fromhex(KEY.mdns_tag), KEY.secret]
    assert len({value[:8] for value in derived}) == len(derived)


@given(SECRETS)
def test_case_hyphens_spaces_and_lookalikes_do_not_matter(secret: bytes) -> None:
    key = MeshKey(secret)
    for text in (
        key.text.upper(),
        key.text.replace("-", ""),
        key.text.replace("-", " "),
        f"\n  {key.text}\r\n",
        key.text.replace("-", "\u2013"),
        key.text.replace("0", "O").replace("1", "l"),
        key.text.replace("0", "o").replace("1", "I"),
    ):
        assert parse(text) == key


@pytest.mark.parametrize(
    "key", [KEY, MeshKey(b"\xff" * 16), MeshKey(bytes(16)), generate()], ids=["a", "ones", "zeros", "random"]
)
def test_every_wrong_character_is_noticed(key: MeshKey) -> None:
    for at in range(len(key.text)):
        for char in TYPEABLE:
            changed = key.text[:at] + char + key.text[at + 1 :]
            assert parsed(changed) == (key if same_reading(changed, key.text) else None), changed


@pytest.mark.parametrize("key", [KEY, MeshKey(bytes(range(100, 116))), generate()], ids=["a", "b", "random"])
def test_every_swapped_pair_is_noticed(key: MeshKey) -> None:
    for at in range(len(key.text) - 1):
        changed = key.text[:at] + key.text[at + 1] + key.text[at] + key.text[at + 2 :]
        assert parsed(changed) == (key if same_reading(changed, key.text) else None), changed


@given(SECRETS, st.lists(st.tuples(st.integers(0, 29), st.integers(1, 31)), min_size=1, max_size=4, unique_by=lambda e: e[0]))
def test_any_four_wrong_characters_are_noticed(secret: bytes, errors: list[tuple[int, int]]) -> None:
    chars = list(MeshKey(secret).text.replace("-", "")[len(keys.PREFIX) :])
    for at, difference in errors:
        chars[at] = ALPHABET[ALPHABET.index(chars[at]) ^ difference]
    assert parsed(keys.PREFIX + "".join(chars)) is None


def same_reading(a: str, b: str) -> bool:
    """Whether two spellings are the same key by the documented rules, written down once more."""

    def reading(text: str) -> str:
        kept = [char for char in text.lower() if char not in "- "]
        return "".join({"o": "0", "i": "1", "l": "1"}.get(char, char) for char in kept)

    return reading(a) == reading(b)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        (" - ", "empty"),
        ("correct horse battery staple", "passphrase is not accepted"),
        ("meshq2-000410-61050r-3gg28a-1c60t3-gf9nyp", "newer"),
        (KEY.text[:-1], "has 29 characters after meshq1-, not 30"),
        (KEY.text + "0", "has 31 characters after meshq1-, not 30"),
        (KEY.text[:-1] + "u", "character 30 after meshq1-"),
        (KEY.text[:-1] + "0", "checksum"),
    ],
)
def test_the_error_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse(text)
    assert caught.value.hint


@given(st.text(max_size=60))
def test_an_error_never_repeats_what_was_typed(text: str) -> None:
    secret = f"hunter2 {text}"
    with pytest.raises(UsageError) as caught:
        parse(secret)
    assert "hunter2" not in caught.value.message + caught.value.hint


def test_a_number_above_128_bits_is_refused_though_its_checksum_fits() -> None:
    symbols = [31] * keys.SECRET_CHARS
    chars = "".join(ALPHABET[symbol] for symbol in symbols + keys._checksum(symbols))
    assert parsed(f"{keys.PREFIX}-{chars}") is None


def test_a_key_shows_nothing_of_itself_in_logs() -> None:
    assert repr(KEY) == "MeshKey()"


def test_two_new_keys_differ() -> None:
    assert generate() != generate()


def test_another_process_derives_the_same() -> None:
    code = (
        "import sys; from meshq.trust.keys import parse\n"
        "key = parse(sys.argv[1]); print(key.gossip_key.hex(), key.mesh_id, key.mdns_tag)"
    )
    printed = subprocess.run([sys.executable, "-c", code, KEY.text], capture_output=True, text=True, check=True).stdout
    assert printed.split() == [KEY.gossip_key.hex(), KEY.mesh_id, KEY.mdns_tag]


def test_a_key_file_is_for_its_owner_only_and_gives_the_key_back(tmp_path: Path) -> None:
    path = tmp_path / "mesh.key"
    keys.write(path, KEY)
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys.read(path) == KEY
    assert [file.name for file in tmp_path.iterdir()] == ["mesh.key"]


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "mesh.key"
    keys.write(path, KEY)
    with pytest.raises(FileExistsError):
        keys.write(path, generate())
    assert keys.read(path) == KEY
    assert [file.name for file in tmp_path.iterdir()] == ["mesh.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_key_file_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "mesh.key"
    keys.write(path, KEY)
    path.chmod(mode)
    with pytest.raises(UsageError, match=f"{mode:04o}") as caught:
        keys.read(path)
    assert caught.value.hint.startswith(f"chmod 600 {path}")


def test_a_key_file_behind_a_symlink_or_a_fifo_is_refused(tmp_path: Path) -> None:
    keys.write(tmp_path / "real", KEY)
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "fifo", 0o600)
    for name in ("link", "fifo"):
        with pytest.raises(UsageError):
            keys.read(tmp_path / name)


def test_a_missing_key_file_is_told_apart_from_a_bad_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        keys.read(tmp_path / "mesh.key")


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"\xff\xfe", "no text"), (b"x" * 5000, "longer than 4096"), (b"hunter2\n", "passphrase"), (b"", "empty")],
)
def test_a_file_with_something_else_in_it_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "mesh.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(UsageError, match=says) as caught:
        keys.read(path)
    assert str(path) in caught.value.message and "hunter2" not in caught.value.message
