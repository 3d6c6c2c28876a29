"""The questions and answers of a sync as bytes, and the rows in an answer.

Rows travel as they are kept in memory and on disk: the donor need not read them, and one that the receiver can't read (a newer
version wrote it) doesn't keep it from the others. Reading takes a second for 50,000 rows: a shell does it in a thread, and
hands them to the core in parts that take some milliseconds.
"""

from collections.abc import Sequence
from typing import Any, Final, cast

from meshq import codec
from meshq.config import SYNC_BYTES_MAX
from meshq.errors import MalformedData
from meshq.ledger.effects import Answer, Question, SyncPage, SyncRanges
from meshq.ledger.replica import ROW_BYTES_MAX
from meshq.ledger.row import Row

QUESTION_BYTES_MAX: Final = SYNC_BYTES_MAX  # a vector of the most actors is 600 kB
ANSWER_BYTES_MAX: Final = 4 * SYNC_BYTES_MAX  # a page of rows, floors, and settings
PART_ROWS: Final = 50


def decode_question(data: bytes) -> Question:
    """MalformedData if it is none."""
    return cast(Question, codec.decode(cast(Any, Question), data, bytes_max=QUESTION_BYTES_MAX))


def decode_answer(data: bytes) -> Answer:
    """MalformedData if it is none."""
    return cast(Answer, codec.decode(cast(Any, Answer), data, bytes_max=ANSWER_BYTES_MAX))


def packed_rows(answer: Answer) -> tuple[bytes, ...]:
    """The rows in an answer, as they travel."""
    return answer.rows if isinstance(answer, SyncPage | SyncRanges) else ()


def rows_of(answer: Answer) -> list[Sequence[Row | None]]:
    """The rows in an answer, in parts; None for one that can't be read."""
    packed = packed_rows(answer)
    return [[_read(data) for data in packed[at : at + PART_ROWS]] for at in range(0, len(packed), PART_ROWS)]


def _read(data: bytes) -> Row | None:
    try:
        return codec.decode(Row, data, bytes_max=ROW_BYTES_MAX)
    except MalformedData:
        return None
