"""Where meshq's options end and the script's begin."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshq.cli.arguments import NOT_YET, Split, near_miss, split
from meshq.errors import UsageError

OPTIONS = {"--queue": True, "--gpus": True, "--env": True, "--wait": False, "--json": False, "--help": False}

CASES = [
    ("train.py", Split(options=(), script="train.py")),
    ("train.py a b", Split(options=(), script="train.py", arguments=("a", "b"))),
    ("--queue gpu train.py", Split(options=("--queue", "gpu"), script="train.py")),
    (
        "train.py --queue gpu",
        Split(options=("--queue", "gpu"), script="train.py", after_script=("--queue gpu",)),
    ),
    (
        "--wait train.py --queue=gpu --lr 0.1 --wait",
        Split(
            options=("--wait", "--queue=gpu"),
            script="train.py",
            arguments=("--lr", "0.1", "--wait"),
            after_script=("--queue=gpu",),
        ),
    ),
    ("train.py -- --queue gpu", Split(options=(), script="train.py", arguments=("--queue", "gpu"), dashes=True)),
    (
        "train.py --wait -- --queue gpu",
        Split(options=("--wait",), script="train.py", arguments=("--queue", "gpu"), after_script=("--wait",), dashes=True),
    ),
    ("train.py x --queue gpu", Split(options=(), script="train.py", arguments=("x", "--queue", "gpu"))),
    ("train.py -- -- x", Split(options=(), script="train.py", arguments=("--", "x"), dashes=True)),
    ("train.py -1", Split(options=(), script="train.py", arguments=("-1",))),
    ("--queue gpu -- bash -c true", Split(options=("--queue", "gpu"), command=("bash", "-c", "true"))),
    ("-- train.py --wait", Split(options=(), command=("train.py", "--wait"))),
    ("--", Split(options=())),
    ("", Split(options=())),
    ("--wait", Split(options=("--wait",))),
    ("--unknown train.py", Split(options=("--unknown",), script="train.py")),
    ("train.py --unknown --wait", Split(options=(), script="train.py", arguments=("--unknown", "--wait"))),
    ("--env A=--wait train.py", Split(options=("--env", "A=--wait"), script="train.py")),
    ("--queue train.py other.py", Split(options=("--queue", "train.py"), script="other.py")),
]


@pytest.mark.parametrize(("line", "expected"), CASES, ids=[line or "(nothing)" for line, _ in CASES])
def test_the_command_line_is_taken_apart(line: str, expected: Split) -> None:
    assert split(line.split(), OPTIONS) == expected


@pytest.mark.parametrize("line", ["--queue", "train.py --queue", "--wait train.py --gpus"])
def test_an_option_without_its_value_is_refused(line: str) -> None:
    with pytest.raises(UsageError, match="needs a value"):
        split(line.split(), OPTIONS)


@pytest.mark.parametrize("name", NOT_YET)
def test_an_option_of_the_contract_that_is_not_there_yet_is_refused_and_never_ignored(name: str) -> None:
    for line in ([name, "x", "train.py"], ["train.py", name, "x"], [f"{name}=x", "train.py"]):
        with pytest.raises(UsageError, match="not supported yet"):
            split(line, OPTIONS)
    assert split(["train.py", "--", name], OPTIONS).arguments == (name,)


WORDS = st.sampled_from(["train.py", "x", "--", "--queue", "gpu", "--wait", "--env", "A=1", "--lr", "0.1", "-v", "--queue=a"])


@given(st.lists(WORDS, max_size=8))
def test_no_word_is_lost_or_reordered_within_its_part(words: list[str]) -> None:
    try:
        found = split(words, OPTIONS)
    except UsageError:
        return
    script = () if found.script is None else (found.script,)
    after = [word for option in found.after_script for word in option.split(" ")]
    before = list(found.options)[: len(found.options) - len(after)]
    rebuilt = [*before, *script, *after, *found.arguments, *found.command]
    with_dashes = [[*rebuilt[:at], "--", *rebuilt[at:]] for at in range(len(rebuilt) + 1)]
    assert words in [rebuilt, *with_dashes]


@given(st.lists(WORDS, max_size=6), st.lists(WORDS, max_size=6))
def test_behind_two_dashes_everything_is_the_scripts(options: list[str], rest: list[str]) -> None:
    only_flags = ["--wait" for _ in options]
    assert split([*only_flags, "train.py", "--", *rest], OPTIONS).arguments == tuple(rest)


def test_a_misspelt_option_behind_the_script_is_noticed() -> None:
    assert near_miss("--quene", list(OPTIONS)) == "--queue"
    assert near_miss("--learning-rate", list(OPTIONS)) is None
    assert near_miss("data", list(OPTIONS)) is None
