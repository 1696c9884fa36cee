"""Two ranks are one: the same batches, weights of examples, gradients and files."""

import warnings

import pytest
import torch
from labelled_media import settings, write_labelled
from processes import in_processes
from safetensors.torch import load_file
from test_finetune import run
from training_runs import metrics

from vatt_fast.finetuning.losses import mixup_draw
from vatt_fast.training.checkpoint import CHECKPOINT, read_standing

# rare classes weigh more, by the whole batch; DropToken's draw is shared
AUDIO = dict(task="audio", recipe="audioset", samples=1280, sample_rate_hz=8000, warmup_steps=0)
CASES = {
    "video": dict(drop_rate=0.5, eval_split="test"),
    "audio": AUDIO | dict(mixup=0.0, learning_rate=0.02),
}


def ranks_of(rank, world, folder, out):
    """One run of each case, and one that is continued with other draws on each rank."""
    found = {}
    for name, changes in CASES.items():
        model = run(settings(folder, out / name, batch_size=6, steps=4, **changes))
        found |= {f"{name}/{key}": value.sum() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run(settings(folder, out / "uneven", batch_size=5))
        except ValueError as error:
            found["refused"] = str(error)
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two ranks found, and the folders of their runs and of undivided ones."""
    folder = write_labelled(tmp_path_factory.mktemp("media"))
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    found = in_processes(2, ranks_of, folder, two)
    for name, changes in CASES.items():
        run(settings(folder, one / name, batch_size=6, steps=4, **changes))
    return found, two, one


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one(both, name):
    (first, second), two, one = both
    assert all(torch.equal(first[key], second[key]) for key in first if key.startswith(name))
    a, b = load_file(one / name / CHECKPOINT), load_file(two / name / CHECKPOINT)
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-3, atol=1e-5, msg=key)
    for x, y in zip(metrics(one / name), metrics(two / name), strict=True):
        for key in ("loss", "gradient_norm", "train_top1", "eval_top1"):
            if key in x:
                assert y[key] == pytest.approx(x[key], rel=1e-4), key
    assert read_standing(two / name / CHECKPOINT).arithmetic["ranks"] == 2


def test_a_batch_that_cannot_be_shared_is_refused(both):
    (first, second), *_ = both
    assert "batch_size is 5" in first["refused"] and first["refused"] == second["refused"]


def test_mixup_is_drawn_by_each_rank():
    draws = [mixup_draw(8, 5.0, seed=0, step=0, rank=rank)[0] for rank in (0, 1)]
    assert not torch.equal(*draws)
