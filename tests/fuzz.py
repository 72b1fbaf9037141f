"""Broken and hostile input, made by chance: images, folders, saved detectors, checkpoints, runs, weights of others.

    python tests/fuzz.py --cases 10000 --seed 0      # the long mode: writes docs/fuzz.json

Every case must end in success or in an error of the `anogan.errors` family that names the file, on one line, within ten seconds; and nothing in a
file may run. A canary tells: the hostile pickles write a file of that name, and it must never appear.
"""
import argparse
import io
import json
import os
import pickle
import platform
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save

from anogan.data import load_dataset, load_images
from anogan.detector import Detector
from anogan.errors import AnoganError, InputError, TrainingError
from anogan.experiments import RunConfig, claim, run
from anogan.legacy import LegacyEval
from anogan.released import load_released
from anogan.trainer import Trainer

SECONDS = 10  # a case that takes longer hangs
SMALL = dict(dim=8, depths=(1, 1), ndf=8, nz=8)


class Hang(BaseException):
    "Not an `Exception`, so that no handler of the package takes it for a fault of the file."


@contextmanager
def limited(seconds=None):
    "Interrupt what takes too long."
    seconds = seconds or SECONDS
    def ring(*_): raise Hang(f"more than {seconds} s")
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Evil:
    "Unpickling it writes the canary."
    def __init__(self, canary): self.canary = str(canary)
    def __reduce__(self): return exec, (f"open({self.canary!r}, 'w').close()",)


# ---------------------------------------------------------------- bytes and JSON

def mutated(data, rng):
    "Some bytes of a file lost, flipped, doubled or replaced."
    data, kind = bytearray(data), rng.choice(["cut", "flip", "zero", "insert", "double", "head", "tail", "swap"])
    n = len(data)
    at = rng.randrange(max(1, n))
    if kind == "cut": del data[at:]
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 4, 64])):
            if n: data[rng.randrange(n)] ^= 1 << rng.randrange(8)
    if kind == "zero": data[at:at + 64] = bytes(len(data[at:at + 64]))
    if kind == "insert": data[at:at] = rng.randbytes(rng.choice([1, 8, 300]))
    if kind == "double": data += bytes(data)
    if kind == "head": data[:8] = struct.pack("<Q", rng.choice([0, 7, n, 2**31, 2**63]))
    if kind == "tail": data += rng.randbytes(9)
    if kind == "swap":
        other = rng.randrange(max(1, n))
        data[at:at + 16], data[other:other + 16] = data[other:other + 16], data[at:at + 16]
    return bytes(data)


STRANGE = (None, True, -1, 0, 1, 2, 3, 7, 31, 1e308, 10**30, 10**400, 0.5, float("nan"), float("inf"), float("-inf"), "", "x", "8",
           "os.system", "builtins.exec", "../../../etc/passwd", "\x00", "ü\ud800", [], {}, [1], [[]], {"a": 1}, [0, 0], [10**9] * 4,
           "__import__('os').system('true')", 10**9, 65_536)

ADDED = ("class", "__class__", "model", "../x", "path", "device")


def paths_in(facts, at=()):
    "Every place in nested JSON."
    yield at
    for key in facts if isinstance(facts, dict) else range(len(facts)) if isinstance(facts, list) else ():
        yield from paths_in(facts[key], (*at, key))


def mangled(facts, rng):
    "JSON with a value replaced, a key lost, renamed or added, somewhere inside."
    facts = json.loads(json.dumps(facts))
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        places = [p for p in paths_in(facts) if p]
        if not places: return facts
        *way, key = rng.choice(places)
        inner = facts
        for step in way: inner = inner[step]
        kind = rng.choice(["value", "value", "value", "lose", "add", "rename"])
        if kind == "value": inner[key] = deepcopy(rng.choice(STRANGE))
        if kind == "lose": del inner[key]
        if kind == "add" and isinstance(inner, dict): inner[rng.choice(ADDED)] = deepcopy(rng.choice(STRANGE))
        if kind == "rename" and isinstance(inner, dict): inner[str(key) + "_"] = inner.pop(key)
    return facts


def json_text(facts, rng):
    "As bytes; now and then no JSON at all."
    kind = rng.randrange(12)
    if kind == 0: return b"[" * 100_000
    if kind == 1: return rng.randbytes(50)
    if kind == 2: return b'{"format": 2, "config": ' + b"9" * 5000 + b"}"
    if kind == 3: return mutated(json.dumps(facts).encode(), rng)
    if kind == 4: return json.dumps(rng.choice(STRANGE)).encode("utf-8", "surrogatepass")
    return json.dumps(mangled(facts, rng)).encode()


# ---------------------------------------------------------------- images

def picture(rng, size=None, mode="RGB"):
    size = size or (rng.choice([1, 2, 31, 64]), rng.choice([1, 3, 40]))
    if mode not in ("L", "RGB", "RGBA"): return Image.new(mode, size, rng.choice([0, 1]))
    return Image.frombytes(mode, size, rng.randbytes(size[0] * size[1] * len(mode)))


def png_claiming(width, height):
    "A few bytes of PNG that promise a huge picture."
    def chunk(kind, body): return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def image_file(folder, rng, name="bad"):
    "Write one strange image file and name it."
    kind = rng.choice(["mutated", "mutated", "mutated", "mutated", "extension", "mode", "animated", "tiny", "huge", "bomb", "float", "sixteen", "exif",
                       "empty", "text", "pickle", "loop", "dangling", "pipe", "device", "folder", "bytes_name", "spaced_name", "long_name", "thin", "svg",
                       "long_text"])
    path = folder / f"{name}.png"
    if kind == "mutated":
        fmt = rng.choice(["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF"])
        picture(rng).save(data := io.BytesIO(), fmt)
        path = path.with_suffix("." + {"JPEG": "jpg", "GIF": "png"}.get(fmt, fmt.lower()))
        path.write_bytes(mutated(data.getvalue(), rng))
    if kind == "extension": picture(rng).save(path, rng.choice(["JPEG", "GIF", "PDF", "ICO", "TGA", "DDS"]))
    if kind == "mode": picture(rng, mode=rng.choice(["CMYK", "YCbCr", "LAB"])).save(path := path.with_suffix(".tif"))
    if kind == "animated": picture(rng, (8, 8)).save(path := path.with_suffix(".webp"), save_all=True, append_images=[picture(rng, (8, 8)) for _ in range(3)])
    if kind == "tiny": picture(rng, (1, 1), rng.choice(["1", "L", "RGB", "RGBA"])).save(path)
    if kind == "huge": path.write_bytes(png_claiming(rng.choice([30_000, 65_535, 2**31 - 1]), rng.choice([30_000, 2**31 - 1])))
    if kind == "bomb": path.write_bytes(png_claiming(20_000, 20_000))
    if kind == "float":
        values = np.full((4, 5), rng.choice([0.5, np.nan, np.inf, -1.0, 300.0]), np.float32)
        Image.fromarray(values).save(path := path.with_suffix(".tif"))
    if kind == "sixteen": Image.fromarray(np.full((4, 5), rng.choice([0, 65_535]), np.uint16)).save(path)
    if kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = rng.choice([0, 1, 6, 9, 255])
        picture(rng).save(path, exif=exif.tobytes() if rng.random() < 0.7 else mutated(exif.tobytes(), rng))
    if kind == "empty": path.touch()
    if kind == "text": path.write_text("hello")
    if kind == "pickle": path.write_bytes(pickle.dumps(Evil(folder.parent / "canary")))
    if kind == "loop": path.symlink_to(path)
    if kind == "dangling": path.symlink_to(folder / "nowhere")
    if kind == "pipe": os.mkfifo(path)
    if kind == "device": path.symlink_to("/dev/zero")
    if kind == "folder": path.mkdir()
    if kind == "bytes_name": path = Path(os.fsdecode(os.fsencode(folder) + b"/b\xff\xfe.png"))
    if kind == "spaced_name": path = folder / "two lines.png"
    if kind == "long_name": path = folder / ("n" * 240 + ".png")
    if kind in ("bytes_name", "spaced_name", "long_name"): picture(rng, (9, 9)).save(path, "PNG") if rng.random() < 0.5 else path.write_bytes(b"no")
    if kind == "thin": picture(rng, (5000, 1)).save(path)
    if kind == "svg": path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    if kind == "long_text":
        text = zlib.compress(bytes(2**22))
        picture(rng, (4, 4)).save(data := io.BytesIO(), "PNG")
        body = b"zTXt" + b"a\0\0" + text
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        path.write_bytes(data.getvalue()[:33] + chunk + data.getvalue()[33:])
    return kind, path


class Lab:
    "What the cases start from: a fitted detector, a run cut short, each saved once."
    def __init__(self, root):
        self.root = Path(root)
        self.canary = self.root / "canary"
        images = torch.rand(24, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.detector = Detector("gannext", channels=1, epochs=1, batch_size=8, device="cpu", progress=False, **SMALL).fit(images[:16], images[16:])
        self.detector.save(self.root / "model")
        self.facts = json.loads((self.root / "model/detector.json").read_text())
        self.weights = (self.root / "model/model.safetensors").read_bytes()
        self.images = images
        self.trainer().fit(images[:16])
        self.checkpoint = (self.root / "train/checkpoint.safetensors").read_bytes()
        self.config = RunConfig(n_train=16, device="cpu")

    def trainer(self, folder=None):
        fresh = Detector("gannext", channels=1, device="cpu", **SMALL)
        return Trainer(fresh.generator, fresh.discriminator, fresh.recipe, epochs=1 if folder is None else 2, batch_size=8, device="cpu", progress=False,
                       folder=folder or self.root / "train")


# ---------------------------------------------------------------- cases: (lab, folder, rng) -> (kind, what may be named, what to do)

def image_case(lab, folder, rng):
    kind, path = image_file(folder, rng)
    return f"image {kind}", path, lambda: load_images([path], rng.choice([8, 32]), rng.choice([None, 1, 3])).stack()


def folder_case(lab, folder, rng):
    kind = rng.choice(["empty", "one", "nested", "mixed", "loop", "plain", "layout", "missing", "file", "no_room"])
    place = folder / "images"
    if kind == "missing": return "folder missing", place, lambda: load_images(place)
    if kind == "file":
        place.write_text("no folder")
        return "folder file", place, lambda: load_dataset("folder", root=place, isize=8)
    place.mkdir()
    if kind == "one": picture(rng).save(place / "a.png")
    if kind in ("nested", "loop"):
        deep = place.joinpath(*["d"] * 30)
        deep.mkdir(parents=True)
        picture(rng).save(deep / "a.png")
        if kind == "loop": (deep / "again").symlink_to(place)
    if kind in ("mixed", "plain", "no_room"):
        for i in range(12): picture(rng, (9, 9)).save(place / f"{i}.png")
    if kind in ("mixed", "plain"): image_file(place, rng)
    if kind == "layout":
        for part in rng.sample(["train/0.normal", "test/0.normal", "test/1.abnormal", "train/1.abnormal", "other"], rng.randrange(1, 5)):
            (place / part).mkdir(parents=True)
            for i in range(rng.randrange(3)): picture(rng).save(place / part / f"{i}.png")
    if kind in ("layout", "plain", "one", "empty") and rng.random() < 0.7:
        return f"folder {kind}", place, lambda: load_dataset("folder", root=place, isize=8, val_fraction=rng.choice([0.1, 0.0])).manifest()
    return f"folder {kind}", place, lambda: load_images(place, 8).sha256()


def dataset_case(lab, folder, rng):
    "Files of known data sets, damaged or hostile; the pickles among them must not run."
    kind = rng.choice(["elpv", "elpv_outside", "mnist_legacy", "cifar", "mvtec", "fashion", "stl10"])
    evil = pickle.dumps(Evil(lab.canary))
    if kind.startswith("elpv"):
        (folder / "images").mkdir()
        picture(rng, (9, 9), "L").save(folder / "images/a.png")
        name = rng.choice(["../../secret.png", "/etc/hostname", "images/../../a.png"]) if kind == "elpv_outside" else "images/a.png"
        table = f"{name}  {rng.choice(['0.0', '1.0', 'nan', '0.3', 'x'])}  {rng.choice(['mono', 'poly', 'glass'])}\n" * 3 + "images/a.png 0.0 mono\n"
        (folder / "labels.csv").write_bytes(mutated(table.encode(), rng) if kind == "elpv" else table.encode())
        return f"data {kind}", folder, lambda: load_dataset("elpv", root=folder, isize=8)
    if kind == "mnist_legacy":
        for name in ("raw", "processed"): (folder / "MNIST" / name).mkdir(parents=True)
        for name in ("training.pt", "test.pt"): (folder / "MNIST/processed" / name).write_bytes(evil)
    if kind == "cifar":
        (folder / "cifar-10-batches-py").mkdir()
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"): (folder / "cifar-10-batches-py" / name).write_bytes(evil)
    if kind == "mvtec":
        (folder / "train/good").mkdir(parents=True)
        (folder / "test/crack").mkdir(parents=True)
        for part in ("train/good", "test/crack"): image_file(folder / part, rng)
        if rng.random() < 0.5: (folder / "ground_truth/crack").mkdir(parents=True)
        if (folder / "ground_truth/crack").is_dir(): image_file(folder / "ground_truth/crack", rng)
    if kind == "fashion": (folder / "FashionMNIST/raw").mkdir(parents=True)
    if kind == "stl10":
        (folder / "stl10_binary").mkdir()
        (folder / "stl10_binary/train_X.bin").write_bytes(rng.randbytes(99))
    name = dict(mnist_legacy="mnist", cifar="cifar10", fashion="fashion_mnist").get(kind, kind)
    return f"data {kind}", folder, lambda: load_dataset(name, None if name == "mvtec" else 0, root=folder, isize=8)


def use(detector, lab):
    "Whatever could be loaded must give numbers, or say that it cannot."
    try: results = [ask(lab.images[:2]) for ask in (detector.score, detector.heatmap, detector.predict)]
    except InputError as e:  # it has no file any more that could be named
        assert str(e).startswith("this detector gives values that are not finite"), e
    else: assert all(result.isfinite().all() for result in results), "a detector that was accepted gives values that are not finite"


def tensors_mangled(tensors, rng):
    "Swapped, lost, added, reshaped, retyped, poisoned."
    tensors, kind = dict(tensors), rng.choice(["swap", "lose", "add", "shape", "type", "nan", "empty", "rename"])
    a, b = rng.sample(sorted(tensors), 2)
    if kind == "swap": tensors[a], tensors[b] = tensors[b], tensors[a]
    if kind == "lose": del tensors[a]
    if kind == "add": tensors[rng.choice(["memory/x", "generator/../x", "x", "memory/near_patch", "opt_g/x/step", "opt_g/99999/step"])] = torch.zeros(2, 2)
    if kind == "shape": tensors[a] = torch.zeros(*tensors[a].shape, 1)
    if kind == "type": tensors[a] = tensors[a].to(rng.choice([torch.float64, torch.int8, torch.bool, torch.bfloat16, torch.complex64]))
    if kind == "nan": tensors[a] = torch.full_like(tensors[a].float(), float("nan")).to(tensors[a].dtype)
    if kind == "empty": tensors[a] = torch.zeros(0)
    if kind == "rename": tensors[a + "_"] = tensors.pop(a)
    return kind, tensors


def detector_case(lab, folder, rng):
    kind = rng.choice(["json", "json", "json", "bytes", "tensors", "tensors", "pickle", "folder", "other", "link"])
    facts, weights = lab.facts, lab.weights
    if kind == "bytes": weights = mutated(weights, rng)
    if kind == "tensors":
        what, tensors = tensors_mangled(load(weights), rng)
        kind, weights = f"tensors {what}", save(tensors)
    if kind == "pickle": weights = pickle.dumps(Evil(lab.canary))
    if kind != "bytes" or rng.random() < 0.7: facts = facts | dict(sha256=sha256(weights).hexdigest())  # the fingerprint fits: who alters one can alter both
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "detector.json").write_bytes(json_text(facts, rng) if kind == "json" else json.dumps(facts).encode())
    if kind == "other": (folder / "detector.json").write_bytes(pickle.dumps(Evil(lab.canary)))
    if kind == "folder": (folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()
    if kind == "link": (folder / "detector.json").unlink(), (folder / "detector.json").symlink_to("detector.json")
    place = folder / "detector.json" if kind == "link" and rng.random() < 0.5 else folder
    return f"detector {kind}", folder, lambda: use(Detector.load(place, "cpu"), lab)


def go_on(trainer, images):
    "Whatever could be resumed must train, or say that it cannot."
    try: trainer.fit(images)
    except TrainingError as e: assert str(e).startswith("training diverged in epoch"), e


def checkpoint_case(lab, folder, rng):
    kind, data = rng.choice(["bytes", "bytes", "tensors", "tensors", "facts", "pickle", "legacy"]), lab.checkpoint
    n = struct.unpack("<Q", data[:8])[0]
    facts = json.loads(json.loads(data[8:8 + n])["__metadata__"]["facts"])
    if kind == "bytes": data = mutated(data[:8 + n + 64] if rng.random() < 0.5 else data, rng)
    if kind == "tensors":
        what, tensors = tensors_mangled(load(data), rng)
        kind, data = f"tensors {what}", save(tensors, metadata={"facts": json.dumps(facts)})
    if kind == "facts": data = save(load(data), metadata={"facts": json_text(facts, rng).decode("utf-8", "replace")})
    if kind == "pickle": data = pickle.dumps(Evil(lab.canary))
    path = folder / "checkpoint.safetensors"
    path.write_bytes(data)
    if kind == "legacy":
        (folder / "legacy.json").write_bytes(json_text({"1": 0.5}, rng))
        test = [(lab.images[i], i) for i in range(2)]
        return "checkpoint legacy", folder, lambda: LegacyEval(lab.detector, test, folder / "legacy.json").resume(folder / "none")
    return f"checkpoint {kind}", folder, lambda: go_on(lab.trainer(folder), lab.images[:16])


def run_case(lab, folder, rng):
    kind = rng.choice(["config", "metrics", "file", "folder"])
    if kind == "config":
        (folder / "config.json").write_bytes(json_text(asdict(lab.config), rng))
        return "run config", folder, lambda: claim(folder, lab.config)
    if kind == "metrics":
        (folder / "config.json").write_text(json.dumps(asdict(lab.config)))
        (folder / "metrics.json").write_bytes(rng.choice([b"[" * 99_999, b"{", b"null", b"[]", b"\xff", b'{"auroc": 1}']))
        return "run metrics", folder, lambda: run(lab.config, folder, progress=False)
    (folder / "x").write_text("no folder") if kind == "file" else (folder / "x").mkdir()
    if kind == "folder": (folder / "x/config.json").mkdir()
    out = folder / "x" / "deeper" if kind == "file" and rng.random() < 0.5 else folder / "x"
    return f"run {kind}", folder, lambda: claim(out, lab.config) or out.is_dir() or lab.detector.save(out)


def weights_case(lab, folder, rng):
    kind = rng.choice(["pickle", "text", "safetensors", "suffix", "missing", "numbers"])
    path = folder / {"safetensors": "w.safetensors", "suffix": "w.pkl"}.get(kind, "w.pth")
    if kind in ("pickle", "suffix"): path.write_bytes(pickle.dumps(Evil(lab.canary)))
    if kind == "text": path.write_bytes(rng.randbytes(64))
    if kind == "safetensors":
        sizes = json_text(dict(isize=32, dim=8, ndf=8), rng).decode("utf-8", "replace")
        path.write_bytes(rng.choice([mutated(lab.weights, rng), save(load(lab.weights), metadata={"config": sizes})]))
    if kind == "numbers": torch.save(rng.choice([[1, 2], {"a": 1}, {1: torch.zeros(1)}, {"netg.x": torch.zeros(1)}]), path)
    model, sizes = rng.choice(["gannext", "anotrans", "skipganomaly"]), rng.choice([{}, dict(dim=8, ndf=8, nz=8, ngf=4)])
    return f"weights {kind}", path, lambda: load_released(path, model, **sizes)


CASES = [(image_case, 4), (folder_case, 2), (dataset_case, 2), (detector_case, 4), (checkpoint_case, 2), (run_case, 1), (weights_case, 1)]


def outcome(kind, path, act):
    "(how it ended, what is wrong about that or nothing, the sentence)."
    start = perf_counter()
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            act()
        return "success", "", ""
    except AnoganError as e:
        text = str(e)
        named = path.name in text or str(path.parent) in text
        faults = ["more than one line"] * ("\n" in text or len(text) > 1500) + ["does not name the file"] * (not named)
        return type(e).__name__, "; ".join(faults), text
    except Hang as e: return "hang", str(e), ""
    except BaseException as e:  # whatever else: that is the fault
        if isinstance(e, KeyboardInterrupt): raise
        return type(e).__name__, f"{type(e).__name__} after {perf_counter() - start:.1f} s: {''.join(traceback.format_exception(e))[-1500:]}", ""


def fuzz(cases, seed, root, first=0):
    "Yield (number, kind, how it ended, fault) of each case; a case is decided by its number and the seed."
    lab = Lab(root)
    makers, weights = zip(*CASES)
    for number in range(first, first + cases):
        rng = random.Random(f"{seed}-{number}")
        folder = lab.root / "case"
        folder.mkdir()
        kind, path, act = rng.choices(makers, weights)[0](lab, folder, rng)
        ended, fault, _ = outcome(kind, path, act)
        if lab.canary.exists():
            lab.canary.unlink()
            fault = "code was executed"
        shutil.rmtree(folder)
        yield number, kind, ended, fault


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to repeat one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs/fuzz.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ends, kinds, faults = Counter(), Counter(), []
    with tempfile.TemporaryDirectory() as root:
        for number, kind, ended, fault in fuzz(args.cases, args.seed, root, args.first):
            ends[ended] += 1
            kinds[kind] += 1
            if fault:
                faults.append(dict(case=number, kind=kind, ended=ended, fault=fault.replace(root, "ROOT")))
                print(f"case {number} ({kind}): {fault}", file=sys.stderr, flush=True)
    found = dict(command=f"python tests/fuzz.py --cases {args.cases} --seed {args.seed}", cases=args.cases, faulty=len(faults), ends=dict(ends.most_common()),
                 kinds=dict(sorted(kinds.items())), python=platform.python_version(), torch=torch.__version__, pillow=Image.__version__, faults=faults[:50])
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{args.cases} cases: {dict(ends.most_common())}; {len(faults)} faults; written to {args.out}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
