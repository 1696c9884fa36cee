"""``embed``, ``retrieve`` and evaluation during a run take every source that ``pretrain`` takes."""

import json
import tarfile

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("tyro")

from media_files import noise, numbered
from small_model import small_model

from vatt_fast.cli import main
from vatt_fast.data.clips import ClipSpec
from vatt_fast.data.index import build_index
from vatt_fast.data.listing import Wanted, list_source
from vatt_fast.data.media import MediaReader
from vatt_fast.data.media_writer import write_clip
from vatt_fast.data.source import Source
from vatt_fast.data.sources import open_source
from vatt_fast.evaluation.embed import embed_folder
from vatt_fast.evaluation.search import measure, read_folder
from vatt_fast.training.evaluate import evaluate
from vatt_fast.training.loop import PretrainConfig, pretrain

SECONDS = 3.0
# of each, 1.6 s fit; a caption in the first second and one in the last
SAID = {name: [(0.0, 0.5, f"a {word}"), (2.5, 3.0, "the dog")] for name, word in
        (("0.mp4", "red star"), ("1.mp4", "blue ring"), ("2.mp4", "dog"))}  # fmt: skip
MIDDLE, FIRST_HALF, SECOND_HALF = 0.7, 0.1, 1.2  # where the middle windows of these begin


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "clips"
    folder.mkdir()
    for number, name in enumerate(SAID):
        frames = np.roll(numbered(round(SECONDS * 10)), 7 * number, axis=2)
        write_clip(folder / name, frames, noise(SECONDS, 16000, seed=number))
    said = {
        name: [{"start": a, "end": b, "text": text} for a, b, text in each]
        for name, each in SAID.items()
    }
    (folder / "captions.json").write_text(json.dumps(said))
    below = {f"clips/{name}": each for name, each in said.items()}
    (folder.parent / "captions.json").write_text(json.dumps(below))
    return folder


def as_tars(clips, folder):
    folder.mkdir()
    said = json.loads((clips / "captions.json").read_text())
    for number, name in enumerate(SAID):
        text = folder / "text.json"
        text.write_text(json.dumps({"captions": said[name]}))
        with tarfile.open(folder / f"{number:02}.tar", "w") as tar:
            tar.add(clips / name, name)
            tar.add(text, name.replace("mp4", "json"))
        text.unlink()
    return folder


def make(kind, clips, folder):
    """What to name, and for each clip of it: its name, its file, where its middle window begins."""
    whole = [(name, name, MIDDLE) for name in SAID]
    in_tars = [(f"{number:02}.tar/{name}", name, MIDDLE) for number, name in enumerate(SAID)]
    if kind == "folder":
        return str(clips), whole
    if kind == "below":
        return f"{clips.parent}/**", [(f"clips/{name}", name, at) for name, _, at in whole]
    if kind == "manifest":
        rows = [f"clips/0.mp4,0,1.8,a red star\nclips/0.mp4,1.0,3.0,the dog\nclips/{n},,,dog"
                for n in ("1.mp4",)]  # fmt: skip
        path = clips.parent / "list.csv"
        path.write_text("path,start,end,text\n" + "\n".join(rows) + "\n")
        halves = [("0-1.8", FIRST_HALF), ("1-3", SECOND_HALF)]
        found = [(f"clips/0.mp4@{half}", "0.mp4", at) for half, at in halves]
        return str(path), [*found, ("clips/1.mp4", "1.mp4", MIDDLE)]
    if kind == "tars":
        return str(as_tars(clips, folder / "tars")) + "/*.tar", in_tars
    if kind == "index":
        tars = as_tars(clips, folder / "tars")
        build_index(list_source(Wanted(str(tars))), folder / "index")
        return str(folder / "index"), in_tars
    tars = as_tars(clips, folder / "tars")
    labelled = [*((f"{clips}/{n}", f, at) for n, f, at in whole),
                *((f"{tars}/{n}", f, at) for n, f, at in in_tars)]  # fmt: skip
    return f"{clips}:0.5,{tars}:0.5", labelled


KINDS = ["folder", "below", "manifest", "tars", "index", "mix"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_is_embedded_and_searched(kind, clips, tmp_path, capsys):
    data, expected = make(kind, clips, tmp_path)
    model = small_model()
    reader_arguments = ClipSpec.from_config(model.config).reader_arguments()
    found = embed_folder(model, data, tmp_path / "e.npz", batch_size=2)
    assert found.files == len(expected) and not found.skipped
    with np.load(tmp_path / "e.npz") as file:
        arrays = dict(file)
    assert arrays["files"].tolist() == [name for name, _, _ in expected]
    for row, (_, name, start) in enumerate(expected):
        with MediaReader(clips / name) as reader:
            clip = reader.clip(start=start, **reader_arguments)
        one = model.encode(video=clip.video[None], audio=clip.audio[None])
        for key in ("z_video_vt", "z_audio_va"):
            np.testing.assert_allclose(arrays[key][row], one[key][0].numpy(), atol=2e-5)
    # four windows reach both ends of a clip, so every caption lies in one
    embedded = read_folder(model, data)
    assert embedded.files == arrays["files"].tolist()
    source = open_source(data)
    captions = sum(len(source.captions(number).texts) for number in range(len(source)))
    measured = measure(model, data, embedded)
    assert captions and measured["text_to_video"]["queries"] == captions
    assert "left_out" not in measured
    told = evaluate(model, data, source)
    assert {f"text_to_video_{n}": v for n, v in measured["text_to_video"].items() if n != "queries"
            }.items() <= told.items()  # fmt: skip
    model.save_pretrained(tmp_path / "run")
    main(["retrieve", "--model", str(tmp_path / "run"), "--data", data, "--text", "dog",
          "--top", "1"])  # fmt: skip
    said = capsys.readouterr().out
    assert any(name in said for name, _, _ in expected)


def test_captions_of_a_segment_stay_with_it(clips, tmp_path):
    """The captions of two segments of one file are asked for apart, each finds its own."""
    data, _ = make("manifest", clips, tmp_path)
    source = open_source(data)
    assert [list(source.captions(number).texts) for number in range(3)] == [
        ["a red star"], ["the dog"], ["dog"],
    ]  # fmt: skip


def test_queries_name_clips_as_the_source_does(clips, tmp_path):
    data, _ = make("below", clips, tmp_path)
    path = clips.parent / "queries.json"
    path.write_text(json.dumps({"clips/1.mp4": "a ring", "1.mp4": "a dog"}))
    try:
        measured = measure(small_model(), data, read_folder(small_model(), data))
    finally:
        path.unlink()
    assert measured["text_to_video"]["queries"] == 1
    assert measured["left_out"] == {"names in queries.json of no file": ["1.mp4"]}


def test_a_changed_shard_is_embedded_anew(clips, tmp_path, monkeypatch):
    """A killed ``embed`` goes on only where nothing that its source holds has changed."""
    data, _ = make("tars", clips, tmp_path)
    from vatt_fast.evaluation import embed

    join = embed._join
    monkeypatch.setattr(embed, "_join", lambda parts, out: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        embed_folder(small_model(), data, tmp_path / "e.npz", batch_size=2)
    monkeypatch.setattr(embed, "_join", join)
    shard = tmp_path / "tars" / "01.tar"
    shard.touch()
    assert not embed_folder(small_model(), data, tmp_path / "e.npz", batch_size=2).continued


def test_a_run_opens_its_sources_once(clips, tmp_path, monkeypatch):
    """Shards to train on and a mix to evaluate on; words are counted once, in what is trained on.

    The contact sheet shows clips of each source.
    """
    from vatt_fast.data import columns
    from vatt_fast.training import loop

    mix, names = make("mix", clips, tmp_path)
    opened, counted = [], []
    monkeypatch.setattr(loop, "open_source", lambda data, **options: opened.append(data)
                        or open_source(data, **options))  # fmt: skip
    count = columns.ColumnSource.word_counts
    monkeypatch.setattr(
        columns.ColumnSource, "word_counts", lambda self: counted.append(self.label) or count(self)
    )
    run = PretrainConfig(
        data=mix, out=str(tmp_path / "out"), preset="tiny", steps=2, batch_size=4, warmup_steps=1,
        workers=0, eval_data=str(tmp_path / "tars"), eval_every=1, augment="none", log_every=1,
        loggers="none",
    )  # fmt: skip
    torch.manual_seed(0)
    pretrain(run, progress=False)
    assert sorted(opened) == sorted([mix, str(tmp_path / "tars")])
    assert sorted(counted) == sorted([str(clips), str(tmp_path / "tars")])
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").open()]
    assert [line["step"] for line in lines if "text_to_video_r1" in line] == [1, 2]
    page = (tmp_path / "out/report.html").read_text()
    assert all(name in page for name, _, _ in names)


def test_a_source_of_ones_own(clips):
    """``embed`` and ``retrieve`` in Python take whatever has a source's methods."""
    source = open_source(clips)
    assert isinstance(source, Source)
    found = read_folder(small_model(), source)
    assert measure(small_model(), source, found)["text_to_video"]["queries"] == 6
