"What the chapter on experiments cannot show: grids that are wrong, processes that die, and a real Dask cluster."
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from anogan import experiments
from anogan.data import DATASETS
from anogan.errors import InputError
from anogan.experiments import RunConfig, attempt, cell_config, grid, label, look_first, on_dask, read_grid, read_sweep, sweep

ROOT = Path(__file__).parent.parent
SMALL = dict(n_train=64, epochs=3, batch_size=16, options=dict(dim=8, depths=(1, 1, 1, 1), ndf=8, nz=16), device="cpu")
CELLS = grid(classes=[3, 8], models="gannext", seeds=2, **SMALL)


def results(out, cells=CELLS):
    "Weights and AUROC of every cell."
    return {name: ((out / name / "model/model.safetensors").read_bytes(), json.loads((out / name / "metrics.json").read_text())["auroc"]) for name in cells}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "whole"
    assert sweep(CELLS, out, jobs=1, progress=False) == {}
    return out, results(out)


# --- the grid ---------------------------------------------------------------------------------------------------------------------

def test_every_combination_once_seeds_first():
    cells = grid(datasets=["digits", "elpv"], classes=["all"], models=["anotrans", "gannext"], seeds=[5, 7])
    assert len(cells) == (10 + 1) * 2 * 2 and [config.seed for config in cells.values()] == [5] * 22 + [7] * 22
    assert {config.recipe for config in cells.values() if config.dataset == "elpv"} == {"defects"}
    assert all(name == label(config) for name, config in cells.items())


def test_the_nearer_setting_wins_and_options_are_joined():
    cells = grid(datasets=dict(digits=dict(classes=[1], n_train=90)), models=dict(gannext=dict(epochs=40, options=dict(dim=8))), recipes=dict(published={}),
                 seeds=1, epochs=25, n_train=50, options=dict(lr=1e-3, dim=4), baselines=["knn"])
    assert list(cells) == ["digits-1-gannext-published-0"]
    config, = cells.values()
    assert (config.epochs, config.n_train, config.options, config.baselines) == (40, 90, dict(lr=1e-3, dim=8), ("knn",))


@pytest.mark.parametrize("wrong, fault", [
    (dict(datasets="digitz"), "unknown data set"), (dict(epoch=3), "did you mean 'epochs'"), (dict(seeds=0), "no cells"),
    (dict(models=dict(gannext=dict(epoch=3))), "unknown setting"), (dict(models=[]), "no cells"),
])
def test_a_wrong_grid_is_one_sentence(wrong, fault):
    with pytest.raises(InputError, match=fault) as e: grid(**wrong)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content, fault", [(b"classes = [1,", "is not TOML"), (b"\xff\xfe", "is not TOML"), (None, "cannot read")])
def test_a_wrong_file_is_one_sentence(tmp_path, content, fault):
    if content: (tmp_path / "grid.toml").write_bytes(content)
    with pytest.raises(InputError, match=fault) as e: read_grid(tmp_path / "grid.toml")
    assert "\n" not in str(e.value)


def test_the_papers_settings_are_in_their_files():
    cells = {path.stem: grid(**read_grid(path)) for path in (ROOT / "experiments").glob("*.toml")}
    assert sorted(cells) == ["cifar10", "digits", "elpv", "fashion_mnist", "mvtec", "stl10"]
    for name, of in cells.items():
        assert {config.dataset for config in of.values()} == {name} and {config.seed for config in of.values()} == {0, 1, 2}
        assert {config.model for config in of.values()} == {"anotrans", "gannext"} and "published" in {config.recipe for config in of.values()}
        if DATASETS[name].classes and not DATASETS[name].categories: assert {config.abnormal_class for config in of.values()} == set(DATASETS[name].classes)
    for name, epochs in dict(cifar10=dict(anotrans=25, gannext=40), stl10=dict(anotrans=80, gannext=80)).items():
        assert all((c.batch_size, c.isize, c.size, c.epochs) == (128, 32, "paper", epochs[c.model]) for c in cells[name].values())


def test_a_config_survives_its_json():
    config = next(iter(CELLS.values()))
    assert cell_config(json.loads(json.dumps(experiments.asdict(config)))) == replace(config, options=dict(config.options, depths=[1, 1, 1, 1]))


# --- one machine ------------------------------------------------------------------------------------------------------------------

def test_two_processes_give_what_one_gives(whole, tmp_path):
    assert sweep(CELLS, tmp_path / "out", jobs=2, progress=False) == {}
    assert results(tmp_path / "out") == whole[1]


def test_finished_cells_are_left_alone_and_a_larger_grid_may_follow(whole):
    out, before = whole[0], {path: path.stat().st_mtime_ns for path in whole[0].glob("*/*")}
    more = grid(classes=[3, 8], models="gannext", seeds=2, **SMALL) | grid(classes=[5], models="gannext", seeds=1, **SMALL)
    assert sweep(more, out, jobs=1, progress=False) == {}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert list(read_sweep(out)["cells"]) == list(more)


def test_what_is_wrong_shows_before_anything_is_written(whole, tmp_path):
    wrong = {"a": RunConfig(abnormal_class="3", options=dict(wobble=1))}
    with pytest.raises(InputError, match="unknown option"): sweep(wrong, tmp_path / "out", progress=False)
    with pytest.raises(InputError, match="unknown backend"): sweep(CELLS, tmp_path / "out", backend="slurm", progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="another run"): sweep({name: replace(c, epochs=4) for name, c in CELLS.items()}, whole[0], progress=False)
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no sweep"): look_first(CELLS, tmp_path)


def test_a_broken_cell_is_tried_again_and_the_others_do_not_wait(tmp_path, monkeypatch):
    calls, real = [], experiments.run

    def shaky(config, out, **options):
        calls.append(out.name)
        if config.seed == 1 and calls.count(out.name) == 1: raise OSError("the disk was full")
        if config.seed == 0 and config.abnormal_class == "3": raise OSError("the disk is full")
        return real(config, out, **options)
    monkeypatch.setattr(experiments, "run", shaky)
    first, *rest = CELLS
    faults = sweep(CELLS, tmp_path / "out", jobs=1, progress=False)
    assert list(faults) == [first] and "the disk is full" in faults[first]
    assert read_sweep(tmp_path / "out")["faults"] == faults
    assert sorted(calls) == sorted([first] * 2 + [rest[0]] + rest[1:] * 2)
    monkeypatch.setattr(experiments, "run", real)
    assert sweep(CELLS, tmp_path / "out", jobs=1, progress=False) == {} and read_sweep(tmp_path / "out")["faults"] == {}


def test_ctrl_c_is_not_caught_by_a_cell(tmp_path, monkeypatch):
    def stopped(*args, **options): raise KeyboardInterrupt
    monkeypatch.setattr(experiments, "run", stopped)
    with pytest.raises(KeyboardInterrupt): attempt("a", RunConfig(), tmp_path)


def children():
    "Process ids of this process's children, on Linux."
    return [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]


def kill_when_training(out, victims):
    "In a thread: when the first epoch is in a log, kill one of the processes that `victims` names."
    def watch():
        while not list(out.glob("*/log.csv")): time.sleep(0.02)
        os.kill(victims()[0], signal.SIGKILL)
        killed.append(True)
    killed, thread = [], threading.Thread(target=watch, daemon=True)
    thread.start()
    return killed


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to find the workers")
def test_a_worker_that_is_killed_costs_nothing_but_time(whole, tmp_path):
    before = set(children())

    def workers(): return [pid for pid in children() if pid not in before and b"LokyProcess" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    from joblib.externals.loky import get_reusable_executor
    get_reusable_executor().shutdown(wait=True)  # workers of other tests
    killed = kill_when_training(tmp_path / "out", workers)
    assert sweep(CELLS, tmp_path / "out", jobs=2, progress=False) == {} and killed
    assert results(tmp_path / "out") == whole[1]


# --- many machines ----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def cluster():
    "A scheduler and two worker processes."
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster: yield cluster


def test_dask_with_a_worker_that_is_killed_gives_the_same(whole, tmp_path, cluster):
    killed = kill_when_training(tmp_path / "out", lambda: [nanny.pid for nanny in cluster.workers.values()])
    assert sweep(CELLS, tmp_path / "out", backend="dask", scheduler=cluster.scheduler_address, progress=False) == {} and killed
    assert results(tmp_path / "out") == whole[1]


def test_dask_reports_a_broken_cell(tmp_path, cluster):
    cells = dict(bad=RunConfig(abnormal_class="13"))
    (_, fault), = on_dask(cells, tmp_path, 1, cluster.scheduler_address)
    assert "unknown class" in fault


def test_no_scheduler_is_one_sentence(tmp_path):
    pytest.importorskip("distributed")
    with pytest.raises(InputError, match="no Dask scheduler answers at nonsense"): list(on_dask(CELLS, tmp_path, 1, "nonsense"))


def test_dask_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(InputError, match="anogan.distributed."): list(on_dask(CELLS, tmp_path, 1))
