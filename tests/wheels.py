"""Tiny packages, and a folder of them that uv takes for the whole world: installs are real and need no network."""

import io
import tarfile
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


BACKEND = """
import zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    {code}
    name = "{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(folder + "/" + name, "w") as wheel:
        wheel.writestr("{name}-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: {name}\\nVersion: 1.0\\n")
        wheel.writestr("{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("{name}-1.0.dist-info/RECORD", "")
    return name
"""


def make_source_package(folder: Path, name: str, code: str) -> Path:
    """Version 1.0 of a package that must be built; `code` is what its author runs on the machine that builds it."""
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    path = folder / f"{name}-1.0.tar.gz"
    files = {"pyproject.toml": project, "backend.py": BACKEND.format(code=code, name=name), "PKG-INFO": metadata}
    with tarfile.open(path, "w:gz") as archive:
        for name_inside, content in files.items():
            member = tarfile.TarInfo(f"{name}-1.0/{name_inside}")
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))
    return path


def only_from(folder: Path) -> dict[str, str]:
    """Variables that let uv see the wheels in `folder` and no index."""
    return {"UV_FIND_LINKS": str(folder), "UV_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}
