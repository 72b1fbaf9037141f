"The marks of a chapter and of an exported name that a program can check, and README.md as the picture of its notebook."
import ast
import importlib
import inspect
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Annotated, get_origin

import pytest
from fastcore.docments import docments

from anogan.evaluation import mean_difference, mean_sd

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(path.stem for path in (ROOT / "anogan").glob("[!_]*.py"))
# What only one machine, or one run, has: a path from the root of its disk (but for Debian's data sets), an installed package, an address in memory.
MACHINE = re.compile(r"(?<![\w./~)\]}>*+`-])/(?!usr/share/)[a-z]+\b(?!>)|(?<!\w)`/(?!usr/share/)[a-z]+|site-packages|\bat 0x[0-9a-f]+")
WARNING = re.compile(r"\w*Warning\b: ")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_module = pytest.mark.parametrize("name", MODULES)


def text(lines):
    return lines if isinstance(lines, str) else "".join(lines)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def outputs(path):
    return [(cell["id"], output) for cell in read(path) for output in cell.get("outputs", [])]


def shown(output):
    "All the text of an output."
    return "".join(map(text, [output.get("text", ""), *(value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))]))


def none(found):
    "Nothing was found, or all of it is named."
    assert not found, "\n" + "\n".join(map(str, found))


def code_lines(source):
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


# ---------------------------------------------------------------- notebooks

@each_notebook
def test_pictures_have_a_text_for_those_who_cannot_see_them(path):
    pictures = [(cell, output["metadata"].get(kind, {}).get("alt", "")) for cell, output in outputs(path)
                for kind in output.get("data", {}) if kind.startswith("image/")]
    none([(cell, alt) for cell, alt in pictures if len(alt) < 20])
    sources = [text(cell["source"]) for cell in read(path) if cell["cell_type"] == "markdown"]
    none([alt for source in sources for alt in re.findall(r"!\[(.*?)\]\(", source) if len(alt) < 20])
    assert not any("<img" in source and 'alt="' not in source for source in sources)


@each_notebook
def test_outputs_are_results_and_nothing_else(path):
    found = outputs(path)
    none([cell for cell, output in found if output["output_type"] == "error"])
    none([(cell, shown(output)) for cell, output in found if output.get("name") == "stderr"])
    none([(cell, shown(output)) for cell, output in found if WARNING.search(shown(output)) or "\r" in shown(output)])


@pytest.mark.parametrize("tale", ["/" + "tmp/x", "saved in /" + "home", "'/" + "root/a.png'", "(/" + "opt/a)", "file:/" + "var/a", "`/" + "srv/a`",
                                  "=/" + "mnt/a"])
def test_a_path_of_one_machine_is_seen(tale):
    assert MACHINE.search(tale)


@each_notebook
def test_nothing_tells_on_which_machine_it_ran(path):
    texts = [(cell["id"], text(cell["source"])) for cell in read(path)] + [(cell, shown(output)) for cell, output in outputs(path)]
    none([(cell, match[0]) for cell, content in texts for match in MACHINE.finditer(content)])


@each_notebook
def test_size(path):
    assert path.stat().st_size < 300_000
    sources = [text(cell["source"]) for cell in read(path) if cell["cell_type"] == "code"]
    lengths = [len(code_lines(source)) for source in sources]
    assert not lengths or statistics.median(lengths) <= 4, "most of the code cells are long"
    exported_class = re.compile(r"^#\|\s*export\b(.|\n)*^class ", re.MULTILINE)
    none([source.splitlines()[:3] for source, n in zip(sources, lengths) if n > 25 and not exported_class.search(source)])


@each_notebook
def test_opening(path):
    first = text(read(path)[0]["source"])
    assert re.match(r"# \S", first)
    if path.stem != "index": assert re.search(r"^\*about .* min to read · runs in .* on two cores · needs .*\*$", first, re.MULTILINE), first


@each_notebook
def test_links_lead_somewhere(path):
    targets = [target for cell in read(path) if cell["cell_type"] == "markdown"
               for target in re.findall(r"\]\(([^)#\s]+)", text(cell["source"])) if not re.match(r"[a-z]+:", target)]
    none([target for target in targets if not (path.parent / target).exists()])


def test_every_module_comes_from_one_notebook():
    found = [match[1] for path in NOTEBOOKS for cell in read(path) if (match := re.match(r"#\|\s*default_exp (\S+)", text(cell["source"])))]
    assert sorted(found) == MODULES


# ---------------------------------------------------------------- exported names

def exported(name):
    "(label, object) of each function and class that `anogan.<name>` exports, and of the public methods."
    module = importlib.import_module(f"anogan.{name}")
    for key in module.__all__:
        value = getattr(module, key)
        if not (inspect.isfunction(value) or inspect.isclass(value)): continue
        yield key, value
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            function = getattr(function, "fget", None) or getattr(function, "__func__", function)
            if inspect.isfunction(function) and not method.startswith("_"): yield f"{key}.{method}", function


def parameters(value):
    "Names of the parameters that need a comment: not self, not *args or **options, not what the command line explains in its help."
    try: signature = inspect.signature(value)
    except (TypeError, ValueError): return []
    own = not inspect.isclass(value) or any(part in vars(value) for part in ("__init__", "__dataclass_fields__"))
    return [p.name for p in signature.parameters.values()
            if own and p.name not in ("self", "cls") and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and get_origin(p.annotation) is not Annotated]


@each_module
def test_every_exported_name_says_what_it_does(name):
    made_up = {label for label, value in exported(name) if (value.__doc__ or "").startswith(f"{value.__name__}(")}  # by @dataclass
    none([label for label, value in exported(name) if label in made_up or not inspect.getdoc(value)])


@each_module
def test_every_parameter_says_what_it_is(name):
    silent = [f"{label}({parameter})" for label, value in exported(name) for parameter in parameters(value) if not docments(value).get(parameter)]
    none(silent)


# ---------------------------------------------------------------- project

def imported(path):
    "Names of the packages that a module imports: (at once, later, inside a function)."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {id(node): [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
             for node in ast.walk(tree) if isinstance(node, ast.Import) or isinstance(node, ast.ImportFrom) and not node.level}
    tops = {key: {name.split(".")[0] for name in value} - sys.stdlib_module_names - {"anogan"} for key, value in names.items()}
    at_once = {id(node) for node in tree.body}
    return set().union(*(v for k, v in tops.items() if k in at_once)), set().union(*(v for k, v in tops.items() if k not in at_once))


def test_the_package_needs_what_it_imports_and_imports_what_it_needs():
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    other_names = {"scikit-learn": "sklearn", "pillow": "PIL"}
    needed = {other_names.get(name, name) for name in re.findall(r"(\S+?)[<>=]\S+", config["DEFAULT"]["requirements"])}
    at_once, later = map(set.union, *(imported(path) for path in sorted((ROOT / "anogan").glob("[!_]*.py"))))
    assert at_once <= needed, "imported, but not among the requirements of settings.ini"
    assert needed <= at_once | later, "among the requirements of settings.ini, but imported nowhere"


def test_readme_is_what_its_notebook_gives(tmp_path):
    if not shutil.which("make"): pytest.skip("no make here")
    command = ["make", "--no-print-directory", "readme", "DEV=", f"BIN={Path(sys.executable).parent}", f"README_DIR={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made, kept = ((folder / "README.md").read_text(encoding="utf-8") for folder in (tmp_path, ROOT))
    assert [line.rstrip() for line in made.strip().splitlines()] == [line.rstrip() for line in kept.strip().splitlines()], "README.md is old: make readme"


def test_the_course_map_has_every_chapter_under_its_own_title():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        title = re.sub(r"^# (\d+ · )?", "", text(read(path)[0]["source"]).splitlines()[0])
        if path.stem != "index": assert re.search(rf"\[(\d+ · )?{re.escape(title)}\]\(nbs/{path.name}\)", readme), f"{path.name}: {title}"


def fences(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in fences("python"):
        exec(code.replace("epochs=10", "epochs=1"), names)
        names["images"] = names["data"].test
    assert names["Detector"].load("runs/x").threshold == names["detector"].threshold


def test_the_commands_of_the_readme_are_understood():
    import typer

    from anogan.cli import app
    commands = typer.main.get_command(app).commands
    lines = [shlex.split(line, comments=True) for fence in fences("sh") for line in fence.splitlines() if line.startswith("anogan ")]
    assert {line[1] for line in lines} == set(commands)
    for _, name, *options in lines: commands[name].make_context(name, options)


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    none([target for target in targets if not re.match(r"[a-z]+:", target) and not (ROOT / target).exists()])


def runs_in_results(name):
    "The runs behind a line of the README's table: model, class, seed and AUROCs."
    if name == "digits":
        runs = json.loads((ROOT / "results/digits/report.json").read_text(encoding="utf-8"))
        return [dict(run["config"], auroc=run["metrics"]["auroc"], baselines={b: m["auroc"] for b, m in run["metrics"]["baselines"].items()}) for run in runs]
    rows = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row.get("variant", "nothing") == "nothing"]


@pytest.mark.parametrize("name, said", [("digits", "digits"), ("ablation-elpv", "solar cells"), ("fashion_mnist", "Fashion-MNIST, 6,000"),
                                        ("fashion_mnist-all", "Fashion-MNIST, all")])
def test_the_table_of_the_readme_is_that_of_the_results(name, said):
    def cell(model, baseline=None):
        runs = [run for run in runs_in_results(name) if run["model"] == model]
        found = [(run["abnormal_class"], run["baselines"][baseline] if baseline else run["auroc"]) for run in runs]
        classes = [[value for other, value in found if other == c] for c in dict.fromkeys(c for c, _ in found)]
        if not runs: return "–"
        middle, spread = mean_sd(classes)
        return f"{middle:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")
    line = next(line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith(f"| {said}") and line.count("|") == 8)
    expected = [cell("anotrans"), cell("gannext"), cell("gannext", "knn"), cell("gannext", "pca")]
    assert [part.strip() for part in line.split("|")[4:-1]] == expected


def test_the_figures_beside_that_table_are_those_of_the_results():
    text, runs = (ROOT / "README.md").read_text(encoding="utf-8"), runs_in_results("digits")
    by_class = [statistics.mean(run["auroc"] for run in runs if (run["model"], run["abnormal_class"]) == key)
                for key in {(run["model"], run["abnormal_class"]) for run in runs}]
    assert len(by_class) == 20 and f"no digit falls below {int(100 * min(by_class)) / 100:.2f}" in text
    peeked = [row["peeking_gap"] for row in runs_in_results("peeking-digits")]
    assert f"would have added {max(peeked):.3f} at most" in text
    named = [statistics.mean(row[part] for row in runs_in_results("fashion_mnist-labels")) for part in ("distance", "direction")]
    assert f"comes to {named[0]:.3f} and {named[1]:.3f}, by two distances of its features" in text
    clothes = runs_in_results("fashion_mnist-all")
    ahead = mean_difference([[run["auroc"] - run["baselines"]["knn"] for run in clothes if run["seed"] == seed] for seed in range(3)])
    leads = [statistics.mean(run["auroc"] - run["baselines"]["knn"] for run in clothes if run["seed"] == seed) for seed in range(3)]
    assert min(leads) > 0 > ahead.low and f"with each of three seeds, by {ahead.difference:.3f}, which three seeds cannot tell from luck" in text
    for model in ("anotrans", "gannext"):
        signs = [(run["versus"]["low"] > 0) - (run["versus"]["high"] < 0) for run in runs_in_results("ablation-elpv") if run["model"] == model]
        assert signs == [1, 1, 1] and "ahead of a nearest neighbour on pixels, with every seed" in text


def speed_of(name):
    "What `benchmarks/speed.py` measured, and a function: how often a way is as fast as another, (median, lowest, highest)."
    facts = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())

    def times(way, task="train", model="gannext", batch=128, than="released-style"):
        cell = next(c for c in facts["cells"] if (c["task"], c["model"], c["batch"]) == (task, model, batch))
        rounds = [old / new for old, new in zip(cell["ways"][than]["seconds"], cell["ways"][way]["seconds"])]
        return statistics.median(rounds), min(rounds), max(rounds)
    return facts, times


def test_the_readmes_figures_of_a_processor_without_bf16_are_those_of_the_results():
    text, (facts, times) = (ROOT / "README.md").read_text(encoding="utf-8"), speed_of("speed-cpu-fp32")
    ours, other = times("recommended", model="anotrans"), times("recommended")
    scored = [times(way, "score", model)[0] for way in ("near_image", "near_map") for model in ("anotrans", "gannext")]
    assert "bf16" not in facts["limits"]
    for said in (f"{ours[0]:.1f} times ({ours[1]:.1f} to {ours[2]:.1f}) the rate", f"{other[0]:.1f} times ({other[1]:.1f} to {other[2]:.1f}) with GanNeXt",
                 "`near_image` at {:.1f} and {:.1f} times, `near_map` at {:.1f} and {:.1f} times".format(*scored)):
        assert said in text, said


def test_the_readmes_figures_of_a_gpu_are_those_of_the_results():
    text, (facts, times) = (ROOT / "README.md").read_text(encoding="utf-8"), speed_of("speed-cuda")
    ours, other = times("recommended", model="anotrans"), times("recommended")
    older, older_times = speed_of("speed-cuda-h100")
    elsewhere = [older_times("recommended", model=model)[0] for model in ("anotrans", "gannext")]
    assert f"they were {elsewhere[0]:.1f} and {elsewhere[1]:.1f} in training, with much the same" in text
    for model in ("anotrans", "gannext"):
        steps = [next(c for c in run["cells"] if (c["task"], c["model"], c["batch"]) == ("train", model, 128)) for run in (facts, older)]
        here, there = (statistics.median(step["ways"]["recommended"]["seconds"]) for step in steps)
        assert 0.95 < here / there < 1.05
    large = [times("recommended", model=model, batch=1024)[0] for model in ("anotrans", "gannext")]
    scored = {(model, way): times(way, "score", model, 1024)[0] for model in ("anotrans", "gannext") for way in ("near_image", "near_map")}
    few = {(model, way): times(way, "score", model)[0] for model, way in scored}
    step = next(c for c in facts["cells"] if (c["task"], c["model"], c["batch"]) == ("train", "anotrans", 128))["ways"]["recommended"]
    share = step["flops"] / statistics.median(step["seconds"]) / facts["limits"]["bf16"]
    for said in (f"{ours[0]:.1f} times ({ours[1]:.1f} to {ours[2]:.1f})", f"{other[0]:.1f} times ({other[1]:.1f} to {other[2]:.1f})",
                 f"{large[0]:.1f} and {large[1]:.1f} times", f"{times('recommended', model='anotrans', than='recommended, not recorded')[0]:.1f} times its own",
                 f"data path is {times('in memory', 'data', '')[0]:.0f} times as fast",
                 f"`near_image` scores 1,024 images at {scored['anotrans', 'near_image']:.0f} and {scored['gannext', 'near_image']:.0f} times the rate",
                 f"`near_map` at {scored['anotrans', 'near_map']:.0f} and {scored['gannext', 'near_map']:.0f}",
                 f"128 images run at {few['anotrans', 'near_image']:.0f} and {few['gannext', 'near_image']:.0f}, "
                 f"and at {few['anotrans', 'near_map']:.0f} and {few['gannext', 'near_map']:.0f} times", f"{share:.0%}".replace("%", " %")):
        assert said in text, said
