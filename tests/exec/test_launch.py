"""What a task's process is given: nothing of meshq's own but the contract, nothing of the agent's interpreter, its GPUs."""

from pathlib import Path
from typing import Any

import pytest

from meshq import config
from meshq.exec import shim
from meshq.exec.attempts import Attempts
from meshq.exec.launch import environment_for, launch_for
from meshq.exec.preparation import PreparationFailed
from meshq.task import Source
from tests.exec.bench import claimed, fence_of

FILES = Attempts(Path("/home/ada/meshq/attempts"))


def environment(environ: dict[str, str], *, python: str = "", gpus: tuple[int, ...] = (), **spec: Any) -> dict[str, str]:
    return environment_for(claimed(1, **spec), FILES, python=python, gpus=gpus, peer_name="bora", environ=environ)


def test_the_task_sees_the_contract_and_no_other_variable_of_meshq() -> None:
    env = environment({"MESHQ_KEY": "SECRET", "MESHQ_HOME": "/x", "HTTPS_PROXY": "proxy"}, env={"MESHQ_KEY": "mine", "A": "b"})
    assert {name: value for name, value in env.items() if name.startswith("MESHQ_")} == {
        "MESHQ_TASK_ID": claimed(1).task,
        "MESHQ_TASK_NAME": "task-1",
        "MESHQ_ATTEMPT": "1",
        "MESHQ_FENCE": fence_of(1),
        "MESHQ_QUEUE": "default",
        "MESHQ_PEER": "bora",
        "MESHQ_OUTPUT_DIR": str(FILES.outputs(fence_of(1))),
    }
    assert {name for name in env if name.startswith("MESHQ_")} <= set(config.TASK_VARIABLES)
    assert (env["HTTPS_PROXY"], env["A"]) == ("proxy", "b")
    assert "SECRET" not in env.values()


def test_a_task_can_not_take_over_what_the_contract_says() -> None:
    env = environment({}, env={"MESHQ_OUTPUT_DIR": "/etc", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, gpus=(2,))
    assert env["MESHQ_OUTPUT_DIR"] == str(FILES.outputs(fence_of(1)))
    assert env["CUDA_VISIBLE_DEVICES"] == "2"


@pytest.mark.parametrize(("gpus", "visible"), [((), ""), ((0,), "0"), ((1, 3), "1,3")])
def test_exactly_the_given_gpus_are_visible_in_the_order_of_the_bus(gpus: tuple[int, ...], visible: str) -> None:
    env = environment({"CUDA_VISIBLE_DEVICES": "7"}, gpus=gpus)
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"]) == (visible, "PCI_BUS_ID")


def test_the_agents_own_interpreter_does_not_show() -> None:
    agent = {"VIRTUAL_ENV": "/agent", "PATH": "/agent/bin:/usr/bin", "PYTHONPATH": "/agent/lib", "PYTHONHOME": "/agent"}
    env = environment(agent)
    assert env["PATH"] == "/usr/bin"
    assert not {"VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME"} & set(env)


def test_the_environments_programs_come_first_even_before_a_path_of_the_task() -> None:
    env = environment({"PATH": "/usr/bin"}, python="/envs/e1/bin/python", env={"PATH": "/opt/bin"})
    assert env["PATH"] == "/envs/e1/bin:/opt/bin"
    assert env["VIRTUAL_ENV"] == "/envs/e1"


def launch(*, python: str = "", **spec: Any) -> shim.Launch:
    return launch_for(
        claimed(1, **spec), FILES, python=python, gpus=(), home=Path("/home/ada/meshq"), peer_name="bora", environ={}
    )


def test_a_script_runs_with_its_interpreter_in_the_folder_of_the_submit() -> None:
    told = launch(python="/e/bin/python", argv=("train.py", "--lr", "1"), source=Source(folder="a/b"), time_limit=5.0)
    assert told.argv == ("/e/bin/python", "train.py", "--lr", "1")
    assert told.cwd == str(FILES.work(fence_of(1)) / "a" / "b")
    assert told.time_limit == 5.0
    assert launch(argv=("nvidia-smi",)).argv == ("nvidia-smi",)


@pytest.mark.parametrize("folder", ["..", "a/../..", "/etc"])
def test_a_start_folder_outside_the_source_is_the_tasks_own_fault(folder: str) -> None:
    with pytest.raises(PreparationFailed) as failed:
        launch(source=Source(folder=folder))
    assert not failed.value.retryable
