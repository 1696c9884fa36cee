"""Clocks, the rotation of contenders, statistics and peak memory."""

import time

import pytest
import torch

from bench import timer

CPU = torch.device("cpu")


class FakeClock:
    """Takes a call's result for its milliseconds."""

    name = "fake"

    def prepare(self, calls):
        return lambda i: float(calls[i % len(calls)]())


def test_contenders_run_in_rotating_order_on_rotating_inputs():
    order = []

    def call(name, number):
        return lambda: order.append((name, number)) or number + 1

    contenders = {name: [call(name, number) for number in range(2)] for name in "abc"}
    times = timer.interleaved(contenders, rounds=4, warmup=0, clock=FakeClock())
    names = "".join(name for name, _ in order)
    assert names == "abc" + "bca" + "cab" + "abc"
    assert [number for _, number in order] == [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3
    assert times["a"].ms == (1, 2, 1, 2)


def test_a_failing_contender_leaves_and_the_others_go_on():
    def broken():
        raise RuntimeError("out of resources\nand more")

    failed = {}
    times = timer.interleaved(
        {"good": [lambda: 1], "bad": [broken]}, rounds=3, warmup=1, clock=FakeClock(), failed=failed
    )
    assert set(times) == {"good"} and failed == {"bad": "RuntimeError: out of resources"}
    with pytest.raises(RuntimeError):
        timer.interleaved({"bad": [broken]}, rounds=1, warmup=1, clock=FakeClock())


def test_a_deadline_leaves_one_round():
    times = timer.interleaved(
        {"a": [lambda: 1]}, rounds=9, warmup=0, clock=FakeClock(), deadline=time.monotonic() - 1
    )
    assert times["a"].ms == (1,)


def test_percentiles_and_ratios():
    timing = timer.Timing((5.0, 1.0, 3.0, 2.0, 4.0, 6.0))
    assert (timing.p20, timing.p50, timing.p80) == (2.0, 3.5, 5.0)
    noisy, twice = timer.Timing((1.0, 10.0, 2.0)), timer.Timing((2.0, 20.0, 4.0))
    assert noisy.speedup_over(twice) == 2.0  # round by round, whatever the rounds did
    assert timer.Timing((7.0,)).p80 == 7.0


def test_the_host_clock_measures_time():
    sample = timer.HostClock().prepare([lambda: time.sleep(0.02)])
    assert 20 <= sample(0) < 2000


def test_peak_memory_on_the_cpu_is_what_torch_allocates():
    x = torch.randn(1000, 1000)
    assert timer.peak_bytes(lambda: x + 1, CPU) == pytest.approx(4e6, rel=0.01)
    assert timer.peak_bytes(lambda: ((x + 1) * 2).sum(), CPU) == pytest.approx(8e6, rel=0.01)


def test_peak_memory_of_a_step_counts_its_gradients_whatever_lay_there_before():
    weight = torch.randn(1000, 1000, requires_grad=True)

    def step():
        weight.grad = None  # the last step's
        weight.sum().backward()

    for _ in range(3):  # the profiler knows the first gradient, and may take a later one for it
        assert timer.peak_bytes(step, CPU) == pytest.approx(4e6, rel=0.01)
        weight.grad = None
        step()


@pytest.mark.gpu
def test_gpu_peak_memory_counts_the_output():
    x = torch.randn(1024, 1024, device="cuda")
    assert timer.peak_bytes(lambda: x + 1, x.device) == x.nbytes


def test_stolen_time_is_told(tmp_path, monkeypatch):
    """Of 100 ticks, guests' not among them, 30 were stolen."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  10 0 0 50 0 0 0 40 5 5\ncpu0 1 0 0 5 0 0 0 4 0 0\n")
    assert timer._processor_ticks(stat) == (100, 40)
    assert timer._processor_ticks(tmp_path / "none") is None
    ticks = iter([(100, 40), (200, 70)])
    monkeypatch.setattr(timer, "_processor_ticks", lambda: next(ticks))
    calls = {"a": [lambda: 1], "b": [lambda: 2]}
    times = timer.interleaved(calls, rounds=2, warmup=0, clock=FakeClock())
    assert times["a"].stolen == times["b"].stolen == 0.3
