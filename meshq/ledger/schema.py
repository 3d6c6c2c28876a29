"""The tables of the ledger's database, and how those of an older meshq become them.

A change of the tables is one more entry of `MIGRATIONS`; the entries before it are never touched again, since there are
databases of every schema on somebody's disk. One of each is kept in `tests/golden/ledger`.
"""

from collections.abc import Mapping
from typing import Final

SCHEMA_VERSION: Final = 2

_SCHEMA_1: Final = """
CREATE TABLE rows (task TEXT PRIMARY KEY, data BLOB NOT NULL, sha256 BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE vector (actor TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE floors (actor TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE quarantine (number INTEGER PRIMARY KEY, task TEXT NOT NULL, data BLOB NOT NULL, reason TEXT NOT NULL)
"""

_SCHEMA_2: Final = """
CREATE TABLE settings (name TEXT PRIMARY KEY, data BLOB NOT NULL, sha256 BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE grants (task TEXT PRIMARY KEY, data BLOB NOT NULL, sha256 BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE seals (name TEXT PRIMARY KEY, sum BLOB NOT NULL) WITHOUT ROWID
"""

MIGRATIONS: Final[Mapping[int, str]] = {0: _SCHEMA_1, 1: _SCHEMA_2}
"""What makes a database of this schema one of the next; 0 is an empty one. Seals are made for what is there."""

SEALED: Final[Mapping[str, tuple[str, str]]] = {
    "rows": ("task", "sha256"),
    "vector": ("actor", "seq"),
    "floors": ("actor", "seq"),
    "settings": ("name", "sha256"),
    "grants": ("task", "sha256"),
}
"""The tables that have a seal, and the columns that it covers: the key, and what stands for the rest."""
