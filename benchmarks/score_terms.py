"""Which terms of the score find anomalies? AUROC of each, alone and joined, trained and untrained.

Development classes only (digits 0, 1 and 8), so that the other classes stay unseen until a recipe is chosen:

    python benchmarks/score_terms.py results/score_terms.json --seeds 3
"""
import argparse
import json
import platform
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch

from anogan.baselines import BASELINES
from anogan.data import load_dataset
from anogan.detector import Detector
from anogan.evaluation import auroc
from anogan.scoring import Calibration, join_terms

JOINED = {"rec + lat, as published": dict(rec=0.9, lat=0.1), "near + near_fake": dict(near=0.5, near_fake=0.5),
          "4 near + near_fake": dict(near=0.8, near_fake=0.2), "4 near + rec": dict(near=0.8, rec=0.2)}
VARIANTS = {"recommended": {}, "untrained": {}, "latent weight 0.01": dict(w_lat=0.01)}


def measure(detector, data):
    "AUROC of every term and of every sum of terms, for one fitted detector."
    labels, terms = data.test.labels, detector.terms(data.test)
    scaled = Calibration.fit(detector.terms(data.val))(terms)
    single = {name: auroc(values, labels) for name, values in terms.items()}
    return single | {name: auroc(join_terms(scaled, weights), labels) for name, weights in JOINED.items()}


def cell(model, variant, abnormal_class, seed, epochs):
    "One training run of one variant; the untrained one keeps the networks as they were drawn."
    data = load_dataset("digits", abnormal_class, seed=seed)
    detector = Detector(model, epochs=epochs, batch_size=32, seed=seed, device="cpu", progress=False, channels=1, **VARIANTS[variant])
    if variant == "untrained": detector.remember(data.train)
    else: detector.fit(data.train, data.val)
    knn = auroc(BASELINES["knn"]().fit(data.train, data.val).score(data.test), data.test.labels)
    return dict(model=model, variant=variant, abnormal_class=abnormal_class, seed=seed, knn=knn, auroc=measure(detector, data),
                con=detector.history[-1]["con"] if detector.history else None)


def table(rows):
    "Markdown: mean ± standard deviation over classes and seeds, a line per model and variant."
    lines = ["| generator | variant | runs | near | near_fake | rec | lat | kNN on pixels |", "|---|---|---|---|---|---|---|---|"]
    for model, variant in dict.fromkeys((r["model"], r["variant"]) for r in rows):
        group = [r for r in rows if (r["model"], r["variant"]) == (model, variant)]
        columns = [[r["auroc"][term] for r in group] for term in ("near", "near_fake", "rec", "lat")] + [[r["knn"] for r in group]]
        cells = [f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}" for values in columns]
        lines.append(f"| {model} | {variant} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["anotrans", "gannext"])
    parser.add_argument("--classes", nargs="+", type=int, default=[0, 1, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--table", action="store_true", help="print what is there as Markdown and stop")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    if args.table: return print(table(rows))
    done = {(r["model"], r["variant"], r["abnormal_class"], r["seed"]) for r in rows}
    for variant, seed, model, c in product(VARIANTS, range(args.seeds), args.models, args.classes):
        if (model, variant, c, seed) in done: continue
        rows.append(cell(model, variant, c, seed, args.epochs))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        facts = dict(command=f"python benchmarks/score_terms.py {args.out} --seeds {args.seeds} --epochs {args.epochs}",
                     torch=torch.__version__, python=platform.python_version(), machine=platform.machine(), rows=rows)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
