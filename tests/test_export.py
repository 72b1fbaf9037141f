"The exported file in ONNX Runtime against the detector it came from: every model, grey and colour, every recipe; and what is refused."
import sys

import pytest
import torch
from typer.testing import CliRunner

from anogan.cli import app
from anogan.data import to_float
from anogan.detector import Detector
from anogan.errors import AnoganError, InputError
from anogan.export import Exportable, answers, deviation, nearest_in_place, to_onnx
from anogan.memory import nearest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

FLAT = dict(dim=8, depth=1)  # an AnoTrans of one stage: a shorter program to translate
MODELS = [("anotrans", 1, "recommended", dict(dim=8)), ("anotrans", 3, "defects", FLAT),
          ("gannext", 1, "defects", dict(dim=8, depths=(1, 1))), ("gannext", 3, "published", dict(dim=8, depths=(1, 1))),
          ("skipganomaly", 1, "published", dict(ngf=4)), ("skipganomaly", 3, "recommended", dict(ngf=4)),
          ("sagan", 1, "recommended", dict(ngf=4)), ("sagan", 3, "defects", dict(ngf=4))]


def bytes_of(n, channels, seed=0):
    return torch.randint(0, 256, (n, channels, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def fitted(model="gannext", channels=1, recipe="recommended", seed=0, **options):
    "A detector as after training, without the training: what is compared does not depend on it."
    options = options or dict(dim=8, depths=(1, 1))
    x = to_float(bytes_of(40, channels))
    detector = Detector(model, channels=channels, recipe=recipe, seed=seed, device="cpu", progress=False, ndf=8, nz=16, **options)
    with torch.no_grad(): detector.discriminator.to_feature.weight *= 30  # features of the size that they have after training
    return detector.remember(x[:30]).calibrate(x[30:])


@pytest.mark.parametrize("model, channels, recipe, options", MODELS)
def test_the_file_says_what_the_detector_says(model, channels, recipe, options, tmp_path):
    detector, pixels = fitted(model, channels, recipe, **options), torch.cat([bytes_of(6, channels, 1), bytes_of(6, channels)])
    assert to_onnx(detector, tmp_path / "m.onnx") <= 1e-4
    found, x = answers(tmp_path / "m.onnx", pixels), to_float(pixels)
    torch.testing.assert_close(found["score"], detector.score(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(found["heatmap"], detector.heatmap(x), rtol=0, atol=1e-4)
    assert found["abnormal"].long().tolist() == detector.predict(x).tolist() and found["abnormal"].dtype == torch.bool
    for n in (1, 5): torch.testing.assert_close(answers(tmp_path / "m.onnx", pixels[:n])["score"], found["score"][:n], rtol=0, atol=1e-5)


@pytest.mark.parametrize("score", [dict(near_map=1.0), dict(rec=0.5, near_image=2.0, near_patch=1.0, lat=0.1)])
def test_every_term_and_any_weights(score):
    detector, pixels = fitted("skipganomaly", score=score, ngf=4), bytes_of(9, 1, 1)
    with torch.no_grad(): found, _, _ = Exportable(detector).eval()(pixels)
    torch.testing.assert_close(found, detector.score(to_float(pixels)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("k, m", [(1, 3), (5, 3), (5, 200)])
def test_candidates_by_a_product_measured_by_differences(k, m, offset):
    random = torch.Generator().manual_seed(0)
    seen, known = (offset + torch.randn(4, n, 24, generator=random) for n in (7, m))
    seen[:, 0] = known[:, 0]  # seen before: the nearest is itself
    found = nearest_in_place(seen, known, k)
    torch.testing.assert_close(found.float(), torch.stack([nearest(s, r, k) for s, r in zip(seen, known)]), rtol=1e-6, atol=1e-6)
    if k == 1: assert found[:, 0].tolist() == [0.0] * 4


def test_the_detector_is_left_as_it_was():
    detector = fitted()
    before = {name: t.clone() for name, t in detector.generator.state_dict().items()}
    module = Exportable(detector)
    with torch.no_grad():
        for p in module.parameters(): p.zero_()
    assert all(torch.equal(t, before[name]) for name, t in detector.generator.state_dict().items())


def test_a_file_that_disagrees_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("anogan.export.NEIGHBOURS", dict(near_image=1, near_map=1, near_patch=1))  # not what the detector computes
    with pytest.raises(AnoganError, match="differs from the original by"): to_onnx(fitted(), tmp_path / "m.onnx")
    assert not any(tmp_path.iterdir())


def test_what_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="not fitted"): to_onnx(Detector("gannext", channels=1, device="cpu"), tmp_path / "m.onnx")
    monkeypatch.setattr("anogan.export.LARGEST", 1000)
    with pytest.raises(InputError, match="one ONNX file holds 2"): to_onnx(fitted(), tmp_path / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"pip install 'anogan\[export\]'"): to_onnx(fitted(), tmp_path / "m.onnx")
    assert not any(tmp_path.iterdir())


def test_the_command_line(tmp_path):
    detector = fitted()
    detector.save(tmp_path / "run")
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "m.onnx")])
    assert done.exit_code == 0 and "takes images (N, 1, 32, 32) uint8" in done.stdout, done.output
    assert deviation(tmp_path / "m.onnx", detector, bytes_of(3, 1)) <= 1e-4
    refused = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "no/such/m.onnx")])
    assert refused.exit_code == 2 and "cannot write" in refused.stderr and refused.stderr.count("\n") == 1
