"""Retrieval by the annotation files of MSR-VTT and YouCook2, both protocols, and the page."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("tyro")

from media_files import noise, numbered
from small_model import small_model

from vatt_fast.cli import main
from vatt_fast.data.clips import ClipSpec
from vatt_fast.data.media import MediaReader
from vatt_fast.data.media_writer import write_clip
from vatt_fast.evaluation.queries import read_queries
from vatt_fast.evaluation.retrieval import retrieval_metrics

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SAID = ["a red star", "a blue ring", "the dog"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "run"
    small_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """video7.mp4 and so on, one of them in a folder below, 4 s each."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more videos").mkdir()
    for i, name in enumerate(("video7", "more videos/video8", "video 9 é")):
        frames = np.roll(numbered(40), 9 * i, axis=2)
        write_clip(folder / f"{name}.mp4", frames, noise(4.0, 16000, seed=i))
    return folder


VA = ("z_video_va", "z_audio_va")
NAMES = ("video7", "video8", "video 9 é")


def msrvtt(path):
    videos = [{"video_id": name, "split": "test"} for name in (*NAMES, "video99")]
    videos.append({"video_id": "video1", "split": "train"})
    sentences = [
        {"caption": said, "video_id": name}
        for name, said in zip((*NAMES, "video1", "video7"), (*SAID, "no", "red"), strict=True)
    ]
    sentences.append({"caption": "gone", "video_id": "video99"})
    path.write_text(json.dumps({"info": {}, "videos": videos, "sentences": sentences}))
    return path


def youcook2(path):
    def video(subset, *segments):
        annotations = [
            {"segment": segment, "id": i, "sentence": said}
            for i, (segment, said) in enumerate(segments)
        ]
        return {"duration": 4.0, "subset": subset, "annotations": annotations}

    database = {
        "video7": video("validation", ([0, 2], "a red star"), ([2, 4], "a blue star")),
        "video8": video("validation", ([1, 3], "a ring")),
        "video 9 é": video("training", ([0, 4], "the dog")),
    }
    path.write_text(json.dumps({"database": database}))
    return path


def test_msrvtt_as_published(videos, tmp_path):
    found = read_queries(msrvtt(tmp_path / "test_videodatainfo.json"), videos)
    assert found.missing == ("video99",)
    files = ("video7.mp4", "more videos/video8.mp4", "video 9 é.mp4")
    assert found.sentences == (
        ("video7.mp4", SAID[0]), ("video7.mp4", "red"), *zip(files[1:], SAID[1:], strict=True),
    )  # fmt: skip
    assert {found.source.name(i) for i in range(len(found.source))} == set(files)
    table = tmp_path / "MSRVTT_JSFUSION_test.csv"
    rows = [
        f"ret{i},msr{i},{name},{said}"
        for i, (name, said) in enumerate(zip(NAMES, SAID, strict=True))
    ]
    table.write_text("\n".join(["key,vid_key,video_id,sentence", *rows]), encoding="utf-8")
    assert read_queries(table, videos).sentences == tuple(zip(files, SAID, strict=True))


def test_youcook2_as_published(videos, tmp_path):
    found = read_queries(youcook2(tmp_path / "youcookii_annotations_trainval.json"), videos)
    names = ("video7.mp4@0-2", "video7.mp4@2-4", "more videos/video8.mp4@1-3")
    assert found.sentences == tuple(
        zip(names, ("a red star", "a blue star", "a ring"), strict=True)
    )
    segments = {found.source.name(i): found.source.segment(i) for i in range(len(found.source))}
    assert segments == dict(zip(names, ((0, 2), (2, 4), (1, 3)), strict=True))
    training = read_queries(tmp_path / "youcookii_annotations_trainval.json", videos, "train")
    assert training.sentences == (("video 9 é.mp4@0-4", "the dog"),)


def test_two_videos_with_one_id_are_named(videos, tmp_path):
    """A sound beside a video is none; nor does it matter where nobody asks."""
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    annotations = msrvtt(tmp_path / "a.json")
    for name in ("video7.wav", "video1.mp4", "more videos/video1.mp4"):
        (folder / name).touch()
    assert read_queries(annotations, folder).sentences[0] == ("video7.mp4", SAID[0])
    (folder / "more videos" / "video7.webm").touch()
    with pytest.raises(ValueError, match=r"names video7, .* more videos/video7.webm and video7"):
        read_queries(annotations, folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"other": 1}', "is neither MSR-VTT's annotation"),
        ("a.json", '{"videos": [], "sentences": []}', "no sentences of split val; it has none"),
        ("a.csv", "video_id,sentence\nvideo5,a\n", r"none of the 1 videos of .* \(video5"),
    ],
)
def test_bad_annotations(videos, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_queries(tmp_path / name, videos)


def measured(capsys, run, videos, *options):
    capsys.readouterr()
    main(["retrieve", "--model", str(run), "--data", str(videos), "--json", *map(str, options)])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("protocol", ["paper", "cosines"])
def test_measured_by_protocol_is_embedding_by_hand(run, videos, tmp_path, capsys, protocol):
    """Windows embedded one by one, their similarities written out."""
    annotations = msrvtt(tmp_path / "a.json")
    found = measured(
        capsys, run, videos, "--annotations", annotations, "--protocol", protocol, "--windows", 3
    )
    model = small_model()
    paths = [videos / f"{name}.mp4" for name in ("more videos/video8", "video 9 é", "video7")]
    spec, videos_of, sounds = ClipSpec.from_config(model.config), [], []
    for path in paths:
        with MediaReader(path) as reader:  # 4 s hold 25 places of 1.6 s
            clips = [
                reader.clip(start=first / 10, **spec.reader_arguments()) for first in (0, 12, 24)
            ]
        out = [model.encode(video=c.video, audio=c.audio) for c in clips]
        raw = [raw_embeddings(model, c) for c in clips]
        if protocol == "cosines":
            videos_of.append(np.mean([o["z_video_vt"][0].numpy() for o in out], 0))
            sounds.append([np.mean([o[n][0].numpy() for o in out], 0) for n in VA])
        else:
            videos_of.append(unit(np.mean([r["z_video_vt"] for r in raw], 0)))
            sounds.append([unit(np.mean([r[n] for r in raw], 0)) for n in VA])
    queries = np.stack(
        [model.encode(text=said)["z_text_vt"][0].numpy() for said in (SAID[0], "red", *SAID[1:])]
    )
    targets, truth = np.stack(videos_of), np.array([2, 2, 0, 1])
    expected = retrieval_metrics(queries, targets, truth)
    assert {**expected, "queries": 4} == pytest.approx(found["text_to_video"])
    back = retrieval_metrics(targets, queries, [[2], [3], [0, 1]])
    assert {**back, "queries": 3} == pytest.approx(found["video_to_text"])
    of_video, of_audio = (np.stack(each) for each in zip(*sounds, strict=True))
    own = np.arange(3)
    assert {**retrieval_metrics(of_audio, of_video, own), "queries": 3} == pytest.approx(
        found["audio_to_video"]
    )
    assert {**retrieval_metrics(of_video, of_audio, own), "queries": 3} == pytest.approx(
        found["video_to_audio"]
    )
    assert found["left_out"] == {"videos that are not there": ["video99"]}


def test_a_measurement_says_with_what_it_is_repeated(run, videos, tmp_path, capsys):
    """Another model, other queries and other windows are told from these."""
    options = ("--annotations", msrvtt(tmp_path / "a.json"), "--windows", 2)
    first = measured(capsys, run, videos, *options)["settings"]
    assert measured(capsys, run, videos, *options)["settings"] == first
    told = {name: first[name] for name in ("model", "data", "annotations", "windows", "protocol")}
    assert told == dict(model=str(run), data=str(videos), annotations=str(tmp_path / "a.json"),
                        windows=2, protocol="paper")  # fmt: skip
    assert first["versions"]["torch"] == torch.__version__ and first["device"]
    model = small_model()
    with torch.no_grad():
        model.video_tokens.agg[:5] += 1
    model.save_pretrained(tmp_path / "other")
    other = measured(capsys, tmp_path / "other", videos, *options)["settings"]
    assert {name for name in first if first[name] != other[name]} == {"model", "model_sha256"}
    less = measured(capsys, run, videos)["settings"]
    assert less["queries_sha256"] != first["queries_sha256"]


def raw_embeddings(model, clip):
    with torch.no_grad():
        out = model(
            video=torch.from_numpy(clip.video[None]), audio=torch.from_numpy(clip.audio)[None]
        )
    return {name: getattr(out, name)[0].numpy() for name in (*VA, "z_video_vt")}


def unit(x):
    return x / np.linalg.norm(x)


# -- the page --------------------------------------------------------------------------------------


class Strict(HTMLParser):
    """Well-formed; every address is a file beside the page."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.open, self.media, self.right, self.text = folder, [], [], 0, ""

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert len(given) == len(attributes)
        if "src" in given:
            path = unquote(given["src"].partition("#")[0])
            assert ":" not in path and not path.startswith("/")
            assert (self.folder / path).is_file(), path
            self.media.append((tag, given["src"]))
        self.right += given.get("class") == "right"
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(run, videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    annotations = youcook2(folder / "a.json")
    path = folder / "found.html"
    main(["retrieve", "--model", str(run), "--data", str(videos), "--annotations",
          str(annotations), "--top", "2", "--html", str(path), "--windows", "1"])  # fmt: skip
    return path


def test_the_page_holds_queries_and_clips(page):
    found = Strict(page.parent)
    text = page.read_text(encoding="utf-8")
    found.feed(text)
    found.close()
    assert not found.open and text.startswith("<!DOCTYPE html>")
    for part in ("Text to video", "Video to text", "Audio to video", "R@10", "“a blue star”"):
        assert part in found.text
    # three queries and two hits each; sounds and pictures that ask are played too
    tags = [tag for tag, _ in found.media]
    assert tags.count("video") == 6 + 3 + 6 + 3 and tags.count("audio") == 3 + 6
    assert sum(src.endswith("video7.mp4#t=2,4") for _, src in found.media) >= 2
    assert found.right >= 4  # of three clips two are shown


def test_sentences_of_ones_own_and_odd_names(run, videos, tmp_path):
    path = tmp_path / "own.html"
    main(["retrieve", "--model", str(run), "--data", str(videos), "--text", "a <red> & star",
          "--audio", str(videos / "video7.mp4"), "--html", str(path)])  # fmt: skip
    found = Strict(tmp_path)
    text = path.read_text(encoding="utf-8")
    found.feed(text)
    assert "“a <red> & star”" in found.text and 'class="rank"' not in text
    assert any("video%209%20%C3%A9.mp4" in src for _, src in found.media)


def test_a_browser_plays_the_page(page):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    script = (
        "<script>document.querySelectorAll('video,audio').forEach(m => m.addEventListener("
        "'loadeddata', () => m.setAttribute('data-ready', m.duration + ' ' + m.currentTime)));"
        "</script>"
    )
    copy = page.with_name("watched.html")
    text = page.read_text(encoding="utf-8").replace('preload="metadata"', 'preload="auto"')
    copy.write_text(text.replace("</body>", f"{script}</body>"), encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000",
         f"--user-data-dir={page.parent / 'browser'}", "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=120, env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ready = re.findall(r'data-ready="([\d.]+) ([\d.]+)"', done.stdout)
    assert len(ready) == len(re.findall("<(?:video|audio) ", done.stdout)) == 27
    assert all(3.9 < float(duration) < 4.2 for duration, _ in ready)
    assert {round(float(at)) for _, at in ready} == {0, 1, 2}  # where its segment begins
