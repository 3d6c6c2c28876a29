"""The bench that measures membership beside serf: it works, refuses in plain words, and leaves nothing behind."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.processes.mesh import ROOT, wait_for

pytestmark = [pytest.mark.xdist_group("processes")]

MEASURE = """
import sys
from benches import gossip
from meshq.errors import MeshqError
try:
    for figure in gossip.measure(sys.argv[1:]):
        print(f"{figure.what}={figure.value}")
except MeshqError as error:
    sys.exit(f"{error.message}; {error.hint}")
except KeyboardInterrupt:
    sys.exit(130)
"""
QUICK = ("--systems", "meshq", "--agents", "3", "--cold-starts", "1", "--settle-seconds", "1", "--idle-seconds", "1")


@contextmanager
def bench(*options: str, folder: Path, path: str = os.environ["PATH"]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        (sys.executable, "-c", MEASURE, *options),
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}", "TMPDIR": str(folder), "PATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.terminate()  # if the test failed, it puts away what it made


def namespaces_of(process: subprocess.Popen[str]) -> list[str]:
    listed = subprocess.run(("ip", "netns", "list"), capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"meshq-{process.pid}-")]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the bench puts its temporary folders."""
    made = Path(tempfile.mkdtemp(prefix="meshq-"))
    try:
        yield made
    finally:
        shutil.rmtree(made)


@pytest.mark.netns
@pytest.mark.slow
def test_it_sees_an_agent_lost_and_back_and_drops_packets(folder: Path) -> None:
    with bench(*QUICK, "--losses", "1", "--cuts", "1", "--loss-minutes", "0.1", folder=folder) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    figures = dict(line.split("=", 1) for line in out.splitlines())
    for how in ("SIGKILL", "cable pulled"):
        assert 1 < float(figures[f"meshq 3: {how} until all hold it dead"].split()[0]) < 60
    dropped, _, came = figures["meshq 3, 0.1 min lossy: packets dropped"].split()[:3]
    assert 0 < int(dropped) < int(came)
    assert (namespaces_of(process), list(folder.iterdir())) == ([], [])


@pytest.mark.netns
@pytest.mark.slow
def test_interrupted_twice_it_still_leaves_nothing_behind(folder: Path) -> None:
    with bench(*QUICK, folder=folder) as process:
        wait_for(lambda: list(folder.glob("*/peer02/control/socket")), 60, "the second agent is up")
        assert len(namespaces_of(process)) == 4
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert any("interrupted" in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    _, left = psutil.wait_procs(started, timeout=10)
    for each in left:
        each.kill()
    assert left == []
    assert (namespaces_of(process), list(folder.iterdir())) == ([], [])


@pytest.mark.skipif(os.geteuid() != 0, reason="refuses because of that first")
def test_without_serf_it_says_how_to_get_it(folder: Path) -> None:
    for program in ("ip", "iptables"):
        (folder / program).symlink_to("/bin/true")
    with bench(folder=folder, path=str(folder)) as process:
        _, err = process.communicate(timeout=60)
    assert err.strip().splitlines() == [
        "bench gossip: serf is missing; apt-get install -y serf, or measure meshq alone with --systems meshq"
    ]


def test_what_cannot_be_measured_is_refused(folder: Path) -> None:
    with bench("--agents", "1", folder=folder) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a mesh of 2 to 250 agents" in err
