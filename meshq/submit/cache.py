"""What submitting remembers from one time to the next; everything in it can be deleted at any time."""

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_CACHE_HOME/meshq`, else `~/.cache/meshq`."""
    chosen = environ.get("XDG_CACHE_HOME", "")
    base = Path(chosen) if chosen.startswith("/") else Path(environ.get("HOME") or Path.home()) / ".cache"
    return base / "meshq"


def remember(path: Path, text: str) -> None:
    """Write a cache file in one step. A cache that can't be written is no error: the next submit is slower."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
