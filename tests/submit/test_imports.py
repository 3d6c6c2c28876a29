"""What a script imports is read off its text."""

from pathlib import Path

from meshq.submit.imports import scan
from tests.submit.repositories import write


def test_every_kind_of_import_is_found_in_its_class(tmp_path: Path) -> None:
    script = write(
        tmp_path / "train.py",
        """
from __future__ import annotations
import os, json.decoder
import numpy as np
import sklearn.datasets
from google.cloud import storage
from typing import TYPE_CHECKING
import helper
from package.inner import thing
from package import other
if TYPE_CHECKING:
    import only_for_types
try:
    import cupy
except ImportError:
    cupy = None
try:
    import tomllib
except (ModuleNotFoundError, AttributeError):
    import tomli
try:
    import handled_otherwise
except ValueError:
    pass
def late():
    import lazily
    importlib.import_module("by_name.deep")
    importlib.import_module(unknowable)
""",
    )
    write(tmp_path / "helper.py", "import torch\n")
    write(tmp_path / "package" / "__init__.py", "from . import sibling\nfrom .inner import deep\n")
    write(tmp_path / "package" / "inner.py", "import pandas\n")
    write(tmp_path / "package" / "other.py")
    write(tmp_path / "package" / "sibling.py", "import train\n")
    found = scan(script)
    assert sorted(found.needed) == ["google.cloud.storage", "numpy", "pandas", "sklearn.datasets", "torch"]
    assert sorted(found.late) == ["by_name.deep", "handled_otherwise", "lazily"]
    assert sorted(found.optional) == ["cupy", "tomli"]
    assert found.needed["torch"] == "helper.py:1"
    assert sorted(str(path.relative_to(tmp_path)) for path in found.local) == [
        "helper.py", "package/__init__.py", "package/inner.py", "package/other.py", "package/sibling.py",
    ]  # fmt: skip


def test_what_a_module_imports_comes_no_sooner_than_the_module(tmp_path: Path) -> None:
    write(tmp_path / "early.py", "import numpy\n")
    write(tmp_path / "late.py", "import pandas\nimport early\nclass Here:\n    import torch\n")
    write(tmp_path / "perhaps.py", "import cupy\n")
    script = write(
        tmp_path / "train.py",
        "def f():\n    import late, early\nimport early\ntry:\n    import perhaps\nexcept ImportError:\n    import late\n",
    )
    found = scan(script)
    assert (list(found.needed), sorted(found.late), list(found.optional)) == (["numpy"], ["pandas", "torch"], ["cupy"])
    assert [path.name for path in found.local] == ["early.py", "late.py", "perhaps.py"]


def test_a_file_that_is_no_python_of_ours_is_named_and_not_fatal(tmp_path: Path) -> None:
    found = scan(write(tmp_path / "train.py", "def f(:\n"))
    assert (found.needed, found.local) == ({}, [])
    assert found.unread[0].startswith("train.py: ")


def test_a_module_in_front_of_the_standard_library_is_local(tmp_path: Path) -> None:
    write(tmp_path / "random.py", "import six\n")
    assert list(scan(write(tmp_path / "train.py", "import random\n")).needed) == ["six"]
