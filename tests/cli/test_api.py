"""The Python API, and how little it costs to import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import meshq
from tests.cli.builders import OTHER, TASK, submitted, task, waited
from tests.cli.small_agent import Answer, SmallAgent

SLOW = {"aiohttp", "docker", "dulwich", "zeroconf", "cryptography", "rich", "msgpack", "pydantic", "asyncio", "psutil"}


def modules_after(code: str, home: Path) -> set[str]:
    """The top-level modules that a fresh interpreter has after this code."""
    source = f"import sys\n{code}\nimport json; print('\\n' + json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-c", source], env=os.environ | {"MESHQ_HOME": str(home)}, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_meshq_imports_nothing_else(tmp_path: Path) -> None:
    found = modules_after("import meshq", tmp_path)
    assert found & (SLOW | {"typer", "json.decoder", "http"}) == set()


def test_status_imports_nothing_that_takes_long(agent: SmallAgent) -> None:
    from tests.cli.test_commands import STATUS

    agent.set("GET /v1/status", STATUS)
    agent.set("GET /v1/tasks", [task()])
    found = modules_after("from meshq.cli.boundary import run; assert run(['status']) == 0", agent.home.root)
    assert "typer" in found
    assert found & SLOW == set()


@pytest.mark.parametrize(
    "command", [["tasks"], ["show", "t"], ["logs", "t"], ["submit", "--", "true"]], ids=lambda each: each[0]
)
def test_no_command_imports_the_agents_libraries(agent: SmallAgent, command: list[str]) -> None:
    agent.set("GET /v1/tasks", [])
    found = modules_after(f"from meshq.cli.boundary import run; run({command!r})", agent.home.root)
    assert found & {"aiohttp", "docker", "zeroconf", "cryptography", "rich", "asyncio"} == set()


def test_a_task_is_submitted_waited_for_and_read(agent: SmallAgent, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("print(1)\n")
    agent.set("GET /v1/me", {})
    agent.set("POST /v1/objects/missing", {"ids": []})
    agent.set("POST /v1/tasks", submitted(["lab-1", "lab-2"]))
    agent.set(f"GET /v1/tasks/{TASK}/wait", waited("failed", 3))
    agent.set(f"GET /v1/tasks/{TASK}/log", Answer(chunks=(b"epoch 1\n",)))
    with meshq.connect(agent.home.root) as mesh:
        found = mesh.submit(
            script, "--lr", "0.1", queue="gpu", memory=2**30, time_limit=90, labels={"room": "b12"}, env={"A": "1"}, hold=True
        )
        assert (found.id, found.name, repr(found)) == (TASK, "train", f"<meshq task train {TASK}>")
        assert (found.wait(), found.status(), found.logs()) == (3, "failed", "epoch 1\n")
    [body] = [json.loads(body) for request, body in agent.requests if request == "POST /v1/tasks"]
    [spec] = body["specs"]
    assert body["hold"] is True
    assert (spec["argv"], spec["queue"], spec["time_limit"], spec["env"]) == (
        ["train.py", "--lr", "0.1"],
        "gpu",
        90.0,
        {"A": "1"},
    )
    assert (spec["needs"]["gpus"], spec["needs"]["memory_bytes"], spec["needs"]["labels"]) == (1, 2**30, {"room": "b12"})


def test_an_option_that_there_is_not_is_an_error(agent: SmallAgent) -> None:
    agent.set("GET /v1/me", {})
    with meshq.connect(agent.home.root) as mesh, pytest.raises(TypeError):
        mesh.submit_command(["true"], gpu=1)  # type: ignore[call-arg]  # the point


def test_a_wait_that_ends_early_says_so(agent: SmallAgent) -> None:
    agent.set("GET /v1/me", {})
    agent.set("GET /v1/tasks/t", task())
    agent.set(f"GET /v1/tasks/{TASK}/wait", waited("running", None, final=False))
    with meshq.connect(agent.home.root) as mesh, pytest.raises(TimeoutError, match="is not over after 0"):
        mesh.task("t").wait(timeout=0)


def test_without_an_agent_connect_raises_unreachable(tmp_path: Path) -> None:
    with pytest.raises(meshq.Unreachable, match="no agent runs here"):
        meshq.connect(tmp_path)


def test_retry_gives_the_new_task(agent: SmallAgent) -> None:
    agent.set("GET /v1/me", {})
    agent.set("GET /v1/tasks/t", task(id=OTHER))
    agent.set(f"POST /v1/tasks/{OTHER}/retry", submitted(["lab-1"]))
    with meshq.connect(agent.home.root) as mesh:
        assert mesh.task("t").retry().id == TASK


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Queue'"):
        _ = meshq.Queue
