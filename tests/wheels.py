"""Tiny packages, and a folder of them that uv takes for the whole world: installs are real and need no network."""

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path


def make_wheel(
    folder: Path, name: str, version: str, *, requires: Iterable[str] = (), files: Mapping[str, str] | None = None
) -> Path:
    """A pure Python wheel of `files`, by default one module of the package's name that knows its version."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    contents = dict(files) if files is not None else {f"{name.replace('-', '_')}.py": f"VERSION = {version!r}\n"}
    contents[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(
        f"Requires-Dist: {each}\n" for each in requires
    )
    contents[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: meshq\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name_inside, content in contents.items():
            wheel.writestr(name_inside, content)
    return path


def only_from(folder: Path) -> dict[str, str]:
    """Variables that let uv see the wheels in `folder` and no index."""
    return {"UV_FIND_LINKS": str(folder), "UV_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}
