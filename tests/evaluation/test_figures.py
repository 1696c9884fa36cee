"""The numbers behind the figures against plain loops; pictures are drawn and shown on a page."""

import dataclasses
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tyro")

from matplotlib.image import imread
from media_files import noise, numbered
from small_model import small_model

from vatt_fast import VATT, preset
from vatt_fast.cli import main
from vatt_fast.data.clips import ClipSpec
from vatt_fast.data.loader import evaluation_clips
from vatt_fast.data.media_writer import write_clip
from vatt_fast.evaluation import figures
from vatt_fast.evaluation.figure_data import collect, flat, separation, similarities, together

SAID = ("a red star", "blue", "the dog and the ring", "star")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Six clips; 4.mp4 has no sound, 5.wav no picture."""
    folder, captions = tmp_path_factory.mktemp("clips"), {}
    for i in range(5):
        sound = None if i == 4 else noise(2.0, 16000, seed=i)
        write_clip(folder / f"{i}.mp4", np.roll(numbered(20), 9 * i, 2), sound)
        captions[f"{i}.mp4"] = [{"start": 0, "end": 2, "text": SAID[i % 4]}]
    write_clip(folder / "5.wav", None, noise(2.0, 16000, seed=5))
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def agnostic():
    torch.manual_seed(1)
    tiny = preset("tiny")
    options = dict(kind="modality_agnostic", text=tiny.video, vocab_size=7)
    model = VATT(dataclasses.replace(tiny, **options)).eval()
    model.vocabulary = small_model().vocabulary
    return model


@torch.no_grad()
@pytest.mark.parametrize("make", [small_model, agnostic])
def test_collected_is_what_a_plain_pass_computes(clips, make):
    """Each clip alone, each block's MLP by hand."""
    model = make()
    spec = ClipSpec.from_config(model.config)

    def batches(size):
        return evaluation_clips(clips, spec, vocabulary=model.vocabulary, batch_size=size)

    found = collect(model, batches(4), 6)
    assert len(found.files) == 6
    sums = {name: 0.0 for name in ("video", "audio", "text")}
    counts = dict.fromkeys(sums, 0)
    for i, batch in enumerate(batches(1)):
        for name in sums:
            valid = bool(getattr(batch, f"{name}_valid").flatten()[0])
            assert np.isfinite(found.inputs[name][i]).all() == valid
            if not valid:
                continue
            x = getattr(batch, name)
            x = x[:, 0, : int((x[0, 0] != 0).sum())][:, None] if name == "text" else x
            out = model(**{name: x})
            space = {"audio": "z_audio_va", "text": "z_text_vt"}.get(name, "z_video_vt")
            z = torch.nn.functional.normalize(getattr(out, space).flatten(), dim=0)
            np.testing.assert_allclose(found.outputs[space][i], z, atol=2e-5)
            tokens = tokens_of(model, name, x)
            np.testing.assert_allclose(found.inputs[name][i], tokens[0, 1:].mean(0), atol=2e-5)
            trunk = model.trunk if model.config.agnostic else getattr(model, f"{name}_encoder")
            bias, rows = trunk._bias(tokens.shape[1]), []
            for block in trunk.blocks:
                after = block(tokens, bias, None, False)
                attended = tokens + block.out(
                    block._attend(block.attention_norm(tokens), bias, None, False)
                )
                hidden = torch.nn.functional.gelu(block.mlp_in(block.mlp_norm(attended)))
                rows.append(hidden[0].sum(0))
                tokens = after
            sums[name] = sums[name] + torch.stack(rows)
            counts[name] += tokens.shape[1]
    for name, total in sums.items():
        np.testing.assert_allclose(found.activations[name], total / counts[name], atol=2e-5)


def tokens_of(model, name, x):
    from vatt_fast.inputs import audio_input, video_input

    if name == "text":
        return model.text_tokens(x.flatten(0, -2).long())
    how = (video_input if name == "video" else audio_input)(model.config, x)
    return getattr(model, f"{name}_tokens")(x, how, None)


def test_similarities_and_how_far_apart_they_lie(clips):
    model = small_model()
    spec = ClipSpec.from_config(model.config)
    found = collect(model, evaluation_clips(clips, spec, vocabulary=model.vocabulary), 6)
    positive, negative = similarities(found, "S_va")
    assert len(positive) == 4 and len(negative) == 12  # clips with picture and sound
    a, v = found.outputs["z_audio_va"], found.outputs["z_video_va"]
    assert positive.tolist() == pytest.approx([float(a[i] @ v[i]) for i in range(4)])
    expected = [float(v[i] @ a[j]) for i in range(4) for j in range(4) if i != j]
    assert sorted(negative) == pytest.approx(sorted(expected))
    rng = np.random.default_rng(0)
    high, low = rng.integers(0, 9, 40), rng.integers(0, 7, 30)
    pairs = np.mean([(p > n) + (p == n) / 2 for p in high for n in low])
    assert separation(high, low) == pytest.approx(100 * pairs)


def test_points_of_several_modalities():
    parts = {"video": np.eye(3), "audio": np.full((2, 3), np.nan)}
    points, names = together(parts)
    assert points.shape == (3, 3) and names == ["video"] * 3
    assert together({"video": np.eye(3), "text": np.eye(4)}) is None
    with pytest.raises(ValueError, match="at least four"):
        flat(np.eye(3))
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 0.1, (20, 8)), rng.normal(3, 0.1, (20, 8))])
    y = flat(x)
    middles = y[:20].mean(0), y[20:].mean(0)
    near = [np.linalg.norm(y - middle, axis=1) for middle in middles]
    assert ((near[0] < near[1]) == (np.arange(40) < 20)).all()


def test_every_class_has_a_colour_and_shape_of_its_own(tmp_path):
    seen = set()
    for number in range(figures.MOST_CLASSES):
        marker = (number + number // len(figures.COLOURS)) % len(figures.MARKERS)
        seen.add((figures.COLOURS[number % len(figures.COLOURS)], figures.MARKERS[marker]))
    assert len(seen) == figures.MOST_CLASSES
    names = [f"class {i % 20}" for i in range(60)]
    points = np.random.default_rng(0).normal(size=(60, 2))
    figures.draw_points(points, names, tmp_path / "a.png", sorted(set(names)))
    assert has_colour(imread(tmp_path / "a.png"), figures.COLOURS[1])


def has_colour(picture, colour):
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    blended = 0.75 * rgb + 0.25
    near = [np.abs(picture[..., :3] - c).max(-1) < 0.06 for c in (rgb, blended)]
    return (near[0] | near[1]).sum() > 20


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.images, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "img":
            assert given["src"].startswith("data:image/png;base64,") and given["alt"]
            self.images.append(given["alt"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_command_draws_all_figures(clips, tmp_path, capsys):
    from labelled_media import write_labelled

    run, out = tmp_path / "run", tmp_path / "out"
    agnostic().save_pretrained(run)
    labels = write_labelled(tmp_path / "labels", each=3, splits=("test",))
    main(["figures", "--model", str(run), "--data", str(clips), "--out", str(out),
          "--labels", str(labels)])  # fmt: skip
    names = ("features_by_class", "similarity_S_va", "similarity_S_vt", "space_input",
             "space_S_va", "space_S_vt", "activations")  # fmt: skip
    said = capsys.readouterr().out
    for name in names:
        picture = imread(out / f"{name}.png")
        assert picture.std() > 0.02 and f"{name}.png" in said
    assert all(has_colour(imread(out / "space_input.png"), c) for c in figures.COLOURS[:3])
    page = Page()
    text = (out / "figures.html").read_text()
    page.feed(text)
    assert not page.open and len(page.images) == len(names) and "http" not in text
    assert "one trunk for all" in page.text
    numbers = json.loads((out / "figures.json").read_text())
    assert numbers["clips"] == 6 and 0 <= numbers["S_va"]["separation"] <= 100
    assert len(numbers["activations"]["text"]) == 3
    assert sorted(path.name for path in out.glob("*.png")) == sorted(figures._ALL)
    (out / "mine.png").touch()
    main(["figures", "--model", str(run), "--data", str(clips), "--out", str(out)])
    left = {path.name for path in out.glob("*.png")}
    assert left == {*figures._ALL, "mine.png"} - {"features_by_class.png"}


def test_labels_lie_elsewhere_and_classes_that_are_left_out_are_told(tmp_path, monkeypatch):
    from labelled_media import write_labelled

    media = write_labelled(tmp_path / "media", each=5, splits=("test",))
    rows = [f"{path.relative_to(media)},{path.parent.name}" for path in media.rglob("*.mp4")]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["file,class", *sorted(rows), "lost.mp4,red"]))
    config = figures.FiguresConfig("tiny", "", "", labels=str(table), media=str(media))
    with pytest.raises(ValueError, match=r"lost.mp4 .* is not there"):
        figures._draw_classes(config, small_model(), tmp_path)
    config = dataclasses.replace(config, skip_missing=True)
    drawn = figures._draw_classes(config, small_model(), tmp_path)
    assert drawn.said == "10 examples of split train, 2 classes; pooled output."
    monkeypatch.setattr(figures, "MOST_CLASSES", 1)
    drawn = figures._draw_classes(config, small_model(), tmp_path)
    assert drawn.said.startswith("5 examples of split train, 1 classes; pooled output. Left out: 1")


def test_bad_settings_and_too_few_clips(clips, tmp_path):
    config = figures.FiguresConfig("tiny", str(clips), str(tmp_path / "out"))
    for changes, message in (
        (dict(clips=3), "clips is 3; it must be at least 4"),
        (dict(modality="text"), "video or audio"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **changes)
    with pytest.raises(ValueError, match="at least two"):
        collect(small_model(), [], 6)
