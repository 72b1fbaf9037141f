"""Which terms of the score find anomalies? AUROC of each, alone and joined, trained and untrained, with and without noise.

Development classes only (digits 0, 1 and 8), so that the other classes stay unseen until a recipe is chosen:

    python benchmarks/score_terms.py results/score_terms.json --seeds 3
"""
import argparse
import json
import platform
from itertools import product
from pathlib import Path

import torch

from anogan.baselines import BASELINES
from anogan.data import load_dataset
from anogan.detector import Detector
from anogan.evaluation import auroc
from anogan.scoring import Calibration, join_terms

JOINED = {"rec + lat, as published": dict(rec=0.9, lat=0.1), "near + near_fake": dict(near=0.5, near_fake=0.5),
          "near + near_fake + rec": dict(near=0.4, near_fake=0.4, rec=0.2)}


def measure(detector, data):
    "AUROC of every term and of every sum of terms, for one fitted detector."
    labels, terms = data.test.labels, detector.terms(data.test)
    scaled = Calibration.fit(detector.terms(data.val))(terms)
    single = {name: auroc(values, labels) for name, values in terms.items()}
    return single | {name: auroc(join_terms(scaled, weights), labels) for name, weights in JOINED.items()}


def cell(model, abnormal_class, seed, noise, epochs):
    "One training run; `epochs` 0 leaves the networks as they were drawn."
    data = load_dataset("digits", abnormal_class, seed=seed)
    detector = Detector(model, epochs=max(epochs, 1), batch_size=32, seed=seed, noise=noise, device="cpu", progress=False, channels=1)
    if epochs: detector.fit(data.train, data.val)
    else: detector.remember(data.train)
    row = dict(model=model, abnormal_class=abnormal_class, seed=seed, noise=noise, epochs=epochs)
    knn = auroc(BASELINES["knn"]().fit(data.train, data.val).score(data.test), data.test.labels)
    con = detector.history[-1]["con"] if epochs else None
    return row | dict(con=con, knn=knn, auroc=measure(detector, data))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["gannext", "anotrans"])
    parser.add_argument("--classes", nargs="+", type=int, default=[0, 1, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    done = {(r["model"], r["abnormal_class"], r["seed"], r["noise"], r["epochs"]) for r in rows}
    for seed, model, (noise, epochs), c in product(range(args.seeds), args.models, [(0.5, args.epochs), (0.0, args.epochs), (0.0, 0)], args.classes):
        if (model, c, seed, noise, epochs) in done: continue
        rows.append(cell(model, c, seed, noise, epochs))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        facts = dict(command=f"python benchmarks/score_terms.py {args.out} --seeds {args.seeds} --epochs {args.epochs}",
                     torch=torch.__version__, python=platform.python_version(), machine=platform.machine(), rows=rows)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
