"What all tests share: the table of the notebooks' run times."
import pytest

SECONDS = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[SECONDS] = {}


@pytest.fixture(scope="session")
def notebook_seconds(pytestconfig):
    "Notebook -> seconds that it took; shown when all tests are done."
    return pytestconfig.stash[SECONDS]


def pytest_terminal_summary(terminalreporter, config):
    seconds = config.stash[SECONDS]
    if not seconds: return
    terminalreporter.section("run times of the notebooks")
    for name, s in sorted(seconds.items()): terminalreporter.write_line(f"{name:20} {s:6.1f} s")
