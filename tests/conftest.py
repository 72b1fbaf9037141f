"What all tests share: one thread each, a browser, and the table of the notebooks' run times."
import os
import shutil

import pytest

# As many tests run at once as there are cores. More threads than cores make small operations many times slower.
os.environ["OMP_NUM_THREADS"] = "1"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM and not os.environ.get("CI"): pytest.skip("NO BROWSER, NOTHING IS TESTED IN ONE: sudo apt install chromium")
    assert CHROMIUM, "there is no chromium on this machine of CI: .ci/run installs it"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    seconds = {report.nodeid.split("[")[1][:-1]: dict(report.user_properties)["seconds"] for report in reports if "seconds" in dict(report.user_properties)}
    if not seconds: return
    terminalreporter.section("run times of the notebooks")
    for name, s in sorted(seconds.items()): terminalreporter.write_line(f"{name:20} {s:6.1f} s")
