"""The report says what the lines say: whole pages, figures and README tables from made-up lines."""

import pytest

from bench import run
from vatt_fast.kernels.cases import CASES


@pytest.mark.parametrize("op", list(run.FOR_CPU))
def test_every_case_of_the_cpu_can_be_asked_for_by_name(op):
    for case in run.FOR_CPU[op]:
        assert run.select(op, [case.name]) == [case]
    assert run.select(op, ["cpu"]) == list(run.FOR_CPU[op])
    name = next(iter(CASES[op]))
    assert run.select(op, [name, "cpu"]) == [CASES[op][name], *run.FOR_CPU[op]]
    with pytest.raises(ValueError, match=f"unknown case 'none'.*{run.FOR_CPU[op][0].name}"):
        run.select(op, ["none"])
