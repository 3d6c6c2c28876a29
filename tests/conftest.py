"""What tests need of the machine, and what happens where it is missing.

A test that needs something carries the mark of a group, or asks for it while it prepares (`tests/exec/driver.py`). Where a
group's needs are not met, its tests are skipped with the reason; `MESHQ_REQUIRE=netns,docker,cc` turns a missing group into a
failure at the start, so that CI can't pass by skipping. Tests marked `seeds` replay seeds that once failed, and run first.
"""

import functools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable

import hypothesis
import pytest

# Examples are random, so that every run looks somewhere new; a failure prints the blob that replays it. Time limits per
# example would only measure how busy the machine is.
hypothesis.settings.register_profile("meshq", deadline=None, derandomize=False, print_blob=True)
hypothesis.settings.load_profile("meshq")


def _missing_for_netns() -> str:
    """Why network namespaces can't be used here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command ip is missing (Debian: apt-get install iproute2)"
    if shutil.which("iptables") is None:
        return "the command iptables is missing (Debian: apt-get install iptables)"
    name = f"meshq-probe-{os.getpid()}"
    try:
        for command in (
            f"netns add {name}",
            f"-n {name} link add name bridge type bridge",
            f"-n {name} link add name left type veth peer name right",
        ):
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                return f"ip {command} failed: {done.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return ""


def _missing_for_docker() -> str:
    """Why containers can't be used here; empty if they can."""
    if shutil.which("docker") is None:
        return "the command docker is missing (Debian: apt-get install docker.io)"
    asked = subprocess.run(["docker", "version"], capture_output=True, text=True, check=False)
    return "" if asked.returncode == 0 else "no docker daemon answers"


def compiler() -> str | None:
    """What the pretended NVIDIA driver is built with."""
    return shutil.which("gcc") or shutil.which("cc")


def _missing_for_cc() -> str:
    return "" if compiler() else "there is no C compiler (Debian: apt-get install gcc libc6-dev)"


GROUPS: dict[str, Callable[[], str]] = {"netns": _missing_for_netns, "docker": _missing_for_docker, "cc": _missing_for_cc}


@functools.cache
def missing(group: str) -> str:
    """What the machine lacks for this group; empty if it lacks nothing."""
    return GROUPS[group]()


def _required_groups() -> list[str]:
    return [name.strip() for name in os.environ.get("MESHQ_REQUIRE", "").split(",") if name.strip()]


def pytest_configure(config: pytest.Config) -> None:
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # started in the background of a script: our children must hear Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "seeds: replays seeds that ever failed; runs first")
    if hasattr(config, "workerinput"):
        return  # a worker of xdist: its controller has checked
    for group in _required_groups():
        if group not in GROUPS:
            raise pytest.UsageError(f"MESHQ_REQUIRE names {group!r}; the groups are {', '.join(GROUPS)}")
        if reason := missing(group):
            raise pytest.UsageError(f"MESHQ_REQUIRE names {group!r}, but {reason}")


def pytest_report_header() -> list[str]:
    return [f"group {group}: {f'skipped, {missing(group)}' if missing(group) else 'runs'}" for group in GROUPS]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for group in GROUPS:
            if item.get_closest_marker(group) and (reason := missing(group)):
                item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: item.get_closest_marker("seeds") is None)  # stable: the rest keeps its order
