"""What the agent refuses, however a task was submitted."""

from dataclasses import replace

import pytest

from meshq import config
from meshq.errors import UsageError
from meshq.ids import PeerId
from meshq.task import Environment, Needs, TaskSpec
from meshq.web.spec_check import check_spec

SPEC = TaskSpec(name="t", argv=("x",), submitted_by="a@b", submitted_at=0.0, submitted_peer=PeerId("p"))


def test_a_sound_spec_passes_as_it_is() -> None:
    assert check_spec(SPEC) is SPEC


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(SPEC, name="a b"), "the task's name"),
        (replace(SPEC, queue="../x"), "--queue"),
        (replace(SPEC, argv=()), "no words"),
        (replace(SPEC, argv=("x" * (config.ARGV_BYTES_MAX + 1),)), "more than"),
        (replace(SPEC, argv=("a\0b",)), "NUL"),
        (replace(SPEC, env={"A": "x" * config.ENV_BYTES_MAX}), "of environment"),
        (replace(SPEC, env={"A=B": "x"}), "without `=`"),
        (replace(SPEC, env={"MESHQ_FENCE": "x"}), "meshq's own"),
        (replace(SPEC, isolation="panic"), "none of the choices"),
        (replace(SPEC, retries=-1), "--retries"),
        (replace(SPEC, retries=config.RETRIES_MAX + 1), "--retries"),
        (replace(SPEC, priority=config.PRIORITY_MAX + 1), "--priority"),
        (replace(SPEC, needs=Needs(gpus=-1)), "cannot be negative"),
        (replace(SPEC, time_limit=0.0), "must be positive"),
        (replace(SPEC, lease=-1.0), "must be positive"),
        (replace(SPEC, environment=Environment(lock="x" * config.SPEC_BYTES_MAX)), "description has"),
    ],
)
def test_an_unsound_spec_is_one_usage_error(spec: TaskSpec, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_spec(spec)
