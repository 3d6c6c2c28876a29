"""`scripts/bench NAME... [OPTIONS]`: run the benches of these names and print what they measured."""

import sys
from collections.abc import Callable, Sequence
from itertools import takewhile

from benches import failover, gossip, idle, ledger, packets, reconcile, start, status
from benches.measured import Figure, machine
from meshq.errors import MeshqError

BENCHES: dict[str, Callable[[], list[Figure]]] = {
    "start": start.measure,
    "status": status.measure,
    "idle": idle.measure,
    "failover": failover.measure,
    "packets": packets.measure,
    "ledger": ledger.measure,
    "reconcile": reconcile.measure,
}
WITH_OPTIONS: dict[str, Callable[[Sequence[str]], list[Figure]]] = {"gossip": gossip.measure}
"""They take long or need root, so they are not among `all`; given alone they take options."""
EXIT_INTERRUPTED = 130


def main(arguments: list[str]) -> int:
    names = list(takewhile(lambda each: not each.startswith("-"), arguments))
    options = arguments[len(names) :]
    known = {"all", *BENCHES, *WITH_OPTIONS}
    if not names or not known.issuperset(names) or (options and (len(names) > 1 or names[0] not in WITH_OPTIONS)):
        print(f"usage: scripts/bench NAME...  where a name is {', '.join((*BENCHES, *WITH_OPTIONS))} or all", file=sys.stderr)
        print("       scripts/bench gossip [OPTIONS]  (--help tells them)", file=sys.stderr)
        return 2
    print(f"machine: {machine()}", flush=True)
    for name in BENCHES if "all" in names else names:
        print(f"\n{name}", flush=True)
        try:
            figures = WITH_OPTIONS[name](options) if name in WITH_OPTIONS else BENCHES[name]()
        except MeshqError as error:
            print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        for figure in figures:
            print(f"  {figure.what:<66} {figure.value}{f'   goal: {figure.goal}' if figure.goal else ''}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
