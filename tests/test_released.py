"""Released weights: the golden files through our networks and our trainer, other sizes, and every kind of file that is refused.

A golden file holds a released network's random weights and what the released code computed from them. Training is compared twice.
In double precision no processor matters: outputs and gradients to 1e-4, the losses of three steps and the outputs after them to 1e-3.
In float32, as the files were written, AnoTrans cannot be held to that: its random weights multiply rounding so much (chapter 20) that runs
which begin one part in ten million apart end with single pixels 70 % apart, and norms of gradients and late losses differ by a few in 10,000.
For the same reason its output after three steps is compared by its mean deviation; 1e-3 there takes a machine that rounds as the files' did.
"""
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from anogan.anotrans import AnoTrans
from anogan.discriminator import Discriminator
from anogan.errors import InputError
from anogan.gannext import GanNeXt
from anogan.released import MODELS, PAPER_SIZES, discriminator_places, load_released, released_name
from anogan.trainer import Trainer, find_recipe
from anogan.unets import SkipGANomaly

GOLDEN = Path(__file__).parent / "golden"
FILES = {path.stem: path for path in sorted(GOLDEN.glob("*.safetensors"))}
COLUMNS = ("adv", "con", "lat", "loss_g", "d_real", "d_fake", "loss_d")  # of train.losses; con is weighted by 50 there
every_file = pytest.mark.parametrize("name", FILES)


def model_of(name): return name.split("_")[0]
def relative(ours, theirs): return ((ours - theirs.reshape(ours.shape)).abs().max() / theirs.abs().max()).item()


# --- the golden files ---

def test_there_are_four_files():
    assert list(FILES) == ["anotrans_p2_d8_s32", "anotrans_p4_d8_s32", "gannext_d8_s32", "skipganomaly_n8_s32"]


@every_file
def test_in_eval_mode_everything_is_as_released(name):
    t, (generator, discriminator) = load_file(FILES[name]), load_released(FILES[name], model_of(name))
    assert not generator.training and not discriminator.training
    with torch.no_grad():
        fake = generator(t["x"])
        (real_logits, real), (fake_logits, feature) = discriminator(t["x"]), discriminator(fake)
    rec, lat = (t["x"] - fake).square().mean(dim=(1, 2, 3)), (real - feature).square().mean(dim=1)
    ours = dict(fake=fake, feat_real=real, feat_fake=feature, pred_real=real_logits.sigmoid(), pred_fake=fake_logits.sigmoid(),
                rec=rec, lat=lat, score=0.9 * rec + 0.1 * lat)
    assert {key: v for key, value in ours.items() if (v := relative(value, t["eval." + key])) > 1e-4} == {}
    assert len(ours) == sum(key.startswith("eval.") for key in t)


RANKS = {  # in which order the released modules were registered, level by level, so that gradients can be named
    "anotrans": "inc inc2 inc4 bn Emb contact att att2 ln down skip bottom up expand out proj1 norm1 relative_position_bias_table qkv attn norm2 mlp "
                "fc1 fc2 proj norm reduction absolute_pos_embed weight bias",
    "gannext": "block gamma dwconv norm conv1 conv2 pwconv1 pwconv2 down skip up proj stem_in stem_out bottom weight bias",
    "skipganomaly": "model weight bias"}


def released_order(model, keys):
    words = RANKS[model].split()
    def rank(key): return [int(part) if part.isdigit() else words.index(part) for part in key.split(".")]
    return sorted((key for key in keys if not re.search(r"running_|num_batches|position_index|attn_mask", key)), key=rank)


@pytest.fixture(scope="module")
def trained():
    "(Name of a file, number format) -> what three steps of our trainer with the published recipe make of it."
    return {(name, dtype): three_steps(name, dtype) for name in FILES for dtype in (torch.float64, torch.float32)}


def three_steps(name, dtype):
    model, t = model_of(name), load_file(FILES[name])
    x = t["x"].to(dtype)
    def fresh(): return [network.to(dtype).train() for network in load_released(FILES[name], model)]
    first, networks, losses = fresh()[0](x).detach(), fresh(), []  # two pairs, for a pass moves BatchNorm's averages
    trainer = published(model, *networks)
    for step in range(3):
        of_step = trainer.step(x)
        losses.append([float(of_step[column]) * (50 if column == "con" else 1) for column in COLUMNS])
        if step == 0: grads = gradients(name, *networks)
    return dict(first=first, losses=torch.tensor(losses), grads=grads, after=networks[0](x).detach(), file=t)


def published(model, *networks, **options):
    return Trainer(*networks, find_recipe("published", model).tuned(**options), batch_size=4, device="cpu", precision="fp32", progress=False)


def gradients(name, generator, discriminator):
    "Norm of each parameter's gradient, of both networks, in the order of the file; 0 where the released network has parts that it never uses."
    model = model_of(name)
    places, parts = MODELS[model](PAPER_SIZES | dict(dim=8, ngf=8, patchsize=int(name[10]) if model == "anotrans" else 2))[1:3]
    norms = {released_name(key, places, parts): p.grad.norm().float() for key, p in generator.named_parameters()}
    with safe_open(FILES[name], "pt") as f: order = released_order(model, [key[5:] for key in f.keys() if key.startswith("netg.")])
    assert norms.keys() <= set(order)
    return torch.stack([norms.get(key, torch.tensor(0.0)) for key in order]), torch.stack([p.grad.norm().float() for p in discriminator.parameters()])


every_run = pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name in FILES for dtype in (torch.float64, torch.float32)])
def rounding_counts(name, dtype): return model_of(name) == "anotrans" and dtype == torch.float32


@every_run
def test_in_train_mode_the_output_is_as_released(name, dtype, trained):
    r = trained[name, dtype]
    assert relative(r["first"], r["file"]["train.fake"]) < 1e-4


@every_run
def test_the_first_steps_losses_and_gradients_are_as_released(name, dtype, trained):
    r = trained[name, dtype]
    (of_g, of_d), t = r["grads"], r["file"]
    torch.testing.assert_close(r["losses"][0], t["train.losses"][0], rtol=1e-4, atol=0)
    torch.testing.assert_close(of_d, t["train.grad_norm_d"], rtol=1e-4, atol=0)
    # biases before a BatchNorm have the gradient zero; float32 makes it some 1e-7, of which nothing is asked
    torch.testing.assert_close(of_g, t["train.grad_norm_g"], rtol=1e-3 if rounding_counts(name, dtype) else 1e-4, atol=2e-6)


@every_run
def test_three_steps_losses_are_as_released(name, dtype, trained):
    r = trained[name, dtype]
    torch.testing.assert_close(r["losses"], r["file"]["train.losses"], rtol=5e-3 if rounding_counts(name, dtype) else 1e-3, atol=0)


@every_run
def test_the_output_after_three_steps_is_as_released(name, dtype, trained):
    after, released = trained[name, dtype]["after"], trained[name, dtype]["file"]["train.fake_after"]
    if model_of(name) != "anotrans": assert relative(after, released) < 1e-3
    else: assert (after - released).norm() / released.norm() < (0.02 if dtype == torch.float64 else 0.1)  # a wrong update ends above 0.1, see below


def test_a_wrong_update_would_be_seen():
    name = "anotrans_p2_d8_s32"
    t, networks = load_file(FILES[name]), [network.double().train() for network in load_released(FILES[name], "anotrans")]
    trainer = published("anotrans", *networks, latent_in_d=False)
    losses = [trainer.step(t["x"].double())["loss_d"].item() for _ in range(3)]
    assert abs(losses[2] / t["train.losses"][2, COLUMNS.index("loss_d")] - 1) > 1e-2
    assert (networks[0](t["x"].double()) - t["train.fake_after"]).norm() / t["train.fake_after"].norm() > 0.1


# --- other sizes than the golden files have ---

def as_released(model, generator, discriminator, **sizes):
    "What the released code would have written for these networks, with its unused parts."
    c = PAPER_SIZES | sizes
    _, places, parts, _ = MODELS[model](c)
    tensors = {"netg." + released_name(key, places, parts): t.flatten(1, 2) if key.endswith("position") else t for key, t in generator.state_dict().items()}
    if model == "anotrans":
        tensors |= {f"netg.{name}.bn.weight": torch.ones(3) for name in ("inc", "inc2", "inc4")}
        tensors |= {"netg.inc2.Emb.1.absolute_pos_embed": torch.zeros(1, 7, 9), "netg.down.0.att.att2.attn_mask": torch.zeros(5, 4, 4),
                    "netg.bottom.0.att.att.attn.relative_position_index": torch.zeros(1, dtype=torch.long)}
    places = discriminator_places(c["nc"], c["ndf"], len(discriminator.layers))
    return tensors | {"netd." + released_name(key, places): t for key, t in discriminator.state_dict().items()}


def build(model, isize=32, patchsize=2, dim=8, ngf=4, ndf=4, nz=6, nc=3):
    torch.manual_seed(0)
    generator = {"anotrans": lambda: AnoTrans(isize, nc, dim, patchsize, layout="released"), "gannext": lambda: GanNeXt(isize, nc, dim),
                 "skipganomaly": lambda: SkipGANomaly(isize, nc, ngf)}[model]()
    pair = generator, Discriminator(isize, nc, ndf, nz)
    for network in pair:
        for t in network.state_dict().values(): t.copy_(torch.rand(t.shape) / 5 + 0.01 if t.dtype.is_floating_point else t + 3)
    return [network.eval() for network in pair]


SIZES = [("anotrans", dict(isize=64, dim=16, patchsize=2, ndf=12, nz=5)), ("anotrans", dict(isize=64, dim=16, patchsize=4)),
         ("anotrans", dict(isize=128, dim=12, patchsize=8, nc=1)), ("gannext", dict(isize=64, dim=6, ndf=16, nz=9)), ("gannext", dict(isize=128, dim=2, ndf=2)),
         ("skipganomaly", dict(isize=64, ngf=6)), ("skipganomaly", dict(isize=128, ngf=2, ndf=2, nc=1))]


@pytest.mark.parametrize(("model", "sizes"), SIZES)
def test_no_size_is_built_in(model, sizes):
    generator, discriminator = build(model, **sizes)
    sizes = dict(dim=8, ngf=4, ndf=4, nz=6) | sizes
    tensors = as_released(model, generator, discriminator, **sizes)
    ours = load_released(tensors, model, **sizes)
    for a, b in zip(ours, (generator, discriminator)):
        theirs = b.state_dict()
        assert all(torch.equal(t, theirs[key]) for key, t in a.state_dict().items())
    assert getattr(ours[0], "restore", None) is None or ours[0].restore.lay_out.__name__ == "scatter_rows"


def test_names_at_64_pixels():
    discriminator = [released_name(key, discriminator_places(3, 8, 4)) for key in Discriminator(64, 3, 8, 16).state_dict()]
    assert [key for key in discriminator if "tracked" not in key and "running" not in key and "bias" not in key] == [
        "feat.initial-conv-3-8.weight", "feat.pyramid-8-16-conv.weight", "feat.pyramid-16-batchnorm.weight", "feat.pyramid-16-32-conv.weight",
        "feat.pyramid-32-batchnorm.weight", "feat.pyramid-32-64-conv.weight", "feat.pyramid-64-batchnorm.weight", "feat.final-64-1-conv.weight",
        "clas.classifier.weight"]
    generator, places, parts, _ = MODELS["skipganomaly"](PAPER_SIZES | dict(isize=64, ngf=2))
    inner = "model." + "model.1." + "model.3." * 4
    names = {released_name(key, places, parts): tuple(t.shape) for key, t in generator.state_dict().items()}
    assert names[inner + "model.1.weight"] == names[inner + "model.3.weight"] == (16, 16, 4, 4) and names[inner + "model.4.bias"] == (16,)
    assert inner + "model.2.weight" not in names and names["model.model.1.model.3.model.3.model.3.model.5.weight"] == (32, 16, 4, 4)


@pytest.mark.parametrize(("model", "sizes"), [case for case in SIZES if case[1]["isize"] == 64])
def test_the_published_step_runs_at_other_sizes(model, sizes):
    generator, discriminator = build(model, **sizes)
    sizes = dict(dim=8, ngf=4, ndf=4, nz=6) | sizes
    networks = [network.train() for network in load_released(as_released(model, generator, discriminator, **sizes), model, **sizes)]
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    losses = published(model, *networks).step(x)
    assert all(loss.isfinite() for loss in losses.values())
    torch.testing.assert_close(losses["loss_g"], losses["adv"] + 50 * losses["con"] + losses["lat"])
    torch.testing.assert_close(losses["loss_d"], losses["d_real"] + losses["d_fake"] + losses["lat"])
    for network, untouched in zip(networks, (generator, discriminator)):
        assert all(p.grad.isfinite().all() for p in network.parameters())
        assert not any(torch.equal(p, q) for p, q in zip(network.parameters(), untouched.parameters()) if p.grad.any())
    assert networks[1].layers[1][1].num_batches_tracked == 3 + 3  # three batches more than `build` had counted


# --- where the tensors come from ---

@pytest.fixture(scope="module")
def tiny():
    sizes = dict(dim=2, ndf=2, nz=3)
    return as_released("gannext", *build("gannext", **sizes), **sizes), sizes


def outputs(pair, x=torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)):
    with torch.no_grad(): out = torch.cat([pair[0](x).flatten(), *(o.flatten() for o in pair[1](x))])
    assert out.isfinite().all() and out.std() > 0
    return out


@pytest.mark.parametrize("prefixed", [lambda key: re.sub(r"^(net[gd])\.", r"\1.module.", key), lambda key: "module." + key,
                                      lambda key: key.replace("netg.", "netg.module.")])
def test_the_prefix_of_data_parallel_is_ignored(tiny, prefixed):
    tensors, sizes = tiny
    assert torch.equal(outputs(load_released({prefixed(key): t for key, t in tensors.items()}, "gannext", **sizes)),
                       outputs(load_released(tensors, "gannext", **sizes)))


def test_all_kinds_of_files_give_the_same(tiny, tmp_path):
    tensors, sizes = tiny
    save_file({key: t.contiguous() for key, t in tensors.items()}, tmp_path / "a.safetensors")
    save_file({key: t.contiguous() for key, t in tensors.items()}, tmp_path / "b.safetensors", metadata={"config": json.dumps(sizes | dict(note="x"))})
    for suffix in ("pth", "pt"): torch.save(tensors, tmp_path / f"c.{suffix}")
    expected = outputs(load_released(tensors, "gannext", **sizes))
    assert torch.equal(outputs(load_released(tmp_path / "a.safetensors", "gannext", **sizes)), expected)
    assert torch.equal(outputs(load_released(str(tmp_path / "b.safetensors"), "gannext")), expected)
    for suffix in ("pth", "pt"): assert torch.equal(outputs(load_released(tmp_path / f"c.{suffix}", "gannext", **sizes)), expected)


def test_the_callers_sizes_win_over_the_files(tiny, tmp_path):
    tensors, sizes = tiny
    save_file({key: t.contiguous() for key, t in tensors.items()}, tmp_path / "wrong.safetensors", metadata={"config": json.dumps(sizes | dict(dim=99))})
    with pytest.raises(InputError, match=re.escape("(198,)") + "|" + re.escape("(99,")): load_released(tmp_path / "wrong.safetensors", "gannext")
    load_released(tmp_path / "wrong.safetensors", "gannext", dim=2)


def test_without_sizes_the_papers_are_meant():
    for model, dim in (("anotrans", 64), ("gannext", 40)):
        with pytest.raises(InputError, match=rf"netg\.\S+ is missing, of shape \({dim}, 3, 2, 2\)"): load_released({}, model)


def test_loading_leaves_source_and_random_numbers_alone(tiny):
    tensors, sizes = tiny
    before, state = {key: t.clone() for key, t in tensors.items()}, torch.get_rng_state()
    generator, _ = load_released(tensors, "gannext", **sizes)
    assert torch.equal(torch.get_rng_state(), state)
    for p in generator.parameters(): p.detach().zero_()
    assert all(torch.equal(t, before[key]) for key, t in tensors.items())


def test_step_counters_may_be_missing_and_half_precision_is_read(tiny):
    tensors, sizes = tiny
    old = {key: t for key, t in tensors.items() if "num_batches_tracked" not in key}
    assert torch.equal(outputs(load_released(old, "gannext", **sizes)), outputs(load_released(tensors, "gannext", **sizes)))
    generator, _ = load_released({key: t.half() for key, t in old.items()}, "gannext", **sizes)
    assert {p.dtype for p in generator.parameters()} == {torch.float32}


# --- what is refused ---

@pytest.mark.parametrize(("change", "says"), [
    ({"netg.up.2.proj.bias": None}, r"netg\.up\.2\.proj\.bias is missing, of shape \(2,\)"),
    ({"netd.clas.classifier.weight": None}, r"netd\.clas\.classifier\.weight is missing, of shape \(1, 3, 3, 3\)"),
    ({"netg.stem_in.1.running_var": torch.ones(3)}, r"netg\.stem_in\.1\.running_var has the shape \(3,\), but \(2,\) was expected"),
    ({"netd.feat.final-8-1-conv.weight": torch.ones(3, 8, 4, 5)}, r"final-8-1-conv\.weight has the shape \(3, 8, 4, 5\), but \(3, 8, 4, 4\) was expected"),
    ({"netg.bottom.9.gamma": torch.ones(16)}, r"netg\.bottom\.9\.gamma of shape \(16,\) was not expected"),
    ({"netd.feat.pyramid-8-16-conv.weight": torch.ones(1)}, r"netd\.feat\.pyramid-8-16-conv\.weight of shape \(1,\) was not expected"),
    ({"netg.stem_in.0.bias": 3}, r"the entry 'netg\.stem_in\.0\.bias' of the released weights is int, not a tensor"),
    ({"netg": {"stem_in.0.bias": torch.zeros(2)}}, "the entry 'netg' of the released weights is dict, not a tensor"),
    ({7: torch.zeros(2)}, "the entry 7 "),
])
def test_what_does_not_fit_is_one_sentence(tiny, change, says):
    tensors, sizes = tiny
    with pytest.raises(InputError, match=says) as error: load_released({key: t for key, t in (tensors | change).items() if t is not None}, "gannext", **sizes)
    assert "\n" not in str(error.value)


def test_entries_outside_the_networks_are_ignored(tiny):
    tensors, sizes = tiny
    load_released(tensors | {"x": torch.zeros(1), "train.losses": torch.zeros(3, 7)}, "gannext", **sizes)


@pytest.mark.parametrize(("model", "config", "says"), [
    ("unet", {}, "unknown model 'unet'.*anotrans, gannext, skipganomaly"), ("gannext", dict(width=3), "unknown size 'width'.*isize, patchsize, dim"),
    ("gannext", dict(isize=48), "isize 48"), ("anotrans", dict(dim=30), "dim 30"), ("skipganomaly", dict(isize=100), "isize 100 is not legal")])
def test_unknown_models_and_illegal_sizes_are_one_sentence(model, config, says):
    with pytest.raises(InputError, match=says): load_released({}, model, **config)


class Runs:
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


def test_a_pickle_that_could_run_code_is_refused_and_runs_none(tiny, tmp_path):
    torch.save(tiny[0] | {"netg.extra": Runs(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth cannot be read as plain tensors, and nothing in it was run") as error:
        load_released(tmp_path / "w.pth", "gannext")
    assert not (tmp_path / "ran").exists() and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.safetensors", b"\x08\0\0\0\0\0\0\0{}", "is not a whole safetensors file"), ("a.safetensors", b"", "is not a whole safetensors file"),
    ("a.pth", b"no pickle", "cannot be read as plain tensors"), ("a.pt", None, "there is no file"), ("a.bin", b"x", "must end in .safetensors, .pth or .pt")])
def test_broken_files_are_one_sentence(tmp_path, name, content, says):
    if content is not None: (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as error: load_released(tmp_path / name, "gannext")
    assert "\n" not in str(error.value)


def test_a_file_of_something_else_is_one_sentence(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds list, not a dict of names and tensors"): load_released(tmp_path / "list.pth", "gannext")
    save_file({"x": torch.zeros(1)}, tmp_path / "meta.safetensors", metadata={"config": "not json"})
    with pytest.raises(InputError, match="is not a whole safetensors file"): load_released(tmp_path / "meta.safetensors", "gannext")


def test_the_golden_files_state_their_sizes():
    for name, path in FILES.items():
        with safe_open(path, "pt") as f: config = json.loads(f.metadata()["config"])
        assert config.keys() <= PAPER_SIZES.keys(), name
