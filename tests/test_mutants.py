"Two planted faults, so that the long mode of `tests/mutants.py` keeps working; and that its list fits the package."
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import mutants


@pytest.mark.parametrize("number", [0, 8])
def test_a_planted_fault_is_noticed(number):
    fault = mutants.MUTANTS[number]
    assert mutants.caught(fault)[0] and not mutants.caught(mutants.no_fault(fault[0]))[0]


def test_every_planted_fault_has_its_place():
    for module, old, new in mutants.MUTANTS:
        assert old != new and old in (mutants.ROOT / "anogan" / f"{module}.py").read_text(encoding="utf-8"), (module, old)
