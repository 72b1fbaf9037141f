"The command line as a shell sees it: exit codes, one sentence, nothing written, JSON lines."
import json
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from anogan.cli import app

SMALL = "--dataset digits --model gannext --dim 8 --ndf 8 --nz 16 --n-train 64 --device cpu"


def anogan(line):
    return CliRunner().invoke(app, line.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    result = anogan(f"train {SMALL} --abnormal-class 0 --niter 1 --batch-size 16 --out {out}")
    assert result.exit_code == 0, result.output
    return out, result


def test_train_says_what_came_out(trained):
    out, result = trained
    assert f"results in {out}" in result.stdout and "AUROC: gannext" in result.stdout and "knn" in result.stdout
    assert {"config.json", "metrics.json", "log.csv", "model", "picture.png", "manifest.json", "scores.csv"} == {p.name for p in out.iterdir()}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["auroc_ci"][0] <= metrics["auroc"] <= metrics["auroc_ci"][1] and metrics["seed"] == 0


def test_a_folder_without_the_name_of_its_data_set_is_refused(tmp_path):
    for command in ("train", "experiment"):
        result = anogan(f"{command} --root {tmp_path} --out {tmp_path / 'out'}")
        assert result.exit_code == 2 and "your own images are --dataset folder" in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command, extra", [("export", "anogan[export]"), ("train", "anogan[log]"), ("experiment", "anogan[distributed]")])
def test_help_names_the_extra_to_install(command, extra):
    assert extra in " ".join(anogan(f"{command} --help").stdout.split())


def test_the_papers_spellings_are_the_same_run(trained):
    line = f"train {SMALL} --abnormal_class 0 --epochs 1 --batchsize 16 --manualseed 0 --nc 1 --outf {trained[0]}"
    refused = anogan(line)
    assert refused.exit_code == 2 and "channels None, not 1" in refused.stderr
    again = anogan(line.replace("--nc 1", ""))
    assert again.exit_code == 0 and "was finished already" in again.stdout


def test_loss_weights_in_both_spellings(tmp_path):
    line = f"train {SMALL} --abnormal-class 0 --niter 1 --batchsize 16 --w_adv 1 --w-con 40 --w_lat 2 --lr 1e-4 --display --out {tmp_path / 'out'}"
    assert anogan(line).exit_code == 0
    options = json.loads((tmp_path / "out/config.json").read_text())["options"]
    assert options == dict(lr=1e-4, w_adv=1.0, w_con=40.0, w_lat=2.0, dim=8, ndf=8, nz=16)
    assert (tmp_path / "out/tensorboard").is_dir()


@pytest.mark.parametrize("model", ["skipganomaly", "sagan"])
def test_the_u_nets_train_and_score(model, tmp_path):
    line = f"train --model {model} --recipe published --ngf 4 --ndf 8 --nz 16 --n-train 32 --abnormal-class 0 --epochs 1 --batch-size 16 --device cpu"
    trained = anogan(f"{line} --out {tmp_path / 'run'}")
    assert trained.exit_code == 0 and f"AUROC: {model}" in trained.stdout
    Image.new("L", (32, 32), 128).save(tmp_path / "a.png")
    scored = anogan(f"score {tmp_path / 'run'} {tmp_path / 'a.png'} --device cpu")
    assert scored.exit_code == 0 and isinstance(json.loads(scored.stdout)["score"], float)
    assert json.loads((tmp_path / "run/config.json").read_text())["options"] == dict(ngf=4, ndf=8, nz=16)


def test_score_prints_a_json_line_per_image(trained, tmp_path):
    for name, grey in (("b.png", 0), ("a.png", 255)): Image.new("RGB", (50, 40), (grey,) * 3).save(tmp_path / name)
    result = anogan(f"score {trained[0]} {tmp_path} {tmp_path / 'b.png'} --device cpu")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["path"].rsplit("/", 1)[1] for line in lines] == ["a.png", "b.png", "b.png"]
    assert all(isinstance(line["score"], float) and isinstance(line["abnormal"], bool) for line in lines)
    assert abs(lines[1]["score"] - lines[2]["score"]) < 1e-5


@pytest.mark.parametrize("flags, fault", [
    ("--dataset digitz", "unknown data set"), ("--abnormal-class 12", "unknown class"), ("--dataset folder --root nowhere", "not at hand"),
    ("--isize 48", "32, 64, 128 or 256"), ("--batchsize 4000", "larger than"), ("--device tpu", "unknown device"), ("--dim 7", "dim"),
    ("--dataset mvtec", "not at hand"), ("--model gan", "unknown model"), ("--model sagan --dim 8", "unknown option 'dim'"),
])
def test_bad_input_is_one_sentence_exit_code_2_and_no_folder(tmp_path, flags, fault):
    result = anogan(f"train --device cpu {flags} --out {tmp_path / 'out'}")
    assert result.exit_code == 2 and fault in result.stderr and result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_missing_gpu_is_one_sentence(tmp_path):
    import torch
    if torch.cuda.is_available(): pytest.skip("this machine has a CUDA device")
    result = anogan(f"train --device cuda --out {tmp_path / 'out'}")
    assert result.exit_code == 2 and "not there on this machine" in result.stderr and not (tmp_path / "out").exists()


def folder_without_layout(path): (path / "cats").mkdir(parents=True)


def good_images(path):
    path.mkdir()
    for i in range(12): Image.effect_noise((40, 40), 50).save(path / f"good{i}.png")


def truncated(path):
    good_images(path)
    Image.effect_noise((64, 64), 50).save(path / "a.png")
    (path / "a.png").write_bytes((path / "a.png").read_bytes()[:600])


def text_named_png(path):
    good_images(path)
    (path / "a.png").write_text("hello")


@pytest.mark.parametrize("make, fault", [
    (lambda path: path.mkdir(), "no images"), (folder_without_layout, "0.normal"), (truncated, "a.png"), (text_named_png, "a.png"),
])
def test_bad_folders_to_train_on(tmp_path, make, fault):
    make(tmp_path / "images")
    result = anogan(f"train --dataset folder --root {tmp_path / 'images'} --batchsize 2 --device cpu --out {tmp_path / 'out'}")
    assert result.exit_code == 2 and fault in result.stderr and result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_bad_images_to_score(trained, tmp_path):
    text_named_png(tmp_path / "images")
    for what in (tmp_path / "images", tmp_path / "images/a.png", tmp_path / "none.png"):
        result = anogan(f"score {trained[0]} {what} --device cpu")
        assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert anogan(f"score {tmp_path} {tmp_path}").exit_code == 2


def test_bad_files_are_skipped_when_asked_and_never_in_silence(trained, tmp_path):
    text_named_png(tmp_path / "images")
    refused = anogan(f"score {trained[0]} {tmp_path / 'images'} --device cpu")
    assert refused.exit_code == 2 and "a.png: it is not an image" in refused.stderr and "--skip-bad" in refused.stderr
    result = anogan(f"score {trained[0]} {tmp_path / 'images'} {tmp_path / 'none.png'} --skip-bad --device cpu")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 0 and len(rows) == 14 and [row["path"].rsplit("/", 1)[1] for row in rows if "error" in row] == ["a.png", "none.png"]
    assert all(row.keys() == ({"path", "error"} if "error" in row else {"path", "score", "abnormal"}) for row in rows)
    assert result.stderr.count("\n") == 3 and "2 of 14 images could not be read" in result.stderr
    nothing = anogan(f"score {trained[0]} {tmp_path / 'images/a.png'} --skip-bad --device cpu")
    assert nothing.exit_code == 2 and "1 of 1 images" in nothing.stderr


def test_scores_in_a_file_go_on_wherever_they_were_cut(trained, tmp_path):
    good_images(tmp_path / "images")
    line, out = f"score {trained[0]} {tmp_path / 'images'} --device cpu --out {tmp_path / 'scores.jsonl'}", tmp_path / "scores.jsonl"
    assert anogan(line).exit_code == 0
    whole = out.read_bytes()
    wanted = [json.loads(row) for row in whole.splitlines()]
    assert len(wanted) == 12
    for cut in (0, 5, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:cut])
        result, found = anogan(line), [json.loads(row) for row in out.read_bytes().splitlines()]
        kept = whole[:cut].count(b"\n")
        assert result.exit_code == 0 and (f"{kept} of 12 images have a line" in result.stderr) == (kept > 0), result.stderr
        assert [row["path"] for row in found] == [row["path"] for row in wanted]
        assert [row["score"] for row in found] == pytest.approx([row["score"] for row in wanted], abs=1e-5)


@pytest.mark.parametrize("alter", [lambda content: b"my notes", lambda content: b"my notes\n", lambda content: b"[" * 9999 + b"\n", lambda content: b"\xff\n",
                                   lambda content: content.replace(b'"detector": "', b'"detector": "0'), lambda content: content + b'{"path": 3}\n'])
def test_a_file_of_other_lines_is_refused_and_left_alone(trained, tmp_path, alter):
    out = tmp_path / "scores.jsonl"
    Image.new("L", (32, 32), 128).save(tmp_path / "a.png")
    line = f"score {trained[0]} {tmp_path / 'a.png'} --device cpu --out {out}"
    assert anogan(line).exit_code == 0
    content = alter(out.read_bytes())
    out.write_bytes(content)
    result = anogan(line)
    assert result.exit_code == 2 and "does not go on with the scores of this detector" in result.stderr and result.stderr.count("\n") == 1
    assert out.read_bytes() == content


def test_a_file_of_scores_that_cannot_be_written_is_one_sentence(trained, tmp_path):
    Image.new("L", (32, 32), 128).save(tmp_path / "a.png")
    for out in (tmp_path, tmp_path / "none/scores.jsonl", "/dev/full"):
        result = anogan(f"score {trained[0]} {tmp_path / 'a.png'} --device cpu --out {out}")
        assert result.exit_code == 2 and f"cannot write {out}" in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_the_folder_of_another_run_is_left_alone(trained):
    result = anogan(f"train {SMALL} --abnormal-class 1 --niter 1 --batchsize 16 --out {trained[0]}")
    assert result.exit_code == 2 and "another run" in result.stderr


def test_training_that_cannot_go_on_is_exit_code_1(tmp_path):
    result = anogan(f"train {SMALL} --abnormal-class 0 --niter 2 --batchsize 16 --lr 1e30 --out {tmp_path / 'out'}")
    assert result.exit_code == 1 and "diverged" in result.stderr


TABLE = "experiment --classes 0,8 --models gannext --seeds 1 --epochs 1 --n-train 32 --batch-size 16 --device cpu --jobs 1"


def test_a_table_of_experiments_and_its_report(tmp_path):
    result = anogan(f"{TABLE} --out {tmp_path / 'table'}")
    assert result.exit_code == 0 and f"report in {tmp_path / 'table/report.html'}" in result.stdout, result.output
    assert {path.parent.name for path in tmp_path.glob("table/*/metrics.json")} == {f"digits-{c}-gannext-recommended-0" for c in (0, 8)}
    (tmp_path / "table/report.html").unlink()
    assert anogan(f"report {tmp_path / 'table'}").exit_code == 0 and (tmp_path / "table/report.html").exists()
    assert anogan(f"report {tmp_path}").exit_code == 2


def test_a_flag_wins_over_the_grids_file_and_a_broken_cell_is_exit_code_1(tmp_path):
    models = "[models]\ngannext = {epochs = 7}\nanotrans = {options = {lr = 1e30}}\n"
    (tmp_path / "grid.toml").write_text(f'datasets = "digits"\nclasses = [0]\nseeds = 1\nn_train = 32\nbatch_size = 16\n{models}')
    result = anogan(f"experiment --grid {tmp_path / 'grid.toml'} --epochs 1 --device cpu --jobs 1 --out {tmp_path / 'table'}")
    assert result.exit_code == 1 and "digits-0-anotrans-recommended-0: anogan.errors.TrainingError: training diverged" in result.stderr, result.output
    assert json.loads((tmp_path / "table/digits-0-gannext-recommended-0/config.json").read_text())["epochs"] == 1
    assert "training diverged" in (tmp_path / "table/report.md").read_text()


@pytest.mark.parametrize("flags, fault", [("--dataset digitz", "unknown data set"), ("--models gan", "unknown model"), ("--grid none.toml", "cannot read"),
                                          ("--backend slurm", "unknown backend"), ("--batch-size 4000", "larger than"), ("--seeds 0", "no cells"),
                                          ("--classes 0,12", "unknown class")])
def test_a_wrong_table_is_one_sentence_and_no_folder(tmp_path, flags, fault):
    result = anogan(f"{TABLE} {flags} --out {tmp_path / 'table'}")
    assert result.exit_code == 2 and fault in result.stderr and result.stderr.count("\n") == 1 and not (tmp_path / "table").exists()


def test_data_lists_every_data_set():
    result = anogan("data")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 8 and "digits" in result.stdout


def test_help_names_every_flag_of_the_papers():
    text = CliRunner().invoke(app, ["train", "-h"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).stdout
    for name in ("abnormal_class", "batchsize", "niter", "isize", "lr", "w_adv", "w_con", "w_lat", "display", "manualseed", "outf"):
        assert f"--{name}" in text


def test_only_the_first_of_several_processes_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = anogan(f"train --dataset digitz --out {tmp_path / 'run'}")
    assert result.exit_code == 2 and not result.output


def test_the_installed_command_and_a_light_import():
    "The command starts without torch, and the detector without the tools of the course."
    code = ("import sys, anogan.cli; assert 'torch' not in sys.modules; import anogan.detector; "
            "heavy = {'IPython', 'fastcore', 'nbdev', 'ipywidgets', 'pandas'} & set(sys.modules); assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)
    shell = subprocess.run([sys.executable, "-m", "anogan.cli", "data"], capture_output=True, text=True)
    assert shell.returncode == 0 and "digits" in shell.stdout
