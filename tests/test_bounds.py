"The lock and the bounds agree with settings.ini. That the versions work is for `make bounds`, which takes minutes."
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).parent))
import bounds

LINE = re.compile(r"([A-Za-z0-9][\w.-]*)==(\S+)")
lines = [line for line in (bounds.ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def plain(name): return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_holds_exact_versions_and_no_places():
    assert [line for line in lines if not LINE.fullmatch(line)] == []


def test_the_lock_keeps_every_bound():
    locked = {plain(name): number for name, number in (LINE.fullmatch(line).groups() for line in lines)}
    wanted = [Requirement(text) for text in bounds.requirements("requirements", "dev_requirements")]
    wanted = [need for need in wanted if not need.marker or need.marker.evaluate({"python_version": "3.11"})]
    assert len(wanted) > 25
    assert [str(need) for need in wanted if not need.specifier.contains(locked.get(plain(need.name), "0"), prereleases=True)] == []


def test_the_lowest_versions_are_those_of_the_bounds():
    assert bounds.lowest(["torch>=2.6", "fastcore>=1.12.3,<2", 'tomli>=2;python_version<"3.11"', "execnb<0.2"]) == [
        "torch==2.6", "fastcore==1.12.3", 'tomli==2;python_version<"3.11"']
    for extras, _ in bounds.SETS.values():
        found = [Requirement(line) for line in bounds.constraints(extras)]
        assert {"pytest", "hypothesis", "torch"} <= {need.name for need in found} and len({need.name for need in found}) == len(found)
        assert ("onnx" in {need.name for need in found}) == ("export" in extras)
