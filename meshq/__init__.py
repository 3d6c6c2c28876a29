"""meshq: a lab's machines as one queue, without any server.

    import meshq

    with meshq.connect() as mesh:
        task = mesh.submit("train.py", queue="gpu", gpus=1)
        task.wait()
        print(task.logs())

Importing this package is cheap: its parts are loaded when they are first used.
"""

import typing

if typing.TYPE_CHECKING:
    from meshq.api import Mesh, Task, connect
    from meshq.errors import MeshqError, TaskFailed, Unplaceable, Unreachable, UsageError

__all__ = ["Mesh", "MeshqError", "Task", "TaskFailed", "Unplaceable", "Unreachable", "UsageError", "connect"]


def __getattr__(name: str) -> typing.Any:
    if name not in __all__:
        raise AttributeError(f"module 'meshq' has no attribute {name!r}")
    from meshq import api, errors

    return getattr(api, name, None) or getattr(errors, name)


def __dir__() -> list[str]:
    return __all__
