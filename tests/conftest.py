"What all tests share: a browser, and the table of the notebooks' run times."
import os
import shutil

import pytest

SECONDS = pytest.StashKey[dict]()
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def pytest_configure(config):
    config.stash[SECONDS] = {}


@pytest.fixture(scope="session")
def notebook_seconds(pytestconfig):
    "Notebook -> seconds that it took; shown when all tests are done."
    return pytestconfig.stash[SECONDS]


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM and not os.environ.get("CI"): pytest.skip("NO BROWSER, NOTHING IS TESTED IN ONE: sudo apt install chromium")
    assert CHROMIUM, "there is no chromium on this machine of CI: .ci/run installs it"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def pytest_terminal_summary(terminalreporter, config):
    seconds = config.stash[SECONDS]
    if not seconds: return
    terminalreporter.section("run times of the notebooks")
    for name, s in sorted(seconds.items()): terminalreporter.write_line(f"{name:20} {s:6.1f} s")
