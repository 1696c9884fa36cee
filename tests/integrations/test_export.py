"""Towers that were written as files compute what the model computes, for batches of any size."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from released_keys import arrays, fine_tuned_keys
from tf_bundle_writer import write_bundle

import vatt_fast as vf
from vatt_fast.classifier import Classifier, ClassifierConfig
from vatt_fast.cli import main
from vatt_fast.data.text import Vocabulary
from vatt_fast.integrations import export as ours

# of torch's exporter about itself
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
TOWER = vf.TowerConfig(depth=2, dim=32, mlp_dim=64, num_heads=2, head_dim=16)
CONFIG = dataclasses.replace(
    vf.preset("tiny"), video=TOWER, audio=TOWER, text=TOWER, frames=6, height=20, width=16,
    samples=3000, vocab_size=9, words=6,
)  # fmt: skip
SPECTROGRAM = dataclasses.replace(CONFIG, audio_input="spectrogram", samples=12800)
AGNOSTIC = dataclasses.replace(CONFIG, kind="modality_agnostic")
CASES = [
    ("pt2", "video", CONFIG),
    ("pt2", "text", AGNOSTIC),
    ("onnx", "video", AGNOSTIC),
    ("onnx", "audio", SPECTROGRAM),
    ("onnx", "text", CONFIG),
]


def model(config):
    torch.manual_seed(0)
    net = vf.VATT(config)
    net.vocabulary = Vocabulary(["<pad>", "<unk>", *"abcdefg"])
    return net.eval()


def need(format):
    for name in ours._NEEDS if format == "onnx" else ():
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize(
    ("format", "modality", "config"), CASES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_tower_computes_what_the_model_computes(format, modality, config, tmp_path):
    need(format)
    net = model(config)
    (path,) = ours.export(net, tmp_path, format=format, modalities=[modality])
    assert path == tmp_path / f"{modality}.{format}"
    assert (tmp_path / "vocabulary.txt").exists() == (modality == "text")
    if format == "pt2":  # nothing of ours is needed to run it
        graph = torch.export.load(path).graph
        assert "vatt_fast" not in {getattr(n.target, "namespace", "") for n in graph.nodes}
    for batch in (1, 5):
        given = ours.Tower(net, modality).example(batch)
        run = ours._run_pt2 if format == "pt2" else ours._run_onnx
        found = run(path, given)
        with torch.no_grad():
            expected = net(**{modality: given})
        names = {f"z_{modality}_va", f"z_{modality}_vt"} - {"z_audio_vt", "z_text_va"}
        assert found.keys() == names | {f"{modality}_pooled"}
        for name in names:
            z = F.normalize(getattr(expected, name), dim=-1)
            torch.testing.assert_close(found[name], z, rtol=1e-3, atol=2e-4)


def test_the_command_writes_a_classifier_and_its_labels(tmp_path, capsys):
    torch.manual_seed(0)
    net = Classifier(ClassifierConfig(CONFIG, "audio", 3)).eval()
    net.labels = ["a", "b", "c"]
    net.save_pretrained(tmp_path / "classifier")
    folders = ["--model", str(tmp_path / "classifier"), "--out", str(tmp_path / "out")]
    main(["export", *folders, "--format", "pt2"])
    assert "equal to the model" in capsys.readouterr().out
    assert (tmp_path / "out" / "labels.txt").read_text().split() == net.labels
    clips = torch.rand(4, CONFIG.samples) - 0.5
    found = torch.export.load(tmp_path / "out" / "audio.pt2").module()(clips)
    torch.testing.assert_close(found["logits"], net(clips), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="has no video; it has audio"):
        ours.export(net, tmp_path, format="pt2", modalities=["video"])


def test_released_checkpoints_are_taken_fine_tuned_ones_too(tmp_path, capsys):
    """Their heads are published ones; what was assumed is said."""
    tower = vf.TowerConfig(depth=1, dim=512, mlp_dim=2048, num_heads=8)
    config = dataclasses.replace(
        vf.VATTConfig().with_recipe("released"), audio=tower, samples=512, audio_patch=64
    )
    torch.manual_seed(0)
    net = Classifier(ClassifierConfig(config, "audio", 3)).eval()
    prefix = tmp_path / "ckpt-9"
    write_bundle(prefix, arrays(fine_tuned_keys(config, net.state_dict())))
    with pytest.warns(UserWarning, match="8 heads of 64, as in published towers of this width"):
        main(["export", "--model", str(prefix), "--out", str(tmp_path), "--format", "pt2"])
    assert "audio.pt2" in capsys.readouterr().out
    clips = torch.rand(4, config.samples) - 0.5
    found = torch.export.load(tmp_path / "audio.pt2").module()(clips)
    torch.testing.assert_close(found["logits"], net(clips), rtol=1e-3, atol=1e-4)
    whole = Path(__file__).parents[1] / "support" / "tiny_ckpt_tx_fac" / "ckpt-1"
    with pytest.warns(UserWarning, match="as in the text tower"):
        (path,) = ours.export(whole, tmp_path, format="pt2", modalities=["audio"])
    expected = vf.create_model(whole, head_dim=8)
    audio = ours.Tower(expected, "audio").example(2)
    z = ours._run_pt2(path, audio)["z_audio_va"]
    assert z.shape == (2, expected.config.d_va)
    torch.testing.assert_close(z, expected.encode(audio=audio)["z_audio_va"], rtol=1e-3, atol=1e-4)


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    net = model(CONFIG)
    with pytest.raises(ValueError, match="format is 'onx'"):
        ours.export(net, tmp_path, format="onx")
    with pytest.raises(ValueError, match=r"the weights are torch\.bfloat16; export takes float32"):
        ours.export(model(CONFIG).bfloat16(), tmp_path, format="pt2")
    monkeypatch.setattr(ours, "_NEEDS", ("no_such_package",))
    with pytest.raises(ValueError, match=r"ONNX needs no_such_package: pip install"):
        ours.export(net, tmp_path)
    monkeypatch.setattr(ours, "_NEEDS", ())
    monkeypatch.setattr(ours, "_MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="an ONNX file holds 2; take pt2"):
        ours.export(net, tmp_path)
    monkeypatch.setattr(ours, "_run_pt2", lambda path, x: {
        "z_text_vt": torch.ones(3, 64), "text_pooled": torch.ones(3, 32)})  # fmt: skip
    with pytest.raises(ValueError, match=r"text\.pt2 computes another z_text_vt"):
        ours.export(net, tmp_path, format="pt2", modalities=["text"])
    assert not list(tmp_path.iterdir())
