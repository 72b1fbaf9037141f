"""What does each ingredient of a recipe do? One row per data set, class, generator, variant and seed; a run that is cut off goes on.

    python benchmarks/recipe.py results/digits.json --dataset digits --classes 0 1 2 3 4 5 6 7 8 9 --seeds 3
    python benchmarks/recipe.py results/digits.json --table

Development classes, on which the recipe was chosen, are digits 0, 1 and 8, Fashion-MNIST 0, 4 and 8, and every second test image of ELPV.
"""
import argparse
import json
import platform
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch

from anogan.baselines import BASELINES
from anogan.contrast import Projection, view_loss
from anogan.data import load_dataset
from anogan.detector import Detector
from anogan.evaluation import auroc, delong_test, evaluate_scores, peeking_gap
from anogan.memory import Memory
from anogan.scoring import score_terms
from anogan.trainer import has_bf16, write_atomically

VARIANTS = {  # name -> options of the detector; a string names a way of training that is no option
    "recommended": {}, "no second task": dict(contrast=False), "no noise": dict(noise=0.0), "no adversarial loss for G": dict(w_adv=0.0, w_lat=0.0),
    "second task alone": "views", "untrained": "untrained"}
TERMS = ("near_image", "near_map", "near_patch", "rec", "lat")


def train_on_views(detector, data):
    "The discriminator's second task and nothing else: what the features are worth without a GAN."
    torch.manual_seed(detector.seed)
    discriminator = detector.build().discriminator.train()
    projection = Projection(discriminator.to_feature.out_channels)
    optimizer = torch.optim.Adam([*discriminator.parameters(), *projection.parameters()], lr=detector.recipe.lr, betas=detector.recipe.betas)
    x = data.train.stack()
    for _ in range(detector.epochs):
        for batch in torch.randperm(len(x)).split(detector.batch_size):
            if len(batch) < detector.batch_size: continue
            loss = view_loss(discriminator, projection, x[batch], detector.recipe.crop)
            with torch.no_grad(): discriminator(x[batch])  # BatchNorm's averages see whole images, too, as beside a GAN
            optimizer.zero_grad(), loss.backward(), optimizer.step()
    discriminator.eval()


def thinned(images, n):
    "Every k-th image, about n of them."
    return images.subset(range(0, len(images), max(1, len(images) // n)))


def term_aurocs(detector, data):
    "AUROC of every term by itself, whatever the score is made of; from some 2,000 remembered and some 2,000 test images, to save time."
    test = thinned(data.test, 2000)
    memory = Memory.fit(detector.discriminator, (x for x, _ in thinned(data.train, 2000).batches(256)))
    batches = [score_terms(detector.generator, detector.discriminator, x, memory) for x, _ in test.batches(256)]
    return {term: auroc(torch.cat([b[term] for b in batches]), test.labels) for term in TERMS}


def baselines(data):
    "Scores of the baselines on the test images."
    return {name: BASELINES[name]().fit(data.train, data.val).score(data.test) for name in ("knn", "pca")}


def watch_test(detector, data, seen):
    "A callback that looks at the test images after every epoch, as one must not: for the peeking gap alone; it changes nothing in training."
    def look(row):
        networks = detector.generator, detector.discriminator
        for network in networks: network.eval()
        seen.append(auroc(detector.remember(data.train, data.val).calibrate(data.val).score(data.test), data.test.labels))
        for network in networks: network.train()
    return look


def cell(args, key, data, rivals):
    "One training run, measured."
    options, labels, peeked = VARIANTS[key["variant"]], data.test.labels, []
    detector = Detector(key["model"], size=args.size, isize=args.isize, epochs=args.epochs, batch_size=args.batch_size, seed=key["seed"],
                        recipe=args.recipe, device=args.device, channels=data.channels, progress=False, **(options if isinstance(options, dict) else {}))
    if options == "views": train_on_views(detector, data)
    if isinstance(options, dict): detector.fit(data.train, data.val, on_epoch=watch_test(detector, data, peeked) if args.peek else None)
    else: detector.remember(data.train, data.val).calibrate(data.val)
    scores, best = detector.score(data.test), max(rivals, key=lambda name: auroc(rivals[name], labels))
    return key | dict(evaluate_scores(scores, labels, detector.threshold), score=detector.weights, terms=term_aurocs(detector, data),
                      baselines={name: auroc(values, labels) for name, values in rivals.items()},
                      versus=dict(name=best, **asdict(delong_test(scores, rivals[best], labels))),
                      n_train=len(data.train), peeking_gap=peeking_gap(peeked) if peeked else None,
                      con=detector.history[-1]["con"] if detector.history else None,
                      seconds=sum(row["seconds"] for row in detector.history))


def spread(values):
    "Mean ± standard deviation."
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def table(rows):
    "Markdown: over classes and seeds, a line per variant and generator."
    lines = ["| generator | variant | runs | score | " + " | ".join(TERMS) + " | kNN on pixels | PCA |", "|" + "---|" * (6 + len(TERMS))]
    for model, variant in dict.fromkeys((r["model"], r["variant"]) for r in rows):
        group = [r for r in rows if (r["model"], r["variant"]) == (model, variant)]
        columns = [[r["auroc"] for r in group], *([r["terms"][term] for r in group] for term in TERMS)]
        columns += [[r["baselines"][name] for r in group] for name in ("knn", "pca")]
        lines.append(f"| {model} | {variant} | {len(group)} | {' | '.join(map(spread, columns))} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--classes", nargs="+", default=[None], help="abnormal classes; none where the data set says itself what is abnormal")
    parser.add_argument("--category", help="of elpv or mvtec")
    parser.add_argument("--models", nargs="+", default=["anotrans", "gannext"])
    parser.add_argument("--variants", nargs="+", default=["recommended"], choices=VARIANTS)
    parser.add_argument("--recipe", default="recommended")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--isize", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--n-train", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peek", action="store_true", help="test after every epoch, too, and note how much choosing the best epoch would add")
    parser.add_argument("--table", action="store_true", help="print what is there as Markdown and stop")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    if args.table: return print(table(rows))
    setting = {name: getattr(args, name) for name in ("dataset", "category", "recipe", "size", "isize", "epochs", "batch_size", "n_train")}
    done = {tuple(r[name] for name in ("model", "variant", "abnormal_class", "seed", *setting)) for r in rows}
    for seed, c in product(range(args.seeds), args.classes):
        wanted = [setting | dict(model=model, variant=variant, abnormal_class=c, seed=seed) for variant in args.variants for model in args.models]
        wanted = [key for key in wanted if tuple(key[name] for name in ("model", "variant", "abnormal_class", "seed", *setting)) not in done]
        if not wanted: continue
        data = load_dataset(args.dataset, c, isize=args.isize, seed=seed, category=args.category, n_train=args.n_train)
        rivals = baselines(data)
        for key in wanted:
            rows.append(cell(args, key, data, rivals))
            print({name: rows[-1][name] for name in ("model", "variant", "abnormal_class", "seed", "auroc", "score", "baselines")}, flush=True)
            facts = dict(torch=torch.__version__, python=platform.python_version(), machine=platform.machine(),
                         precision="bf16" if has_bf16(args.device) else "fp32", rows=rows)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.out, json.dumps(facts, indent=1).encode())


if __name__ == "__main__":
    main()
