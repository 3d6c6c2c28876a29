"""Keeps a database of each schema that the ledger ever had: `python -m tests.golden.ledger_database`, also by `scripts/golden`.

A file is made once, by the code of that time, and never again: it stands for what is on somebody's disk. All of them hold the
same tasks, by their names.
"""

import sys
import tempfile
from pathlib import Path
from typing import Final

from meshq.config import Home
from meshq.ids import fence
from meshq.ledger.effects import Grant, Persist
from meshq.ledger.row import Cancel, Claim, Ended, Started, TextRegister
from meshq.ledger.schema import SCHEMA_VERSION
from meshq.ledger.settings import Settings
from meshq.ledger.store import Store
from tests.ledger.builders import actor, dot, outcome, peer, row

FOLDER: Final = Path(__file__).parent / "ledger"
SETTING: Final = "queue/default/paused"


def make(file: Path) -> None:
    """A database of the present schema, in one file."""
    claim = dot("b", 1)
    waits = row()
    done = row(
        (claim, Claim(attempt=1, peer=peer("b"), seen={actor("a"): 2}, at=3.0)),
        (dot("b", 2), Started(claim=claim, at=4.0)),
        (dot("b", 3), Ended(claim=claim, outcome=outcome())),
        birth=dot("a", 2),
        name="done",
    )
    cancelled = row((dot("a", 4), Cancel(by="ann@a", at=5.0)), birth=dot("a", 3), name="cancelled", priority=7)
    settings = Settings(entries={SETTING: TextRegister(1, actor("a"), "ann@a")}, vector={actor("a"): 5})
    grants = {done.task: Grant(fence=fence(1, claim), seconds=30.0)}
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder))
        store = Store.open(home, peer("a"))
        store.mint(1)
        rows, vector = (waits, done, cancelled), {str(actor("a")): 5, str(actor("b")): 3}
        store.commit(Persist(rows, vector, {actor("c"): 9}, True, settings, grants))
        store._opened.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        store.close()
        file.write_bytes(home.ledger.read_bytes())


def keep() -> bool:
    """Make the file of the present schema, unless it is there; whether it was made."""
    file = FOLDER / f"schema-{SCHEMA_VERSION}.sqlite"
    if file.exists():
        return False
    FOLDER.mkdir(exist_ok=True)
    make(file)
    return True


if __name__ == "__main__":
    print("kept" if keep() else f"schema {SCHEMA_VERSION} is there already")
    sys.exit(0)
