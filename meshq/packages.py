"""uv, and where it finds packages: the same on the machine that submits and on the one that runs.

uv knows nothing of pip's configuration, but that is where labs say which index, mirror or folder of wheels to use. So it is
translated: what `pip install` would ask, uv asks. Whatever is set for uv itself wins.
"""

import configparser
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from meshq.errors import TaskFailed

BEST_OF_ALL_INDEXES = "unsafe-best-match"
"""What pip does with several indexes. uv's own default looks no further than the first index that has the name, which makes
mirrors with a few versions of everything (PyTorch's) unusable. Set only where pip's configuration names several."""

_LOCK_LINE = re.compile(
    r"(--extra-index-url|--index-url|--find-links|-i|-f)[ =]https?://\S+"
    r"|--no-index"
    r"|[A-Za-z0-9][\w.-]*(\[[\w.,\s-]*\])?\s*(==\s*[\w.+!-]+|@\s*(git\+(https?|ssh)|https)://\S+)\s*(;.*)?"
)
_CREDENTIALS = re.compile(r"://[^/@\s]*@")


def uv_binary() -> str:
    """The binary that the uv package carries. TaskFailed if it is not where it should be."""
    import uv

    try:
        return uv.find_uv_bin()
    except FileNotFoundError as error:
        raise TaskFailed(f"looking for uv: {error}", "reinstall meshq in a fresh virtual environment") from None


def uv_environment(environ: Mapping[str, str] = os.environ, *, cache: Path | None = None) -> dict[str, str]:
    """The environment for a uv process: without meshq's own variables, with pip's configuration translated."""
    result = {name: value for name, value in environ.items() if not name.startswith("MESHQ_") and name != "PYTHONPATH"}
    for name, value in _translated(_pip_options(environ)).items():
        result.setdefault(name, value)
    result["NO_COLOR"] = "1"
    result["UV_NO_PROGRESS"] = "1"
    if cache is not None:
        result["UV_CACHE_DIR"] = str(cache)
    return result


def has_credentials(text: str) -> bool:
    """Does a URL in the text carry a user name, password or token?"""
    return _CREDENTIALS.search(text) is not None


def unsafe_line(lock: str) -> str | None:
    """The first line of a lock that is neither a pinned package nor an index on the network; None if all are.

    Anything else can make uv read what is no package: another file, a folder, the output of a program.
    """
    lines = (line.strip() for line in lock.splitlines())
    return next((line for line in lines if line and not line.startswith("#") and _LOCK_LINE.fullmatch(line) is None), None)


def _translated(pip: Mapping[str, str]) -> dict[str, str]:
    result: dict[str, str] = {}
    for option, variable in (("index-url", "UV_DEFAULT_INDEX"), ("cert", "SSL_CERT_FILE")):
        if value := pip.get(option, "").strip():
            result[variable] = value
    if extra := pip.get("extra-index-url", "").split():
        result["UV_INDEX"] = " ".join(extra)
        result["UV_INDEX_STRATEGY"] = BEST_OF_ALL_INDEXES
    if links := pip.get("find-links", "").split():
        result["UV_FIND_LINKS"] = ",".join(links)
    if hosts := pip.get("trusted-host", "").split():
        result["UV_INSECURE_HOST"] = " ".join(hosts)
    if pip.get("no-index", "").strip().lower() in ("1", "true", "yes", "on"):
        result["UV_NO_INDEX"] = "1"
    return result


def _pip_options(environ: Mapping[str, str]) -> dict[str, str]:
    """pip's options as pip would see them: site, user, virtual environment, chosen file, then variables; the last wins."""
    options: dict[str, str] = {}
    for path in _pip_files(environ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue  # pip itself would complain; that is no reason to submit nothing
        for section in ("global", "install"):
            if parser.has_section(section):
                options |= parser.items(section)
    prefix = "PIP_"
    variables = {
        name[len(prefix) :].lower().replace("_", "-"): value for name, value in environ.items() if name.startswith(prefix)
    }
    return options | variables


def _pip_files(environ: Mapping[str, str]) -> Iterable[Path]:
    home = Path(environ.get("HOME") or Path.home())
    chosen = environ.get("PIP_CONFIG_FILE", "")
    if chosen == os.devnull:
        return
    yield Path("/etc/xdg/pip/pip.conf")
    yield Path("/etc/pip.conf")
    yield home / ".pip" / "pip.conf"
    yield Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"
    if environ.get("VIRTUAL_ENV"):
        yield Path(environ["VIRTUAL_ENV"]) / "pip.conf"
    if chosen:
        yield Path(chosen)
