"What all tests share: one thread each, and the table of the notebooks' run times."
import os

# As many tests run at once as there are cores. More threads than cores make small operations many times slower.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    seconds = {report.nodeid.split("[")[1][:-1]: dict(report.user_properties)["seconds"] for report in reports if "seconds" in dict(report.user_properties)}
    if not seconds: return
    terminalreporter.section("run times of the notebooks")
    for name, s in sorted(seconds.items()): terminalreporter.write_line(f"{name:20} {s:6.1f} s")
