"""How far would a distance get if the features were learned with labels? A yardstick for the recipe, which has none.

    python benchmarks/labels.py results/fashion_mnist-labels.json             # ten classes, one core: a quarter of an hour
    python benchmarks/labels.py results/fashion_mnist-labels.json --table

The discriminator's network learns to tell the nine normal kinds apart, by their names. Then its features are used as the recipe uses its own: new
images are scored by the distance to the nearest of the remembered normal ones. No detector may do this; the names of the kinds are not its to see.
"""
import argparse
import json
import platform
import shlex
import sys
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F

from anogan.baselines import BASELINES
from anogan.data import FASHION, load_dataset
from anogan.detector import MEMORY_SIZE
from anogan.discriminator import Discriminator, init_weights
from anogan.evaluation import auroc
from anogan.memory import NEIGHBOURS, nearest
from anogan.trainer import write_atomically


def kinds_of_images(seed):
    "id of an image -> its kind: every image is in the test set of the split in which its kind is abnormal."
    found = {}
    for kind in range(len(FASHION)):
        test = load_dataset("fashion_mnist", kind, seed=seed).test
        found |= {i: kind for i, abnormal in zip(test.ids, test.labels.tolist()) if abnormal}
    return found


def train(images, kinds, seed, epochs, batch_size):
    "The tiny discriminator, trained as a classifier."
    torch.manual_seed(seed)
    network = init_weights(Discriminator(32, 1, **Discriminator.sizes["tiny"]))
    head = torch.nn.Linear(network.to_feature.out_channels, len(FASHION))
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=1e-3, betas=(0.5, 0.999))
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(batch_size):
            if len(batch) < batch_size: continue
            loss = F.cross_entropy(head(network(images[batch])[1]), kinds[batch])
            optimizer.zero_grad(), loss.backward(), optimizer.step()
    return network.eval(), head


@torch.no_grad()
def features(network, images):
    return torch.cat([network(x)[1] for x, _ in images.batches(500)])


def row(kind, kind_of, seed, epochs, batch_size):
    "One kind left out: AUROC of distances in the features, as they are and as directions."
    data = load_dataset("fashion_mnist", kind, seed=seed)
    kinds = torch.tensor([kind_of[i] for i in data.train.ids])
    network, head = train(data.train.stack(), kinds, seed, epochs, batch_size)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:MEMORY_SIZE]
    known, val, new = features(network, data.train.subset(order)), features(network, data.val), features(network, data.test)
    with torch.no_grad(): right = (head(val).argmax(dim=1) == torch.tensor([kind_of[i] for i in data.val.ids])).float().mean()
    def near(*vectors): return auroc(nearest(*vectors, NEIGHBOURS["near_image"]), data.test.labels)
    return dict(abnormal_class=str(kind), seed=seed, epochs=epochs, batch_size=batch_size, trained_on=len(data.train), right_on_validation=float(right),
                distance=near(new, known), direction=near(F.normalize(new, dim=1), F.normalize(known, dim=1)),
                knn=auroc(BASELINES["knn"]().fit(data.train, data.val).score(data.test), data.test.labels))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--table", action="store_true", help="print what is there as Markdown and stop")
    args = parser.parse_args()
    if args.table: rows = json.loads(args.out.read_text())["rows"]
    else:
        kind_of, rows = kinds_of_images(args.seed), []
        for kind in range(len(FASHION)):
            rows.append(row(kind, kind_of, args.seed, args.epochs, args.batch_size))
            print(rows[-1], flush=True)
            facts = dict(command=shlex.join(["python", *sys.argv]), torch=torch.__version__, python=platform.python_version(),
                         machine=platform.machine(), rows=rows)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.out, json.dumps(facts, indent=1).encode())
    names = ("right_on_validation", "distance", "direction", "knn")
    lines = [["abnormal", *names], ["---"] * 5, *([FASHION[int(r["abnormal_class"])], *(f"{r[name]:.3f}" for name in names)] for r in rows)]
    lines.append(["mean", *(f"{mean(r[name] for r in rows):.3f}" for name in names)])
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()
