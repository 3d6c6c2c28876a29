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
    import required_after_all
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
    assert sorted(found.needed) == [
        "by_name.deep", "google.cloud.storage", "lazily", "numpy", "pandas", "required_after_all", "sklearn.datasets", "torch",
    ]  # fmt: skip
    assert sorted(found.optional) == ["cupy", "tomli"]
    assert found.needed["torch"] == "helper.py:1"
    assert sorted(str(path.relative_to(tmp_path)) for path in found.local) == [
        "helper.py", "package/__init__.py", "package/inner.py", "package/other.py", "package/sibling.py",
    ]  # fmt: skip


def test_a_file_that_is_no_python_of_ours_is_named_and_not_fatal(tmp_path: Path) -> None:
    found = scan(write(tmp_path / "train.py", "def f(:\n"))
    assert (found.needed, found.local) == ({}, [])
    assert found.unread[0].startswith("train.py: ")


def test_a_module_in_front_of_the_standard_library_is_local(tmp_path: Path) -> None:
    write(tmp_path / "random.py", "import six\n")
    assert list(scan(write(tmp_path / "train.py", "import random\n")).needed) == ["six"]
