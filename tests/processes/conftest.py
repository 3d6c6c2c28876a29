"""Meshes for tests, and what their agents said when a test fails."""

from collections.abc import Generator, Iterator

import pytest

from tests.processes.mesh import Agent, Mesh, temporary_mesh


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    """A mesh of this test alone, without agents yet."""
    with temporary_mesh() as made:
        yield made


@pytest.fixture(scope="session")
def shared_mesh() -> Iterator[Mesh]:
    """Three agents, ada, bob and cyd, that all tests share which hurt none of them. Each has its name as label `who`."""
    with temporary_mesh() as made:
        ada, *others = [made.add(name) for name in ("ada", "bob", "cyd")]
        ada.join("--new", "--label", "who=ada")
        for agent in others:
            agent.join("--seed", ada.seed, "--label", f"who={agent.name}", key=made.key())
        made.wait_until_whole(ada, *others)
        yield made


@pytest.fixture
def ada(shared_mesh: Mesh) -> Agent:
    return shared_mesh.by_name("ada")


@pytest.fixture
def bob(shared_mesh: Mesh) -> Agent:
    return shared_mesh.by_name("bob")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and report.when == "call":
        for name in ("mesh", "shared_mesh"):
            if isinstance(mesh := getattr(item, "funcargs", {}).get(name), Mesh):
                report.sections.append((f"agents of {name}", mesh.report()))
    return report
