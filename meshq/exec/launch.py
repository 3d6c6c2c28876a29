"""What a task's process gets: command, folder, environment variables, GPUs, confinement. Pure, but for looking at paths.

The environment is the agent's own, since that is what the owner of the machine set up for programs (proxies, CA bundles,
licence servers, CUDA), without all that belongs to meshq or to the agent's own interpreter, then what the task asked for,
then what the contract promises (design section 9). Nothing that a task asks for can replace the last.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from meshq import config
from meshq.exec import confine, shim
from meshq.exec.attempts import Attempts
from meshq.exec.preparation import PreparationFailed
from meshq.task import Claimed, Isolation

LOG_HEAD_BYTES: Final = 8 * 2**20  # of a log that grew too long: where a program says what it is about to do

_AGENTS_OWN: Final = (
    "VIRTUAL_ENV", "VIRTUAL_ENV_PROMPT", "PYTHONHOME", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "__PYVENV_LAUNCHER__",
    "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID", "INVOCATION_ID", "JOURNAL_STREAM",
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "TMPDIR", "PWD", "OLDPWD", "SHLVL", "_",
)  # fmt: skip
_PATH_DEFAULT: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def launch_for(
    claimed: Claimed,
    attempts: Attempts,
    *,
    python: str,
    gpus: tuple[int, ...],
    gpu_names: tuple[str, ...] = (),
    limits: tuple[tuple[int, int], ...] = (),
    home: Path,
    peer_name: str,
    environ: Mapping[str, str],
) -> shim.Launch:
    """All that the shim must know. PreparationFailed if the task names a folder outside its source."""
    spec = claimed.spec
    return shim.Launch(
        fence=claimed.fence,
        argv=(python, *spec.argv) if python else spec.argv,
        env=environment_for(claimed, attempts, python=python, gpus=gpus, peer_name=peer_name, environ=environ),
        cwd=str(_start_folder(claimed, attempts.work(claimed.fence))),
        gpus=gpus,
        time_limit=spec.time_limit,
        grace=shim.GRACE_SECONDS,
        log_bytes_max=config.LOG_BYTES_MAX,
        log_head_bytes=LOG_HEAD_BYTES,
        rules=tuple(_rules(claimed, attempts, python, home)),
        limits=limits,
        gpu_names=gpu_names,
        until_valid=spec.isolation == Isolation.STOP.value,
    )


def environment_for(
    claimed: Claimed,
    attempts: Attempts,
    *,
    python: str,
    gpus: tuple[int, ...],
    peer_name: str,
    environ: Mapping[str, str],
) -> dict[str, str]:
    """The task's environment variables, complete."""
    spec = claimed.spec
    env = {name: value for name, value in environ.items() if not name.startswith("MESHQ_") and name not in _AGENTS_OWN}
    env["PATH"] = _path_without(env.get("PATH") or _PATH_DEFAULT, environ.get("VIRTUAL_ENV"))
    env |= {"PYTHONUNBUFFERED": "1", "TMPDIR": str(attempts.tmp(claimed.fence))}
    env |= {name: value for name, value in spec.env.items() if not name.startswith("MESHQ_")}
    if python:
        interpreter = Path(python)
        env["PATH"] = f"{interpreter.parent}{os.pathsep}{env['PATH']}"
        env["VIRTUAL_ENV"] = str(interpreter.parent.parent)
    env |= {
        "MESHQ_TASK_ID": claimed.task,
        "MESHQ_TASK_NAME": spec.name,
        "MESHQ_ATTEMPT": str(claimed.attempt),
        "MESHQ_FENCE": claimed.fence,
        "MESHQ_QUEUE": spec.queue,
        "MESHQ_PEER": peer_name,
        "MESHQ_OUTPUT_DIR": str(attempts.outputs(claimed.fence)),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # CUDA's own order is by speed; ours, from NVML, is by bus
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),  # empty: none
    }
    assert not any(name.startswith("MESHQ_") and name not in config.TASK_VARIABLES for name in env)
    return env


def _path_without(path: str, agents_environment: str | None) -> str:
    if agents_environment is None:
        return path
    own = os.path.join(agents_environment, "bin")
    return os.pathsep.join(part for part in path.split(os.pathsep) if part != own) or _PATH_DEFAULT


def _start_folder(claimed: Claimed, work: Path) -> Path:
    relative = Path(claimed.spec.source.folder)
    if relative.is_absolute() or ".." in relative.parts:
        raise PreparationFailed(f"the source's folder {str(relative)!r} leads out of the source", False)
    return work / relative


def _rules(claimed: Claimed, attempts: Attempts, python: str, home: Path) -> list[tuple[str, str]]:
    """Grants on the attempt's own folders, its log (for /dev/stdout) and its interpreter; see `confine`."""
    read = []
    if python:
        read = [os.path.dirname(os.path.dirname(path)) for path in (python, os.path.realpath(python))]
    fence = claimed.fence
    write = (attempts.work(fence), attempts.outputs(fence), attempts.tmp(fence), attempts.log(fence))
    return confine.landlock_rules(str(home), read, map(str, write))
