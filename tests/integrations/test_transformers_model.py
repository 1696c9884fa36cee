"""VATT behind transformers' Auto classes, its Trainer and the hub's folders."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from media_files import encode
from safetensors.torch import load_file, save_file
from small_model import small_model

import vatt_fast as vf

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers

from vatt_fast.integrations import transformers_model as ours


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(a model, its folder), with another folder as transformers writes it beside."""
    ours.register()
    folder = tmp_path_factory.mktemp("hub") / "run"
    model = small_model()
    model.config = dataclasses.replace(model.config, train_words=False)
    model.save_pretrained(folder)
    saved = ours.VATTModel.from_pretrained(folder)
    saved.save_pretrained(folder.with_name("hub"))
    ours.VATTProcessor.from_pretrained(folder).save_pretrained(folder.with_name("hub"))
    return model, folder


def clips(count, seed=0):
    rng = np.random.default_rng(seed)
    video = rng.integers(0, 256, (count, 4, 16, 16, 3), np.uint8)
    audio = rng.uniform(-1, 1, (count, 1024)).astype(np.float32)
    return list(video), list(audio)


def same(found, expected):
    """Weights lie at other addresses, and products of matrices round by their alignment."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_weights_go_both_ways_bit_for_bit(run):
    model, folder = run
    hub = folder.with_name("hub")
    of_run, of_hub = (load_file(f / "model.safetensors") for f in (folder, hub))
    assert of_run.keys() == of_hub.keys()
    again = vf.create_model(hub)
    assert again.config == model.config and again.vocabulary == model.vocabulary
    auto = transformers.AutoModel.from_pretrained(hub)
    assert type(auto) is ours.VATTModel and not auto.training
    for name, value in model.state_dict().items():
        for found in (of_run[name], of_hub[name], again.state_dict()[name], auto.get_buffer(name)
                      if name.endswith(("running_mean", "running_var"))
                      else auto.get_parameter(name)):  # fmt: skip
            assert torch.equal(value, found)
    assert auto.vatt.vocabulary == model.vocabulary
    assert not auto.text_tokens.table.weight.requires_grad and not auto.log_scale.requires_grad
    assert transformers.AutoConfig.from_pretrained(hub).sizes == model.config


def test_outputs_and_loss_are_the_models(run):
    model, folder = run
    hub = folder.with_name("hub")
    processor = transformers.AutoProcessor.from_pretrained(hub)
    net = transformers.AutoModel.from_pretrained(hub)
    video, audio = clips(3)
    texts = [["red dog", "blue star"], "ring", None]
    batch = processor(video=[video[0], None, video[2]], audio=audio, text=texts, return_loss=True)
    assert batch["text_valid"].tolist() == [[True, True], [True, False], [False, False]]
    assert batch["video_valid"].tolist() == [True, False, True] and not batch["video"][1].any()
    found = net(**batch)
    batch.pop("return_loss")
    expected = model(**batch)
    valid = {name: value for name, value in batch.items() if name.endswith("valid")}
    loss = vf.vatt_loss(expected, model.config, **valid)
    same(found.loss, loss.total)
    same(found.loss_vt, loss.vt)
    for field in dataclasses.fields(expected):
        value, of_theirs = getattr(expected, field.name), getattr(found, field.name)
        assert (value is None) == (of_theirs is None)
        if value is not None:
            same(of_theirs, value)
    one = model.encode(text="red dog")["z_text_vt"]
    same(net.vatt.encode(text="red dog")["z_text_vt"], one)
    with pytest.raises(ValueError, match="no pair of modalities"):
        net(audio=batch["audio"], return_loss=True)


def test_a_file_is_read_as_encode_reads_it(run, tmp_path):
    path = tmp_path / "clip.mp4"
    encode(path, video="mpeg4", audio="aac", seconds=2.0)
    model, folder = run
    processor = ours.VATTProcessor.from_pretrained(folder)
    batch = processor(video=str(path), audio=[str(path)])
    with torch.no_grad():
        out = model(**batch)
    for modality in ("video", "audio"):
        expected = model.encode(**{modality: path})[f"z_{modality}_va"]
        found = torch.nn.functional.normalize(getattr(out, f"z_{modality}_va"), dim=-1)
        torch.testing.assert_close(found, expected)


def test_copies_share_nothing_and_stay_one_model(run):
    net = ours.VATTModel.from_pretrained(run[1])
    (video, *_), _ = clips(1)
    given = dict(video=torch.from_numpy(video)[None])
    expected = net(**given).z_video_va
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        same(other(**given).z_video_va, expected)
        with torch.no_grad():
            other.video_tokens.agg[0] += 1
        assert (other.vatt(**given).z_video_va - expected).abs().max() > 1e-3
        assert torch.equal(net(**given).z_video_va, expected)
    net.train()
    assert net.vatt.training and net.vatt.encode(video=video) and net.video_encoder.training
    half = ours.VATTModel.from_pretrained(run[1], dtype=torch.bfloat16)
    assert half.video_tokens.agg.dtype == torch.bfloat16 and half.log_scale.dtype == torch.float32


def test_checkpointed_blocks_have_the_same_gradients(run):
    gradients = []
    video, audio = clips(3)
    for checkpointed in (False, True):
        net = ours.VATTModel.from_pretrained(run[1]).train()
        if checkpointed:
            net.activation_checkpointing_enable()
            assert net.video_encoder.blocks[0].recompute == "blocks"
        given = dict(video=torch.tensor(np.stack(video)), audio=torch.tensor(np.stack(audio)))
        net(**given, return_loss=True).loss.backward()
        gradients.append(net.video_tokens.agg.grad)
    torch.testing.assert_close(*gradients)


def test_the_trainer_trains_and_its_checkpoint_is_a_folder_of_ours(run, tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    net = ours.VATTModel.from_pretrained(run[1])
    processor = ours.VATTProcessor.from_pretrained(run[1])
    video, audio = clips(6)
    rows = [
        dict(video=v, audio=a, text=word)
        for v, a, word in zip(video, audio, ("red", "blue", "star", "ring", "dog", ""), strict=True)
    ]

    def collate(rows):
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return processor(**columns, return_loss=True)

    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=3, learning_rate=1e-3,
        logging_steps=1, save_steps=3, report_to="none", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    trainer = transformers.Trainer(
        net, arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows,
        processing_class=processor,
    )  # fmt: skip
    trainer.train()
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 3 and np.isfinite(losses).all() and len(set(losses)) == 3
    assert any("eval_loss" in entry for entry in history)
    again = vf.create_model(tmp_path / "checkpoint-3")
    moved = {name for name, value in run[0].state_dict().items()
             if not torch.equal(value, again.state_dict()[name])}  # fmt: skip
    assert "video_tokens.agg" in moved and "text_tokens.table.weight" not in moved
    for name, value in net.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert again.vocabulary == processor.vocabulary


def test_what_does_not_fit_is_refused(run, tmp_path):
    model, folder = run
    with pytest.raises(ValueError, match="fraems"):
        ours.VATTPretrainedConfig(vatt=dict(fraems=3))
    net = ours.VATTModel.from_pretrained(folder)
    net.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["video_tokens.agg"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit .*missing_keys video_tokens\.agg"):
        ours.VATTModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vatt"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unknown VATTConfig keys: depth"):
        vf.create_model(tmp_path)
    with pytest.raises(ValueError, match="no vocabulary"):
        ours.VATTProcessor(model.config)(text="red")
    processor = ours.VATTProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match="2 of video, 1 of text"):
        processor(video=clips(2)[0], text="red")
    with pytest.raises(ValueError, match="one size"):
        processor(video=[clips(1)[0][0], np.zeros((4, 8, 8, 3), np.uint8)])
