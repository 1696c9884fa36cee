"""The tuner keeps the fastest tiles that are right."""

import functools
import re
from collections import Counter

import pytest
import torch

from bench import calls, tune
from vatt_fast.kernels import tiles
from vatt_fast.kernels.cases import CASES, AttentionCase, make

CPU = torch.device("cpu")


def fake_kernels(monkeypatch, seen):
    """An attention whose time follows from its tiles; a plan decides which backward runs."""

    def choose(kernel, heuristic, q):
        choice = tiles.choose(kernel, "no_arch", q.dtype, heuristic, queries=q.shape[1])
        if choice.get("BLOCK", 0) > 128:
            raise MemoryError("out of resources: shared memory")
        seen.append((kernel, tuple(choice.items())))
        return choice

    class Fake(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            choice = choose("fake_forward", {"BLOCK": 64, "num_warps": 4}, q)
            ctx.save_for_backward(q)
            return (q + k + v) * (
                2 if choice["BLOCK"] == 32 else 1
            )  # a tile that breaks the kernel

        @staticmethod
        def backward(ctx, d_out):
            (q,) = ctx.saved_tensors
            plan = choose("fake_plan", {"ONE_PASS": 0}, q)["ONE_PASS"]
            choose(("fake_two", "fake_one")[plan], {"BLOCK": 64, "num_warps": 4}, q)
            return d_out, d_out, d_out

    class Clock:
        name = "fake"

        def __init__(self):
            self.cost = {"fake_forward": 1.0, "fake_two": 2.0, "fake_one": 1.0, "fake_plan": 0.0}

        def prepare(self, calls):
            def sample(i):
                seen.clear()
                calls[i % len(calls)]()
                return sum(
                    self.cost[kernel] * 1000 / dict(choice).get("BLOCK", 1000)
                    for kernel, choice in seen
                )

            return sample

    return (lambda q, k, v, **_: (Fake.apply(q, k, v),)), Clock()


def test_tuning_keeps_the_fastest_tiles_that_are_right(monkeypatch):
    seen = []
    function, clock = fake_kernels(monkeypatch, seen)
    blocks = [{"BLOCK": block, "num_warps": 4} for block in (16, 32, 128, 256)]
    candidates = {
        "fake_forward": blocks,
        "fake_plan": [{"ONE_PASS": 0}, {"ONE_PASS": 1}],
        "fake_two": blocks[2:],
        "fake_one": blocks[2:],
    }
    table, skipped = {}, Counter()
    options = dict(
        skipped=skipped, candidates_of=candidates, clock=clock, rounds=2, function=function
    )
    case = AttentionCase("fake", 2, 5, 5, 2, 8)
    tune.tune_case("attention", case, torch.float32, CPU, table=table, **options)
    best = {"BLOCK": 128, "num_warps": 4}
    key = "fp32 queries=5"
    assert table == {
        "fake_forward": {key: best},
        "fake_plan": {key: {"ONE_PASS": 1}},
        "fake_two": {key: best},
        "fake_one": {key: best},
    }
    assert skipped == {"changes the result": 1, "MemoryError": 3}
    assert tiles.choose.__module__ == tiles.__name__  # no longer overheard

    seen.clear()
    # every key is there: nothing is timed
    tune.tune_case("attention", case, torch.float32, CPU, table=table, **options)
    assert ("fake_forward", tuple(best.items())) not in seen


def test_the_heuristic_stays_unless_something_is_faster(monkeypatch):
    function, clock = fake_kernels(monkeypatch, [])
    clock.cost = dict.fromkeys(clock.cost, 0.0)
    candidates = {"fake_forward": [{"BLOCK": 128, "num_warps": 4}]}
    table = {}
    case = AttentionCase("fake", 2, 5, 5, 2, 8)
    options = dict(candidates_of=candidates, clock=clock, rounds=1, function=function)
    options |= dict(skipped=Counter())
    tune.tune_case("attention", case, torch.float32, CPU, table=table, **options)
    assert table == {"fake_forward": {"fp32 queries=5": {"BLOCK": 64, "num_warps": 4}}}


@pytest.mark.parametrize("op", ["contrastive_lse", "drop_token", "patch_embed", "attention"])
def test_kernels_are_overheard_and_obey_a_table_whatever_they_remember(op):
    pytest.importorskip("triton", reason="the kernels are Triton's")
    case = next(iter(CASES[op].values()))
    call = functools.partial(calls.on_backend(op, "triton_gpu"), **make(case))

    def asked():
        with tune.overheard() as requests:
            call()
        return {request.kernel: request for request in requests}

    call()
    first = asked()
    assert first and asked() == first
    table = {
        request.kernel: {request.key: dict(request.heuristic) | {"num_warps": 1}}
        for request in first.values()
    }
    used = []
    original = tiles.choose

    def choose(*args, **shape):
        used.append(original(*args, **shape))
        return used[-1]

    with tune.applied(table), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "choose", choose)
        call()
    assert used and all(each["num_warps"] == 1 for each in used)


def test_what_the_compiled_code_forbids_is_never_timed(monkeypatch):
    seen, asked = [], []
    function, clock = fake_kernels(monkeypatch, seen)
    blocks = [{"BLOCK": block, "num_warps": 4} for block in (96, 128)]

    def refusals(*where, choices):
        asked.append(where)
        return ["2 spills" if each["fake_forward"]["BLOCK"] == 128 else None for each in choices]

    table, skipped, timed = {}, Counter(), []
    prepare = clock.prepare
    clock.prepare = lambda calls: timed.append(len(calls)) or prepare(calls)
    options = dict(candidates_of={"fake_forward": blocks}, clock=clock, rounds=2, function=function)
    options |= dict(skipped=skipped, refusals=lambda *job: refusals(*job[:-1], choices=job[-1]))
    case = AttentionCase("fake", 2, 5, 5, 2, 8)
    tune.tune_case("attention", case, torch.float32, CPU, table=table, **options)
    assert table == {"fake_forward": {"fp32 queries=5": blocks[0]}}
    assert skipped == {"code": 1} and len(timed) == 2  # the heuristic and 96
    assert asked == [("attention", "fake", "fp32", "fwd")]


def test_a_table_serves_before_it_is_installed():
    choice = {"BLOCK": 8}
    with tune.applied({"kernel": {"fp16 n=3": choice}}):
        assert tiles.choose("kernel", "sm_00", torch.float16, {}, n=3) == choice
    assert tiles.choose("kernel", "sm_00", torch.float16, {}, n=3) == {}


def test_tables_are_sorted_and_read_back(tmp_path):
    table = {"b": {"k2": {"N": 2, "A": 1}, "k1": {"N": 3}}, "a": {"k": {"num_warps": 4}}}
    path = tmp_path / "tuned" / "sm_00.json"
    tune.write_table(path, table)
    assert tune.read_table(path) == table
    assert re.findall(r'"(\w+)"', path.read_text()) == [
        "a",
        "k",
        "num_warps",
        "b",
        "k1",
        "N",
        "k2",
        "A",
        "N",
    ]
    assert tune.read_table(tmp_path / "none.json") == {}
