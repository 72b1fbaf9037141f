"""Planted faults: do the tests notice? Each changes one line of a copy of the package; the tests of its module have to fail.

    python tests/mutants.py                 # all of them: some minutes; writes docs/mutants.json
    python tests/mutants.py --only 3 17     # some of them, by number

A fault that no test notices is a hole in the tests, or a line that does nothing.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).parent.parent
MUTANTS = [  # (module, what stands there, what is planted)
    ("losses", "torch.full_like(logits, float(real))", "torch.full_like(logits, float(not real))"),
    ("losses", "return F.l1_loss(fake, x)", "return F.mse_loss(fake, x)"),
    ("losses", "return F.mse_loss(fake_features, real_features)", "return F.l1_loss(fake_features, real_features)"),
    ("losses", "con: float = 50.0", "con: float = 40.0"),
    ("scoring", "return (x - fake).square().mean(dim=1)\n", "return (x - fake).abs().mean(dim=1)\n"),
    ("scoring", "error_map(x, fake).mean(dim=(1, 2))", "error_map(x, fake).sum(dim=(1, 2))"),
    ("scoring", "if any(module.training for network in (generator, discriminator) for module in network.modules()):", "if generator.training:"),
    ("scoring", 'PUBLISHED_WEIGHTS = {"rec": 0.9, "lat": 0.1}', 'PUBLISHED_WEIGHTS = {"rec": 0.1, "lat": 0.9}'),
    ("scoring", "(t - self.mean[name]) / self.sd[name]", "(t - self.mean[name]) * self.sd[name]"),
    ("scoring", "float(t.double().std()) if t.max() > t.min() else 1.0", "float(t.double().std())"),
    ("scoring", "if not t.isfinite().all():", "if False:"),
    ("scoring", 'mode="replicate"', 'mode="constant"'),
    ("scoring", "weights / weights.sum()", "weights / weights.max()"),
    ("evaluation", "np.cumsum(counts) - (counts - 1) / 2", "np.cumsum(counts) - (counts - 1)"),
    ("evaluation", "n1 * (n1 + 1) / 2) / (n1 * n0)", "n1 * (n1 - 1) / 2) / (n1 * n0)"),
    ("evaluation", "np.unique(-scores, return_inverse=True)", "np.unique(scores, return_inverse=True)"),
    ("evaluation", "math.ceil(tpr * labels.sum() - 1e-9)", "math.floor(tpr * labels.sum() - 1e-9)"),
    ("evaluation", "called = scores > float(", "called = scores >= float("),
    ("evaluation", "NormalDist().inv_cdf((1 + level) / 2)", "NormalDist().inv_cdf(level)"),
    ("evaluation", "if deviation < 1e-12: return _newcombe", "if False: return _newcombe"),
    ("evaluation", "(self.score(images).double() > self.threshold)", "(self.score(images).double() >= self.threshold)"),
    ("evaluation", "return float(history.max() - history[-1])", "return float(history.max() - history[0])"),
    ("data", "(values.astype(np.int64) + 128) // 257", "values.astype(np.int64) // 257"),
    ("data", "image = ImageOps.exif_transpose(image)", "image = image.copy()"),
    ("data", 'Image.new("RGBA", image.size, "white")', 'Image.new("RGBA", image.size, "black")'),
    ("data", "Image.Resampling.BILINEAR", "Image.Resampling.NEAREST"),
    ("data", "pixels.float().div_(127.5).sub_(1)", "pixels.float().div_(127.5)"),
    ("data", "if real in seen: folders.clear()", "if False: folders.clear()"),
    ("data", "pool, test = np.flatnonzero((labels == 0) & ~in_test)", "pool, test = np.flatnonzero((labels == 0))"),
    ("data", "return train[stratified(strata[train], n_train, seed, 2)], val, test", "return train[:n_train], val, test"),
    ("data", 'if not (values.min() >= 0 and values.max() <= 1):', 'if values.min() < 0 or values.max() > 1:'),
    ("data", "if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):", "if False:"),
    ("data", 'os.path.normpath(file).startswith("..")', 'file.startswith("//")'),
]
TESTS = dict(losses=["test_losses.py"], scoring=["test_scoring.py"], evaluation=["test_evaluation.py"], data=["test_data.py", "test_fuzz.py"])


def planted(fault, folder):
    "A copy of package and tests with one fault in it."
    module, old, new = fault
    for name in ("anogan", "tests", "settings.ini", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    path = folder / "anogan" / f"{module}.py"
    source = path.read_text(encoding="utf-8")
    assert source.count(old) >= 1, f"{module}.py no longer holds {old!r}: mend this list"
    path.write_text(source.replace(old, new, 1), encoding="utf-8")


def no_fault(module):
    "A change that changes nothing: with it, the tests of the copy have to pass, or they would seem to notice everything."
    return module, '"""', '"""'


def caught(fault, seconds=900):
    "Whether the tests of the module fail with the fault in it; a time-out counts as noticed."
    module = fault[0]
    with tempfile.TemporaryDirectory() as place:
        planted(fault, Path(place))
        paths = [name for name in os.environ.get("PYTHONPATH", "").split(os.pathsep) if name and Path(name) != ROOT]
        environment = os.environ | dict(PYTHONPATH=os.pathsep.join([place, *paths]), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/{name}" for name in TESTS[module])]
        try: done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired: return True, "time-out"
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode == 1, failed[0].split(" ")[1] if failed else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", default=range(len(MUTANTS)))
    parser.add_argument("--out", type=Path, default=ROOT / "docs/mutants.json")
    args = parser.parse_args()
    rows, start = [], perf_counter()
    for module in dict.fromkeys(MUTANTS[number][0] for number in args.only):
        assert not caught(no_fault(module))[0], f"the tests of {module} fail without any fault: mend them first"
    for number in args.only:
        (noticed, by), (module, old, new) = caught(MUTANTS[number]), MUTANTS[number]
        rows.append(dict(number=number, module=module, old=old.strip(), new=new.strip(), caught=noticed, by=by))
        print(f"{'caught ' if noticed else 'MISSED '} {number:2} {module}: {new.strip()} {by}", flush=True)
        share = sum(row["caught"] for row in rows) / len(rows)
        args.out.write_text(json.dumps(dict(command="python tests/mutants.py", planted=len(rows), share_caught=share, rows=rows), indent=1) + "\n")
    print(f"{share:.0%} of {len(rows)} caught in {perf_counter() - start:.0f} s; written to {args.out}")
    sys.exit(share < 0.9)


if __name__ == "__main__":
    main()
