"""The documents are true: their tables come from the code, their links lead somewhere, and their commands work."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, TABLES, Command, commands, written_anew
from tests.processes.mesh import temporary_mesh

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
EXECUTABLE = [document for document in DOCUMENTS if commands(document)]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("table", TABLES)
def test_a_generated_table_is_that_of_the_code(table: str) -> None:
    assert TABLES[table][0].read_text() == written_anew(table), "run python -m tests.documents"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_to_files_that_exist(document: Path) -> None:
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", document.read_text())]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_files_that_are_named_exist(document: Path) -> None:
    named = re.findall(r"`((?:meshq|tests|scripts|docs|examples)/[\w./-]+)`", document.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_readme_has_commands_that_are_run() -> None:
    assert ROOT / "README.md" in EXECUTABLE


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("document", EXECUTABLE, ids=name)
def test_the_commands_of_a_document_do_what_it_shows(document: Path, tmp_path: Path) -> None:
    with temporary_mesh() as mesh:
        [agent] = mesh.start("lab-1")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        for command in commands(document):
            done = subprocess.run(
                ["bash", "-c", command.line],
                env=agent.environment(PATH=path),
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"$ {command.line}\n{done.stdout}{done.stderr}"
            assert command.pattern().fullmatch(done.stdout), f"$ {command.line}\n{done.stdout}"


def test_a_shown_output_matches_only_what_it_shows() -> None:
    command = Command("anything", "a … c\n…\nend\n")
    assert command.pattern().fullmatch("a b c\nmore\nlines\nend\n")
    assert command.pattern().fullmatch("a  c\nend\n")
    assert not command.pattern().fullmatch("a b\nend\n")
    assert not command.pattern().fullmatch("a b c\nend\nmore\n")
