"""What every peer relies on in a task, however it was submitted: the agent checks it before it stores anything."""

from collections.abc import Mapping

from meshq import codec, config
from meshq.errors import UsageError
from meshq.ids import is_object_id
from meshq.task import Isolation, TaskSpec


def check_spec(spec: TaskSpec) -> TaskSpec:
    """The same spec, or UsageError: what every peer relies on, however the task was submitted."""
    config.check_name(spec.name, "the task's name")
    config.check_name(spec.queue, "--queue")
    config.check_name(spec.request or "none", "the token of the request")
    if not spec.argv or sum(len(arg.encode()) + 1 for arg in spec.argv) > config.ARGV_BYTES_MAX:
        raise UsageError(f"the command has no words or more than {config.ARGV_BYTES_MAX} bytes")
    if any("\0" in arg for arg in spec.argv):
        raise UsageError("the command has a NUL in it")
    _check_env(spec.env)
    if spec.isolation not in {each.value for each in Isolation}:
        raise UsageError(f"--on-isolation: {spec.isolation[:64]!r} is none of the choices", "choose continue or stop")
    if not 0 <= spec.retries <= config.RETRIES_MAX:
        raise UsageError(f"--retries: {spec.retries} is not between 0 and {config.RETRIES_MAX}")
    if abs(spec.priority) > config.PRIORITY_MAX:
        raise UsageError(f"--priority: {spec.priority} is not between -{config.PRIORITY_MAX} and {config.PRIORITY_MAX}")
    if min(spec.needs.cpus, spec.needs.gpus, spec.needs.memory_bytes, spec.needs.gpu_memory_bytes) < 0:
        raise UsageError("--cpus, --gpus and --memory cannot be negative")
    if any(limit is not None and limit <= 0 for limit in (spec.time_limit, spec.lease)):
        raise UsageError("--time-limit and --lease must be positive")
    if spec.source.commit is not None and not is_object_id(spec.source.commit):
        raise UsageError(f"the task's source {spec.source.commit[:64]!r} is no object id")
    size = len(codec.encode(spec))
    if size > config.SPEC_BYTES_MAX:
        raise UsageError(f"the task's description has {size} bytes, at most {config.SPEC_BYTES_MAX} are possible")
    return spec


def _check_env(env: Mapping[str, str]) -> None:
    if sum(len(key) + len(value.encode()) + 2 for key, value in env.items()) > config.ENV_BYTES_MAX:
        raise UsageError(f"--env: more than {config.ENV_BYTES_MAX} bytes of environment")
    if any(not key or "=" in key or "\0" in key + value for key, value in env.items()):
        raise UsageError("--env: a variable needs a name without `=`, and no NUL anywhere")
    if reserved := [key for key in env if key.startswith("MESHQ_")]:
        raise UsageError(f"--env: {reserved[0]} is meshq's own", "choose a name that does not begin with MESHQ_")
