"""The seeds that ever failed, by simulator; README.md beside this file has their format."""

from pathlib import Path

FOLDER = Path(__file__).parent


def failed_seeds(simulator: str) -> list[int]:
    """The seeds in `<simulator>.txt`, in the order in which they were found; none if there is no such file."""
    file = FOLDER / f"{simulator}.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return [int(line.split()[0]) for line in lines if line.strip() and not line.startswith("#")]
