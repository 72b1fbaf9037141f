"Every notebook runs from top to bottom, each in a process of its own, within a time limit."
# Every check of an exercise has to fail on the stub and to pass on the solution.
import multiprocessing
import os
import signal
import sys
import time
from configparser import ConfigParser
from multiprocessing.connection import wait
from pathlib import Path

import nbformat
import pytest
from execnb.nbio import dict2nb
from execnb.shell import CaptureShell

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "course"))
from exercises import exercises, readers_copy, stub  # noqa: E402

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
LIMIT = float(os.environ.get("ANOGAN_NOTEBOOK_SECONDS", 300))  # each; generous, because a busy machine is no fault of the notebook


def skip_flags():
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]["tst_flags"].split()


def stub_fails(cells):
    "The cells with one more before every exercise, which fails where the exercise's check passes on the stub."
    cells = list(cells)
    for i in reversed(list(exercises(cells))):
        source = (f"try: exec({stub(cells[i].source)!r}, globals()), exec({cells[i + 1].source!r}, globals())\nexcept Exception: pass\n"
                  f"else: raise AssertionError('this check passes on the stub:', {cells[i + 1].source!r})")
        cells.insert(i, cells[i] | dict(source=source, id=f"{cells[i].id}f"))
    return cells


def run(notebook, log):
    "In the child: run `notebook`, its output into `log`; exit code 0 where all cells did."
    os.setsid()  # so that it can be killed with all its own children
    with open(log, "w") as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="agg")
    sys.path.insert(0, str(ROOT))
    os.chdir(notebook.parent)
    shell, skipped = CaptureShell(notebook), {f"#| {flag}" for flag in skip_flags()}
    try: shell.run_all(dict2nb(cells=stub_fails(nbformat.read(notebook, 4).cells)), exc_stop=True,
                       preproc=lambda cell: cell.cell_type != "code" or bool(skipped.intersection(cell.source.splitlines())))
    except Exception: sys.stderr.write(shell.prettytb(fname=notebook))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if shell.exc else 0)


def kill(child):
    try: os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError: child.kill()  # not yet the leader of its group
    wait([child.sentinel])


def run_limited(notebook, log, limit=LIMIT):
    "In the parent: (exit code, None where the time was up; seconds)."
    log.touch()
    start, context = time.perf_counter(), multiprocessing.get_context("forkserver")  # a fork of this process would inherit torch and its threads
    context.set_forkserver_preload(["execnb.shell"])
    child = context.Process(target=run, args=(notebook, log))
    child.start()
    try:
        if not wait([child.sentinel], limit): kill(child)
    except BaseException:  # the tests were stopped before their end
        kill(child)
        raise
    return None if child.exitcode == -signal.SIGKILL else child.exitcode, time.perf_counter() - start


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(notebook, tmp_path, record_property):
    log = tmp_path / "output.log"
    code, seconds = run_limited(notebook, log)
    record_property("seconds", seconds)
    if code is None: pytest.fail(f"{notebook.name} was stopped after {LIMIT:.0f} s; its output ends with\n{log.read_text()[-3000:]}")
    assert code == 0, f"{notebook.name} failed:\n{log.read_text()[-6000:]}"


@pytest.mark.parametrize(("source", "limit", "code"), [("assert 1 + 1 == 2", 60, 0), ("#| slow\nassert False", 60, 0), ("assert 1 + 1 == 3", 60, 1),
                                                       ("import time; time.sleep(600)", 3, None)])
def test_this_very_test_can_fail(tmp_path, source, limit, code):
    cells = [nbformat.v4.new_code_cell(source)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}),
                   tmp_path / "made.ipynb")
    found, seconds = run_limited(tmp_path / "made.ipynb", tmp_path / "made.log", limit)
    assert found == code and seconds < limit + 30
    if code == 1: assert "AssertionError" in (tmp_path / "made.log").read_text()


def made(*sources):
    "A notebook of code cells."
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


EXERCISE = """#| exercise
def double(x):
    "Twice x."
    ### BEGIN SOLUTION
    y = x + x
    return y
    ### END SOLUTION"""


@pytest.mark.parametrize(("check", "code"), [("assert double(2) == 4", 0), ("assert double", 1), ("assert double(2) == 5", 1)])
def test_a_check_has_to_fail_on_the_stub_and_pass_on_the_solution(tmp_path, check, code):
    nbformat.write(made(EXERCISE, f"#| check\n{check}"), tmp_path / "made.ipynb")
    assert run_limited(tmp_path / "made.ipynb", tmp_path / "made.log", 60)[0] == code


def test_the_readers_copy_has_a_stub_and_a_folded_solution():
    task, check, folded = readers_copy(made(EXERCISE, "#| check\nassert double(2) == 4")).cells
    assert task.source == 'def double(x):\n    "Twice x."\n    raise NotImplementedError("your turn")'
    assert check.source == "assert double(2) == 4" and folded.source.startswith("<details>") and "    y = x + x\n    return y\n" in folded.source
    assert "SOLUTION" not in task.source + folded.source
    assert "It prints" not in folded.source
    with pytest.raises(AssertionError, match="not followed"): readers_copy(made(EXERCISE))


def test_a_folded_solution_shows_what_its_cells_print():
    notebook = made(EXERCISE, "#| check\nprint(double(2))")
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="4 of 4\n"), nbformat.v4.new_output("execute_result", {"text/plain": "'right'"}),
                                 nbformat.v4.new_output("display_data", {"text/plain": "<Image object>", "image/png": ""})]
    _, check, folded = readers_copy(notebook).cells
    assert "It prints:\n\n```text\n4 of 4\n'right'\n```" in folded.source and "Image" not in folded.source and not check.outputs


@pytest.mark.parametrize("notebook", [path for path in NOTEBOOKS if path.stem != "index"], ids=lambda path: path.stem)
def test_every_chapter_has_two_exercises_with_hints(notebook):
    cells = nbformat.read(notebook, 4).cells
    assert len(list(exercises(cells))) >= 2
    assert sum(cell.source.count("<summary>Hint") for cell in cells if cell.cell_type == "markdown") == len(list(exercises(cells)))
