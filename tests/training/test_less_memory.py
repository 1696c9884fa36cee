"""Runs whose activations take less memory are the same runs."""

import pytest
from training_runs import MODEL, metrics, settings, write_media

from vatt_fast.training.loop import pretrain
from vatt_fast.training.settings import PretrainConfig


def losses(folder, out, **changes) -> list[float]:
    # Adam divides the rounding of a gradient that is 0 by itself: a large eps leaves it rounding
    exact = dict(adam_eps=1.0, steps=3, checkpoint_every=3, warmup_steps=1)
    run = settings(folder, out, **exact, **changes)
    pretrain(run, model_config=MODEL, progress=False)
    return [line["loss"] for line in metrics(out)]


def test_micro_batches_and_computing_again_train_the_same_model(tmp_path):
    (tmp_path / "clips").mkdir()
    folder = write_media(tmp_path / "clips")
    plain = losses(folder, tmp_path / "plain")
    again = losses(folder, tmp_path / "again", recompute="ops")
    assert again == plain and len(plain) == 3
    micro = losses(folder, tmp_path / "micro", micro_batch=3, recompute="blocks", drop_per="clip")
    whole = losses(folder, tmp_path / "whole", drop_per="clip")
    assert micro == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(micro_batch=0), "micro_batch is 0; it must be at least 1"),
        (dict(micro_batch=8, framework="jax"), "micro_batch belongs to framework 'torch'"),
        (dict(recompute="ops", framework="jax"), "recompute 'ops' belongs to framework 'torch'"),
        (dict(recompute="all"), "recompute is 'all'; it is one of none, blocks, ops"),
        (dict(compile="blocks", framework="jax"), "compile belongs to framework 'torch'"),
        (dict(shard_weights=True), "shard_weights belongs to framework 'jax'"),
    ],
)
def test_refused_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(data="clips", out="run", **changes)
