"Data: every reader on small files in the real format, every conversion, the split's promises, every error's sentence."
import gzip
import hashlib
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import anogan.data as D
from anogan.data import (ImageSet, check_images, iterate, labels_of, list_images, load_dataset, load_images, read_files, read_image, split,
                         stratified, to_uint8)
from anogan.errors import InputError

PARTS = ("train", "val", "test")


def picture(seed=0, size=(12, 10), channels=3):
    "A random 8-bit image, (width, height) = size."
    shape = (size[1], size[0], 3) if channels == 3 else (size[1], size[0])
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8))


def save(path, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, **options).save(path)
    return path


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and ". " not in text and not text.endswith(".")
    return text


def refused(function, *args, match, **options):
    with pytest.raises(InputError) as error: function(*args, **options)
    assert match in one_sentence(error), str(error.value)


# ---------------------------------------------------------------- conversion

def test_sixteen_bit_grey_rounds_to_the_nearest_byte():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = torch.from_numpy(np.rint(values / 257).astype(np.uint8))
    assert torch.equal(to_uint8(Image.fromarray(values), 256, 1)[0], expected)
    assert torch.equal(to_uint8(Image.fromarray(values.astype(np.int32)), 256, 1)[0], expected)
    assert torch.equal(to_uint8(Image.fromarray(values), 256, 3), expected.expand(3, 256, 256))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_files(tmp_path, suffix):
    Image.fromarray(np.array([[0, 257], [32768, 65535]], np.uint16)).save(tmp_path / f"x.{suffix}")
    assert read_image(tmp_path / f"x.{suffix}", 2, 1).tolist() == [[[0, 1], [128, 255]]]


def test_float_images_only_in_zero_to_one(tmp_path):
    Image.fromarray(np.array([[0, 0.5], [0.25, 1]], np.float32)).save(tmp_path / "f.tif")
    assert read_image(tmp_path / "f.tif", 2, 1).tolist() == [[[0, 128], [64, 255]]]
    for bad in (1.5, -0.1, np.nan):
        refused(to_uint8, Image.fromarray(np.array([[0, bad]], np.float32)), 2, 1, match="not all in [0, 1]")
    for bad in (-1, 65536): refused(to_uint8, Image.fromarray(np.array([[0, bad]], np.int32)), 2, 1, match="0 to 65535")


@pytest.mark.parametrize("mode, pixel, rgb", [
    ("RGBA", (10, 20, 30, 0), (255, 255, 255)),  # wholly transparent: the white behind it
    ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
    ("RGBA", (0, 0, 0, 51), (204, 204, 204)),  # a fifth of black
    ("LA", (0, 128), (127, 127, 127)),
    ("1", 1, (255, 255, 255)),
    ("L", 77, (77, 77, 77)),
    ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ("HSV", (0, 255, 255), (255, 0, 0)),
])
def test_modes(mode, pixel, rgb):
    image = Image.new(mode, (2, 2), pixel)
    assert to_uint8(image, 2, 3)[:, 0, 0].tolist() == list(rgb)
    assert to_uint8(image, 2, 1)[0, 0, 0].item() == Image.new("RGB", (1, 1), rgb).convert("L").getpixel((0, 0))


def test_grey_is_itu_601():
    r, g, b = np.random.RandomState(0).randint(0, 256, (3, 8, 8)).astype(np.uint8)
    grey = to_uint8(Image.fromarray(np.stack([r, g, b], -1)), 8, 1)[0].numpy()
    assert np.abs(grey - (0.299 * r + 0.587 * g + 0.114 * b)).max() <= 0.51


def test_palette_and_its_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 10, 0, 0, 90])
    image.putpixel((1, 0), 1)
    assert to_uint8(image, 2, 3)[:, 0].T.tolist() == [[200, 10, 10], [0, 0, 90]]  # each row of the 2×2 result alike
    image.save(tmp_path / "p.png", transparency=1)
    assert read_image(tmp_path / "p.png", 2, 3)[:, 0].T.tolist() == [[200, 10, 10], [255, 255, 255]]


def test_exif_orientation_is_applied(tmp_path):
    upright = picture(size=(16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: to be turned by 270°
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "turned.png", 8, 3), to_uint8(upright, 8, 3))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert read_image(tmp_path / "a.webp", 4, 3)[:, 0, 0].tolist() == [255, 0, 0]


def test_resize_is_square_and_averages():
    wide = Image.fromarray(np.tile(np.uint8([0, 200]), (8, 16)))  # stripes one pixel wide
    small = to_uint8(wide, 4, 1)
    assert small.shape == (1, 4, 4) and (small.int() - 100).abs().max() < 20  # without antialiasing: 0 or 200


# ---------------------------------------------------------------- files and their faults

def faulty(folder, kind):
    path = folder / f"{kind}.png"
    good = save(folder / "source.png", size=(64, 64)).read_bytes()
    if kind == "cut": path.write_bytes(good[:3000])
    if kind == "text": path.write_text("hello")
    if kind == "empty": path.touch()
    if kind == "folder": path.mkdir()
    if kind == "float": path = path.with_suffix(".tif"); Image.new("F", (2, 2), 7.0).save(path)
    return path


@pytest.mark.parametrize("kind, words", [
    ("cut", "damaged or cut short"), ("text", "not an image that Pillow knows"), ("empty", "empty (0 bytes)"),
    ("missing", "no such file"), ("float", "floating-point pixels"),
    pytest.param("folder", "it is a folder", marks=pytest.mark.skipif(sys.platform == "win32", reason="another error there"))])
def test_faults_name_file_and_fault(tmp_path, kind, words):
    path = faulty(tmp_path, kind)
    refused(read_image, path, 8, 3, match=words)
    refused(read_image, path, 8, 3, match=str(path))


def test_unreadable_and_oversized_files(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refused(read_image, path, 8, 3, match="more pixels than Pillow's safety limit")
    def fail(error):
        def opening(*_): raise error
        monkeypatch.setattr(Image, "open", opening)
    fail(PermissionError(13, "Permission denied"))
    refused(read_image, path, 8, 3, match="you may not read it")
    fail(ValueError("conversion from LAB to RGB not supported"))  # some modes, with some versions of Pillow
    refused(read_image, path, 8, 3, match="Pillow can make nothing of it (conversion from LAB")


def test_list_images_sorted_nested_no_hidden_no_loops(tmp_path):
    for name in ("b/2.PNG", "b/10.jpg", "a.tiff", ".hidden.png", ".git/x.png", "b/readme.txt.png"): save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").touch()
    expected = ["a.tiff", "b/10.jpg", "b/2.PNG", "b/readme.txt.png"]
    try:
        (tmp_path / "in" / "b" / "loop").symlink_to(tmp_path / "in", target_is_directory=True)
        save(tmp_path / "elsewhere" / "far.png")
        (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        expected.append("link/far.png")
    except OSError: pass  # a system without symbolic links
    assert [f.relative_to(tmp_path / "in").as_posix() for f in list_images(tmp_path / "in")] == expected
    assert list_images(tmp_path / "nowhere") == []


# ---------------------------------------------------------------- ImageSet, iterate, labels_of

@pytest.fixture
def files(tmp_path):
    return [save(tmp_path / f"{i}.png", seed=i) for i in range(7)]


def test_lazy_equals_in_memory_exactly(files, monkeypatch):
    fast = load_images(files, isize=9)
    monkeypatch.setattr(D, "MEMORY_LIMIT", 7 * 3 * 9 * 9 - 1)
    lazy = load_images(files, isize=9)
    assert fast.items is None and lazy.pixels is None and "decoded when asked for" in repr(lazy)
    assert fast.ids == lazy.ids == [f.as_posix() for f in files]
    order = [5, 0, 3]
    for a, b in ((fast.stack(), lazy.stack()), (fast.subset(order).stack(), lazy.subset(order).stack()), (fast[4][0], lazy[4][0])):
        assert torch.equal(a, b)
    for (xa, ya), (xb, yb) in zip(fast.batches(2, order), lazy.batches(2, order), strict=True):
        assert torch.equal(xa, xb) and torch.equal(ya, yb)
    monkeypatch.setattr(D, "MEMORY_LIMIT", 7 * 3 * 9 * 9)
    assert load_images(files, isize=9).items is None


def test_a_bad_file_shows_at_load_or_when_reached(files, monkeypatch):
    files[5].write_text("rubbish")
    refused(load_images, files, match=f"{files[5]}: it is not an image")
    monkeypatch.setattr(D, "MEMORY_LIMIT", 0)
    lazy = load_images(files)
    batches = lazy.batches(4)
    next(batches)
    refused(next, batches, match=f"{files[5]}: it is not an image")
    refused(lazy.__getitem__, 5, match="5.png")


def test_image_set_keeps_rows_together():
    pixels = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 8, 8).contiguous()
    masks = torch.zeros(5, 8, 8, dtype=torch.bool)
    masks[3] = True
    images = ImageSet(pixels, [0, 0, 0, 1, 0], list("abcde"), masks)
    part = images.subset(torch.tensor([False, True, False, True, False]))  # a mask chooses like its positions
    assert part.ids == ["b", "d"] and part.labels.tolist() == [0, 1] and part.masks.any((1, 2)).tolist() == [False, True]
    assert [round(float((x.mean() + 1) * 127.5)) for x, _ in images] == [0, 1, 2, 3, 4] and len(images) == 5  # iteration ends
    assert images[-2][1] == 1 and images.loaded() is images
    assert images.subset([]).stack().shape == (0, 1, 8, 8) and list(images.subset([]).batches(3)) == []
    assert [len(y) for _, y in images.batches(2)] == [2, 2, 1]


def test_to_moves_bytes_and_batches(files):
    "The meta device stands in for a GPU: shapes and devices without numbers."
    fast, lazy = load_images(files).to("meta"), ImageSet(files, isize=8, channels=3).to("meta")
    assert fast.pixels.device.type == "meta" and fast.labels.device.type == "cpu"
    for images in (fast, lazy):
        x, y = next(images.batches(3, [6, 2, 1]))
        assert x.device.type == y.device.type == images.stack().device.type == images[0][0].device.type == "meta" and x.shape[0] == 3
    assert lazy.subset([1, 2]).device.type == fast.subset([1, 2]).device.type == "meta"


def test_sha256_sees_ids_labels_and_contents(files):
    pixels = load_images(files).pixels
    base = ImageSet(pixels).sha256()
    changed = pixels.clone()
    changed[3, 0, 0, 0] ^= 1
    different = [ImageSet(changed), ImageSet(pixels, labels=[1] + 6 * [0]), ImageSet(pixels, ids=list("abcdefg"))]
    assert base == ImageSet(pixels.clone()).sha256() and base not in [s.sha256() for s in different]
    lazy = ImageSet(files, isize=8, channels=3)
    before = lazy.sha256()
    files[2].write_bytes(files[2].read_bytes() + b"!")
    assert before != lazy.sha256()
    arrays = [np.zeros((8, 8), np.uint8), np.ones((8, 8), np.uint8)]
    assert ImageSet(arrays, isize=8, channels=1).sha256() != ImageSet(arrays[:1] * 2, isize=8, channels=1).sha256()


def test_image_set_refuses_what_does_not_fit():
    refused(ImageSet, torch.zeros(2, 1, 8, 8), match="uint8 tensor (N, C, s, s)")
    refused(ImageSet, torch.zeros(2, 1, 8, 9, dtype=torch.uint8), match="(2, 1, 8, 9)")
    refused(ImageSet, torch.zeros(2, 1, 8, 8, dtype=torch.uint8), labels=[0], match="2 images, 1 labels and 2 ids")
    refused(ImageSet, ["x.png"], match="needs isize and channels")


def test_iterate_takes_sets_datasets_and_tensors(files):
    images = load_images(files)
    x, y = images.stack(), images.labels
    for source in (images, TensorDataset(x, y), x, x.double(), torch.utils.data.Subset(images, range(7))):
        assert torch.equal(torch.cat(list(iterate(source, 3))), x)
        assert torch.equal(torch.cat(list(iterate(source, 2, order=[6, 1, 1]))), x[[6, 1, 1]])
    assert next(iterate(x.double(), 3)).dtype == torch.float32
    assert check_images(x * 1.0005) is not None  # rounding is forgiven


@pytest.mark.parametrize("images, words", [
    (torch.zeros(3, 8, 8), "float tensor (N, C, H, W)"), (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "torch.uint8"),
    (np.zeros((2, 1, 8, 8)), "not a ndarray"), ("x.png", "not a str"), (None, "not a NoneType"),
    (torch.full((1, 1, 8, 8), torch.nan), "not finite"), (torch.full((1, 1, 8, 8), torch.inf), "not finite"),
    (torch.full((1, 1, 8, 8), 255.0), "from 255 to 255"), (torch.full((1, 1, 8, 8), -1.01), "[-1, 1]"),
    (torch.zeros(0, 1, 8, 8), "no images"), (ImageSet(torch.zeros(0, 1, 8, 8, dtype=torch.uint8)), "no images in this data set"),
])
def test_iterate_refuses_at_once(images, words):
    refused(iterate, images, 4, match=words)  # before the first batch is asked for


def test_iterate_checks_the_images_of_foreign_datasets():
    refused(next, iterate(TensorDataset(torch.full((2, 1, 8, 8), 9.0), torch.zeros(2)), 2), match="from 9 to 9")
    refused(iterate, torch.zeros(2, 1, 8, 8), 0, match="batch_size must be at least 1, not 0")


def test_labels_of(files):
    images = load_images(files)
    assert labels_of(images) is images.labels
    assert labels_of(TensorDataset(images.stack(), torch.arange(7) % 2)).tolist() == [0, 1, 0, 1, 0, 1, 0]
    refused(labels_of, torch.zeros(2, 1, 8, 8), match="a Tensor has none")
    refused(labels_of, ImageSet(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), labels=[0, 3]), match="[0, 3] occur")


def test_load_images_channels_and_errors(tmp_path):
    grey, colour = save(tmp_path / "g" / "1.png", channels=1), save(tmp_path / "c" / "1.png")
    assert load_images(grey).channels == 1 and load_images([grey, tmp_path / "c"]).channels == 3
    assert load_images(colour, channels=1).channels == 1
    odd = grey.rename(tmp_path / "g" / "image.dat")  # named by hand, any suffix is fine; in a folder it is not seen
    assert len(load_images(str(odd))) == 1
    refused(load_images, tmp_path / "g", match=f"no images in the folder {tmp_path / 'g'}")
    refused(load_images, tmp_path / "nix.png", match="no such file")
    for size in (7, 8.0, True, "32"): refused(load_images, colour, isize=size, match="isize must be a whole number of pixels, 8 or more")
    refused(load_images, colour, channels=4, match="channels must be 1 (grey) or 3 (colour), not 4")


def test_files_are_read_a_batch_at_a_time_and_in_order(tmp_path, monkeypatch):
    files = [save(tmp_path / f"{i}.png", seed=i) for i in range(7)]
    files[4].write_bytes(files[4].read_bytes()[:60])
    opened = []
    monkeypatch.setattr(D, "read_image", lambda file, *how: opened.append(file) or read_image(file, *how))
    batches = read_files(files, 8, 3, 3, skip_bad=True)
    first = next(batches)
    assert sorted(opened) == files[:3] and all(torch.equal(x, read_image(file, 8, 3)) for file, x in first)
    rest = [pair for batch in batches for pair in batch]
    assert [file for file, _ in first + rest] == files and [isinstance(x, InputError) for _, x in rest] == [False, True, False, False]
    refused(list, read_files(files, 8, 3, 3), match=f"{files[4]}: it is damaged or cut short")


# ---------------------------------------------------------------- the split

@pytest.mark.parametrize("seed", range(5))
def test_stratified_is_proportional_nested_and_seeded(seed):
    strata = np.random.RandomState(seed).choice(4, 200, p=[0.5, 0.3, 0.15, 0.05])
    drawn = [stratified(strata, n, seed) for n in range(201)]
    for n, some in enumerate(drawn):
        assert len(set(some)) == n and (np.diff(some) > 0).all()
        assert np.abs(np.bincount(strata[some], minlength=4) - n * np.bincount(strata) / 200).max() < 2
    assert all(set(a) < set(b) for a, b in zip(drawn, drawn[1:]))
    for other in ((seed + 1, 0), (seed, 1)): assert not np.array_equal(drawn[50], stratified(strata, 50, *other))


def test_draws_are_frozen():
    "The same draw on every machine, for ever: results are compared across versions."
    assert stratified(np.repeat([0, 1], 10), 6, seed=0).tolist() == [2, 3, 8, 10, 16, 18]
    ids = load_dataset("digits", 8, isize=8).val.ids
    assert (len(ids), ids[:6]) == (130, [12, 27, 43, 47, 74, 89])


@pytest.mark.parametrize("abnormal, seed", [*((k, k) for k in range(10)), (None, 7), (8, 123), (8, 2**32 - 1)])
def test_split_promises_on_digits(abnormal, seed):
    data = load_dataset("digits", abnormal, isize=8, seed=seed)
    digit = D.read_digits(None, seed=seed).targets
    ids = {part: getattr(data, part).ids for part in PARTS}
    assert sorted(sum(ids.values(), [])) == list(range(1797))  # disjoint, nothing lost
    assert not data.train.labels.any() and not data.val.labels.any()
    expected = set(np.flatnonzero(digit == abnormal)) if abnormal is not None else set()
    assert {i for i, y in zip(data.test.ids, data.test.labels.tolist()) if y} == expected <= set(ids["test"])
    shares = np.bincount(digit[ids["val"]], minlength=10) / np.maximum(1, np.bincount(digit[ids["train"] + ids["val"]], minlength=10))
    assert all(abs(share - 0.1) < 0.02 for k, share in enumerate(shares) if k != abnormal)
    assert len(data.val) == round(0.1 * (len(data.train) + len(data.val)))


def test_test_normals_do_not_depend_on_the_abnormal_class():
    "Two classes' results are comparable: a normal test image stays one, whatever counts as abnormal."
    tests = [load_dataset("digits", k, isize=8).test for k in (None, 3, 8)]
    normals = [{i for i, y in zip(t.ids, t.labels.tolist()) if not y} for t in tests]
    digit = D.read_digits(None, seed=0).targets
    for k, found in zip((3, 8), normals[1:]): assert found == {i for i in normals[0] if digit[i] != k}


def test_n_train_keeps_the_groups_in_proportion():
    strata = np.repeat([0, 1], [60, 30])  # sorted: the first images alone would be of one group
    train, _, _ = split(np.zeros(90), np.zeros(90, bool), strata, val_fraction=0, n_train=30)
    assert np.bincount(strata[train]).tolist() == [20, 10]


def test_n_train_is_nested_and_leaves_the_rest_alone():
    full, big, small = (load_dataset("digits", 8, isize=8, n_train=n) for n in (None, 400, 100))
    assert set(small.train.ids) < set(big.train.ids) < set(full.train.ids) and (len(small.train), len(big.train)) == (100, 400)
    assert small.val.ids == full.val.ids and small.test.ids == full.test.ids
    for n in (0, 1170): refused(load_dataset, "digits", 8, n_train=n, match="n_train must be from 1 to 1169")


def test_val_fraction_and_small_pools():
    assert len(load_dataset("digits", 8, isize=8, val_fraction=0).val) == 0
    for n, n_val in ((1, 0), (2, 1), (3, 1), (30, 3)): assert len(split(np.zeros(n), np.zeros(n, bool), np.zeros(n))[1]) == n_val
    refused(split, [1, 1], [False, False], [0, 0], match="no normal images are left to train on")
    for bad in (-0.1, 1): refused(load_dataset, val_fraction=bad, match="val_fraction must be at least 0 and below 1")
    for bad in (-1, 2**32): refused(load_dataset, seed=bad, match="seed must be from 0")


def test_manifest_is_json_deterministic_and_sensitive():
    make = lambda **options: load_dataset("digits", **{"abnormal_class": 8, "isize": 8, **options}).manifest()
    base = make()
    assert json.loads(json.dumps(base)) == base == make()
    counts = {p: (s["n"], s["n_abnormal"], len(s["ids"])) for p, s in base["splits"].items()}
    assert counts == {"train": (1169, 0, 1169), "val": (130, 0, 130), "test": (498, 174, 498)}
    others = [make(seed=1), make(isize=9), make(channels=3), make(abnormal_class=7), make(n_train=50), make(val_fraction=0.2)]
    assert len({m["sha256"] for m in [base, *others]}) == 7
    assert base["splits"]["test"]["sha256"] == others[4]["splits"]["test"]["sha256"] != others[1]["splits"]["test"]["sha256"]


# ---------------------------------------------------------------- readers

def idx(array):
    "Bytes of an idx file."
    return bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape) + array.tobytes()


def class_images(n, shape, seed):
    rng = np.random.RandomState(seed)
    return rng.randint(0, 256, (n, *shape), dtype=np.uint8), (np.arange(n) % 10).astype(np.uint8)


def write_mnist(folder, compress=False):
    folder.mkdir(parents=True)
    for part, n in (("train", 40), ("t10k", 20)):
        for name, array in zip(("images-idx3-ubyte", "labels-idx1-ubyte"), class_images(n, (28, 28), n)):
            (folder / f"{part}-{name}{'.gz' * compress}").write_bytes(gzip.compress(idx(array)) if compress else idx(array))


def check_classes(data, shape, first_train, first_test, classes):
    "40 training and 20 test images over ten classes, class 1 abnormal."
    assert data.classes == classes and data.abnormal_class == classes[1] and (data.channels, data.isize) == (shape[0], shape[1])
    assert [len(getattr(data, p)) for p in PARTS] == [32, 4, 24] and int(data.test.labels.sum()) == 6  # 18 normal; 4 + 2 abnormal
    assert {i for i, y in zip(data.test.ids, data.test.labels.tolist()) if y} == {1, 11, 21, 31, 41, 51}
    everything = {i: x for part in PARTS for i, (x, _) in zip(getattr(data, part).ids, getattr(data, part))}
    assert sorted(everything) == list(range(60))
    for i, expected in ((0, first_train), (40, first_test)):
        assert torch.equal(everything[i], D.to_float(torch.from_numpy(expected.copy()).reshape(shape)))


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_and_fashion_as_torchvision_stores_them(tmp_path, name, folder):
    write_mnist(tmp_path / folder / "raw")
    data = load_dataset(name, 1, tmp_path, isize=28)
    check_classes(data, (1, 28, 28), class_images(40, (28, 28), 40)[0][0], class_images(20, (28, 28), 20)[0][0], D.DATASETS[name].classes)
    (tmp_path / folder / "raw" / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08")
    refused(load_dataset, name, 1, tmp_path, match="download it again")
    (tmp_path / folder / "raw" / "train-images-idx3-ubyte").unlink()
    refused(load_dataset, name, 1, tmp_path, match=f"{folder} could not be read from {tmp_path} (Dataset not found")


def test_fashion_as_debian_stores_it(tmp_path, monkeypatch):
    write_mnist(tmp_path / "debian", compress=True)
    monkeypatch.setattr(D, "DEBIAN_FASHION", tmp_path / "debian")
    data = load_dataset("Fashion-MNIST", "trouser", tmp_path, isize=28)
    check_classes(data, (1, 28, 28), class_images(40, (28, 28), 40)[0][0], class_images(20, (28, 28), 20)[0][0], D.FASHION)
    (tmp_path / "debian" / "t10k-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    refused(load_dataset, "fashion_mnist", 0, tmp_path, match="t10k-images-idx3-ubyte.gz as a gzipped idx file")
    monkeypatch.setattr(D, "DEBIAN_FASHION", tmp_path / "none")
    refused(load_dataset, "fashion_mnist", 0, tmp_path, match="dataset-fashion-mnist")


def md5(path): return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar10_as_torchvision_stores_it(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images, targets = class_images(40, (3, 32, 32), 0)
    tests, test_targets = class_images(20, (3, 32, 32), 1)
    names = [name for name, _ in CIFAR10.train_list]
    pieces = [(name, images[8 * i:8 * i + 8], targets[8 * i:8 * i + 8]) for i, name in enumerate(names)]
    pieces += [("test_batch", tests, test_targets)]
    for name, x, y in pieces: (folder / name).write_bytes(pickle.dumps({"data": x.reshape(len(x), -1), "labels": y.tolist()}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(D.DATASETS["cifar10"].classes)}))
    refused(load_dataset, "cifar10", 1, tmp_path, match="CIFAR10 could not be read from")  # files of ours are not the released ones
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5(folder / name)] for name in names])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(folder / "batches.meta")})
    data = load_dataset("cifar10", "car", tmp_path)  # the older scripts' name for automobile
    check_classes(data, (3, 32, 32), images[0], tests[0], D.DATASETS["cifar10"].classes)


def test_stl10_as_torchvision_stores_it(tmp_path, monkeypatch):
    from torchvision.datasets import STL10
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    parts = {part: class_images(n, (3, 96, 96), n) for part, n in (("train", 40), ("test", 20), ("unlabeled", 1))}
    for part, (images, targets) in parts.items():
        images.transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")  # stored column by column
        (targets + 1).astype(np.uint8).tofile(folder / f"{part}_y.bin")  # counted from 1
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(STL10, attribute, [[name, md5(folder / name)] for name, _ in getattr(STL10, attribute)])
    data = load_dataset("stl10", "bird", tmp_path, isize=96)
    check_classes(data, (3, 96, 96), parts["train"][0][0], parts["test"][0][0], D.DATASETS["stl10"].classes)


def test_download_is_handed_to_torchvision(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST
    def fetch(self): raise OSError("no network\nsecond line")
    monkeypatch.setattr(MNIST, "download", fetch)
    refused(load_dataset, "mnist", 1, tmp_path, download=True, match="MNIST could not be downloaded to")
    monkeypatch.setattr(MNIST, "download", lambda self: (tmp_path / "MNIST").exists() or write_mnist(tmp_path / "MNIST" / "raw"))
    assert len(load_dataset("mnist", 1, tmp_path, isize=8, download=True).train) == 32
    refused(load_dataset, "elpv", root=tmp_path, download=True, match="'elpv' cannot be downloaded from here")


def test_class_sets_too_large_for_memory_stay_arrays(tmp_path, monkeypatch):
    write_mnist(tmp_path / "MNIST" / "raw")
    fast = load_dataset("mnist", 1, tmp_path)
    monkeypatch.setattr(D, "MEMORY_LIMIT", 60 * 32 * 32 - 1)
    lazy = load_dataset("mnist", 1, tmp_path)
    assert lazy.train.pixels is None and torch.equal(lazy.test.stack(), fast.test.stack()) and lazy.test.ids == fast.test.ids


@pytest.fixture
def mvtec(tmp_path):
    "Two categories in MVTec AD's layout, the defects' masks being their left half."
    root = tmp_path / "mvtec"
    for category, channels in (("nut", 3), ("grid", 1)):
        for i in range(10): save(root / category / "train" / "good" / f"{i:03}.png", i, channels=channels)
        for i in range(3): save(root / category / "test" / "good" / f"{i:03}.png", 20 + i, channels=channels)
        for k, defect in enumerate(("bent", "scratch")):
            for i in range(2):
                save(root / category / "test" / defect / f"{i:03}.png", 30 + 10 * k + i, channels=channels)
                mask = np.zeros((10, 12), np.uint8); mask[:, :6] = 255
                (root / category / "ground_truth" / defect).mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(root / category / "ground_truth" / defect / f"{i:03}_mask.png")
    return root


def test_mvtec_with_masks(mvtec):
    data = load_dataset("mvtec", root=mvtec, category="nut", isize=8)
    assert data.classes == ("good", "bent", "scratch") and data.abnormal_class is None and data.channels == 3 and data.category == "nut"
    assert [len(getattr(data, p)) for p in PARTS] == [9, 1, 7] and data.test.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert data.test.ids[3] == "test/bent/000.png" and data.train.masks is None
    assert data.test.masks.shape == (7, 8, 8) and data.test.masks.dtype == torch.bool
    assert not data.test.masks[:3].any() and data.test.masks[3:, :, :4].all() and not data.test.masks[3:, :, 4:].any()
    assert data.manifest()["category"] == "nut"


def test_mvtec_one_defect_grey_and_the_two_roots(mvtec):
    data = load_dataset("mvtec", "scratch", mvtec.parent, category="grid", isize=8)  # found in root/mvtec, too
    assert data.channels == 1 and data.abnormal_class == "scratch" and [i for i in data.test.ids if "bent" in i] == []
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1] and len(data.test.masks) == 5
    assert load_dataset("mvtec", root=mvtec / "grid", isize=8).test.ids[3] == "test/bent/000.png"  # root is the category itself


def test_mvtec_errors(mvtec):
    refused(load_dataset, "mvtec", root=mvtec, category="gird",
            match="unknown category 'gird' (did you mean 'grid'?): choose one of grid, nut")
    refused(load_dataset, "mvtec", root=mvtec, match="no category is named: choose one of grid, nut")
    refused(load_dataset, "mvtec", "good", mvtec, category="nut", match="'good' is the normal class")
    refused(load_dataset, "mvtec", "dent", mvtec, category="nut", match="did you mean 'bent'?")
    mask = mvtec / "nut" / "ground_truth" / "bent" / "001_mask.png"
    mask.write_text("rubbish")
    refused(load_dataset, "mvtec", root=mvtec, category="nut", match="001_mask.png: it is not an image")
    mask.unlink()
    refused(load_dataset, "mvtec", root=mvtec, category="nut", match="has no mask")
    for path in list_images(mvtec / "grid" / "train"): path.unlink()
    refused(load_dataset, "mvtec", root=mvtec, category="grid", match="put the normal ones there")


def test_mvtec_without_masks(mvtec):
    shutil.rmtree(mvtec / "nut" / "ground_truth")
    assert load_dataset("mvtec", root=mvtec, category="nut", isize=8).test.masks is None


@pytest.fixture
def elpv(tmp_path):
    "Forty cells, every fourth defective, every tenth doubtful."
    lines = []
    for i in range(40):
        save(tmp_path / "elpv" / "images" / f"cell{i:04}.png", i, channels=1)
        probability = "0.3333333333333333" if i % 10 == 3 else "1.0" if i % 4 == 0 else "0.0"
        lines.append(f"images/cell{i:04}.png  {probability}    {'mono' if i % 2 else 'poly'}")
    (tmp_path / "elpv" / "labels.csv").write_text("\n".join(lines) + "\n\n")
    return tmp_path / "elpv"


def test_elpv(elpv):
    data = load_dataset("elpv", root=elpv.parent, isize=8)
    n_normal = 40 - 4 - 10  # none doubtful is also defective: 3, 13, … are odd
    assert [len(getattr(data, p)) for p in PARTS] == [n_normal - 5 - 2, 2, 5 + 10]
    assert int(data.test.labels.sum()) == 10 and data.channels == 1
    used = sum((getattr(data, p).ids for p in PARTS), [])
    assert len(set(used)) == 36 and not [i for i in used if i[-5] == "3"] and used[0].startswith("images/cell")
    mono = load_dataset("elpv", "defective", elpv, isize=8, category="mono")
    assert mono.test.labels.sum() == 0 and mono.abnormal_class == "defective"
    assert all(int(i[-5]) % 2 for p in PARTS for i in getattr(mono, p).ids)
    assert len(load_dataset("elpv", root=elpv, isize=8, category="all").train) == len(data.train)


def test_elpv_errors_and_package(elpv, tmp_path, monkeypatch):
    refused(load_dataset, "elpv", root=elpv, category="nomo", match="choose one of all, mono, poly")
    refused(load_dataset, "elpv", "functional", elpv, match="is the normal class")
    (elpv / "labels.csv").write_text("only two\n")
    refused(load_dataset, "elpv", root=elpv, match="labels.csv must hold lines of file, probability")
    package = tmp_path / "site" / "elpv_dataset"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    save(package / "data" / "images" / "a.png", channels=1), save(package / "data" / "images" / "b.png", channels=1)
    (package / "data" / "labels.csv").write_text("images/a.png 0.0 mono\nimages/b.png 1.0 poly\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert len(load_dataset("elpv", root=tmp_path / "nothing").test) == 1
    monkeypatch.setattr(D.importlib.util, "find_spec", lambda name: None)
    refused(load_dataset, "elpv", root=tmp_path / "nothing", match="pip install elpv-dataset")


@pytest.fixture
def own(tmp_path):
    for i in range(10): save(tmp_path / "own" / "train" / "0.normal" / "deep" / f"{i}.png", i)
    for i in range(3): save(tmp_path / "own" / "test" / "0.normal" / f"{i}.png", 20 + i)
    for i in range(2): save(tmp_path / "own" / "test" / "1.abnormal" / f"{i}.png", 30 + i)
    return tmp_path / "own"


def test_folder_layout(own):
    data = load_dataset("folder", root=str(own), isize=8)
    assert [len(getattr(data, p)) for p in PARTS] == [9, 1, 5] and data.test.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.test.ids[-1] == "test/1.abnormal/1.png" and data.classes == ("normal", "abnormal") and data.channels == 3
    assert torch.equal(data.test[4][0], D.to_float(to_uint8(picture(31), 8, 3)))


def test_plain_folder_is_parted_80_10_10(tmp_path):
    for i in range(50): save(tmp_path / f"{i:02}.png", i, channels=1)
    data = load_dataset("folder", root=tmp_path, isize=8)
    assert [len(getattr(data, p)) for p in PARTS] == [40, 5, 5] and not data.test.labels.any() and data.channels == 1
    assert len(set(sum((getattr(data, p).ids for p in PARTS), []))) == 50
    assert data.val.ids != load_dataset("folder", root=tmp_path, isize=8, seed=1).val.ids
    assert len(load_dataset("folder", root=tmp_path, isize=8, val_fraction=0, n_train=20).val) == 0


def test_folder_errors(own, tmp_path):
    refused(load_dataset, "folder", match="needs root")
    refused(load_dataset, "folder", root=tmp_path / "gone", match="not at hand under")
    (tmp_path / "empty").mkdir()
    refused(load_dataset, "folder", root=tmp_path / "empty", match="but it holds no images")
    save(own / "train" / "1.abnormal" / "1.png")  # abnormal images must never be near the training
    refused(load_dataset, "folder", root=own, match="train/1.abnormal")
    save(own / "stray.png")
    refused(load_dataset, "folder", root=own, match="1 images directly in it")
    (own / "stray.png").unlink(), (own / "train" / "1.abnormal" / "1.png").unlink(), (own / "train" / "1.abnormal").rmdir()
    for path in list_images(own / "test" / "1.abnormal"): path.unlink()
    refused(load_dataset, "folder", root=own, match=f"no images in {own / 'test/1.abnormal'}")


# ---------------------------------------------------------------- choosing

def test_classes_by_name_and_number():
    assert load_dataset("digits", "8", isize=8).abnormal_class == load_dataset("digits", 8, isize=8).abnormal_class == "8"
    assert D._class_number("1", ("7", "1", "0")) == 1 and D._class_number(2, ("a", "b", "c")) == 2  # a name wins over a number
    for bad in (10, -1, "x", True, 1.5): refused(load_dataset, "digits", bad, match="or its number from 0 to 9")
    refused(D._class_number, "ankle boots", D.FASHION, match="did you mean 'Ankle boot'?")


def test_unknown_names_and_categories():
    refused(load_dataset, "cifar", match="unknown data set 'cifar' (did you mean 'cifar10'?): choose one of digits, mnist")
    refused(load_dataset, "digits", category="nut", match="has no categories")


def test_available_and_the_default_root(own, tmp_path, monkeypatch):
    monkeypatch.setenv("ANOGAN_DATA", str(tmp_path))
    at_hand = lambda **options: {row["name"]: row["at_hand"] for row in D.available(**options)}
    assert at_hand()["digits"] and not at_hand()["mnist"] and not at_hand()["folder"]
    refused(load_dataset, "mnist", match=f"'mnist' is not at hand under {tmp_path}: 70,000 handwritten digits")
    write_mnist(tmp_path / "MNIST" / "raw")
    assert at_hand()["mnist"] and load_dataset("mnist", 0, isize=8).name == "mnist"
    assert at_hand(root=own)["folder"] and not at_hand(root=tmp_path)["folder"]
    monkeypatch.delenv("ANOGAN_DATA")
    monkeypatch.chdir(tmp_path)
    assert not at_hand()["mnist"]  # ./data is the last resort
    assert all(set(row) == {"name", "classes", "at_hand", "where"} and row["where"] for row in D.available())
    json.dumps(D.available())


def test_base_import_is_light():
    "The base of the package must not pull in what only single readers need."
    heavy = ("torchvision", "sklearn", "pandas", "elpv_dataset", "matplotlib")
    code = f"import sys, anogan.data; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
