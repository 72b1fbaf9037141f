"""What does each ingredient of a recipe do? One row per data set, class, generator, variant and seed; a run that is cut off goes on.

    python benchmarks/recipe.py results/ablation-digits.json --classes 1 8 --epochs 5 --variants "nothing" "second task"
    python benchmarks/recipe.py results/ablation-digits.json --table

Development classes, on which the recipe was chosen, are digits 0, 1 and 8, Fashion-MNIST 0, 4 and 8, and every second test image of ELPV.
"""
import argparse
import json
import platform
import shlex
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

from anogan.ablation import VARIANTS, ablation_table, term_aurocs, train_variant
from anogan.baselines import BASELINES
from anogan.data import load_dataset
from anogan.evaluation import auroc, delong_test, evaluate_scores, peeking_gap
from anogan.trainer import TERMS, has_bf16, write_atomically


def baselines(data):
    "Scores of the baselines on the test images."
    return {name: BASELINES[name]().fit(data.train, data.val).score(data.test) for name in ("knn", "pca")}


def watch_test(data, seen):
    "Look at the test images after every epoch, as one must not: for the peeking gap alone; it changes nothing in training."
    def look(detector, row):
        networks = detector.generator, detector.discriminator
        for network in networks: network.eval()
        seen.append(auroc(detector.remember(data.train).calibrate(data.val).score(data.test), data.test.labels))
        for network in networks: network.train()
    return look


def cell(args, key, data, rivals):
    "One training run, measured."
    labels, peeked = data.test.labels, []
    detector = train_variant(key["variant"], data, watch_test(data, peeked) if args.peek else None, model=key["model"], size=args.size, isize=args.isize,
                             epochs=args.epochs, batch_size=args.batch_size, seed=key["seed"], recipe=args.recipe, device=args.device, **args.options)
    scores, best = detector.score(data.test), max(rivals, key=lambda name: auroc(rivals[name], labels))
    return key | dict(evaluate_scores(scores, labels, detector.threshold), score=detector.weights, terms=term_aurocs(detector, data),
                      baselines={name: auroc(values, labels) for name, values in rivals.items()},
                      versus=dict(name=best, **asdict(delong_test(scores, rivals[best], labels))),
                      trained_on=len(data.train), peeking_gap=peeking_gap(peeked) if peeked else None,
                      con=detector.history[-1]["con"] if detector.history else None,
                      seconds=sum(row["seconds"] for row in detector.history))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--classes", nargs="+", default=[None], help="abnormal classes; none where the data set says itself what is abnormal")
    parser.add_argument("--category", help="of elpv or mvtec")
    parser.add_argument("--models", nargs="+", default=["anotrans", "gannext"])
    parser.add_argument("--variants", nargs="+", default=["nothing"], choices=VARIANTS, help="what to leave out of the recipe")
    parser.add_argument("--recipe", default="recommended")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: options of the detector over those of the recipe")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--isize", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--n-train", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peek", action="store_true", help="test after every epoch, too, and note how much choosing the best epoch would add")
    parser.add_argument("--table", action="store_true", help="print what is there as Markdown and stop")
    args = parser.parse_args()
    known = json.loads(args.out.read_text()) if args.out.exists() else dict(rows=[])
    rows, commands = known["rows"], list(dict.fromkeys([*known.get("commands", ()), shlex.join(["python", *sys.argv])]))
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    devices = list(dict.fromkeys([*known.get("devices", ()), device]))
    if args.table: return print(ablation_table(rows, ("score", *(term for term in TERMS if all(term in r["terms"] for r in rows)))))
    setting = {name: getattr(args, name) for name in ("dataset", "category", "recipe", "size", "isize", "epochs", "batch_size", "n_train")}
    named = ("model", "variant", "abnormal_class", "seed", "options", *setting)
    if args.options: setting["options"] = args.options
    def name_of(row): return json.dumps([row.get(name) for name in named])
    done = {name_of(r) for r in rows}
    for seed, c in product(range(args.first_seed, args.first_seed + args.seeds), args.classes):
        wanted = [setting | dict(model=model, variant=variant, abnormal_class=c, seed=seed) for variant in args.variants for model in args.models]
        wanted = [key for key in wanted if name_of(key) not in done]
        if not wanted: continue
        data = load_dataset(args.dataset, c, isize=args.isize, seed=seed, category=args.category, n_train=args.n_train)
        rivals = baselines(data)
        for key in wanted:
            rows.append(cell(args, key, data, rivals))
            print({name: rows[-1][name] for name in ("model", "variant", "abnormal_class", "seed", "auroc", "score", "baselines")}, flush=True)
            facts = dict(torch=torch.__version__, python=platform.python_version(), machine=platform.machine(), devices=devices,
                         precision="bf16" if has_bf16(args.device) else "fp32", commands=commands, rows=rows)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.out, json.dumps(facts, indent=1).encode())


if __name__ == "__main__":
    main()
