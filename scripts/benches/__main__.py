"""`scripts/bench NAME...`: run the benches of these names and print what they measured."""

import sys
from collections.abc import Callable

from benches import failover, idle, start, status
from benches.measured import Figure, machine

BENCHES: dict[str, Callable[[], list[Figure]]] = {
    "start": start.measure,
    "status": status.measure,
    "idle": idle.measure,
    "failover": failover.measure,
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHES and name != "all"]
    if unknown or not names:
        print(f"usage: scripts/bench NAME...  where a name is {', '.join(BENCHES)} or all", file=sys.stderr)
        return 2
    print(f"machine: {machine()}")
    for name in BENCHES if "all" in names else names:
        print(f"\n{name}")
        for figure in BENCHES[name]():
            print(f"  {figure.what:<66} {figure.value}{f'   goal: {figure.goal}' if figure.goal else ''}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
