"""``embed`` and ``retrieve``: outputs whole or absent, kills continued, omissions said."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("tyro")

from media_files import noise, numbered
from small_model import small_model
from torchrun import environment, free_port, pid_of
from tried import tried

from vatt_fast.cli import main
from vatt_fast.data.clips import ClipSpec
from vatt_fast.data.loader import evaluation_clips
from vatt_fast.data.media_writer import write_clip
from vatt_fast.encoding import embed_batches
from vatt_fast.evaluation import embed as embed_module
from vatt_fast.evaluation.embed import embed_folder

OUTPUT = "outputs that cannot be"
KILLED = "embed, killed"
ASKED = "what retrieve asks"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "run"
    small_model().save_pretrained(folder)
    return folder


@pytest.fixture
def clips(tmp_path):
    return make(tmp_path / "clips", 5)


def make(folder, count, seconds=2.0):
    folder.mkdir()
    captions = {}
    for number in range(count):
        frames = np.roll(numbered(round(seconds * 10)), number, axis=2)
        write_clip(folder / f"{number}.mp4", frames, noise(seconds, 16000, seed=number))
        captions[f"{number}.mp4"] = [{"start": 0, "end": seconds, "text": "a red star"}]
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def embed(run, clips, out, *options):
    main(["embed", "--model", str(run), "--data", str(clips), "--out", str(out), *options])
    with np.load(out) as file:
        return {name: file[name] for name in file.files}


def failing(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    errors = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return errors


def test_embed_is_embed_batches(run, clips, tmp_path, capsys):
    (clips / "2.mp4").write_bytes(b"nothing")
    found = embed(run, clips, tmp_path / "e.npz", "--batch-size", "2", "--pooled", "--features")
    assert "4 clips embedded into" in (said := capsys.readouterr().out) and "2.mp4" in said
    model = small_model()
    batches = evaluation_clips(
        clips, ClipSpec.from_config(model.config), vocabulary=model.vocabulary
    )
    expected, files = embed_batches(model, batches, pooled=True)
    assert found.pop("files").tolist() == files == ["0.mp4", "1.mp4", "3.mp4", "4.mp4"]
    tokens = {name: found.pop(f"{name}_features") for name in ("video", "audio", "text")}
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=2e-5, err_msg=name)
    for name in ("video", "audio"):
        np.testing.assert_allclose(tokens[name][:, 0], found[f"{name}_pooled"], atol=2e-5)
    assert tokens["text"].shape[:2] == (4, 5)
    np.testing.assert_allclose(tokens["text"][:, :, 0], found["text_pooled"], atol=2e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "e.npz"]


def test_embed_of_several_windows(run, clips, tmp_path, capsys):
    found = embed(run, clips, tmp_path / "e.npz", "--windows", "3", "--device", "cpu")
    assert found["z_video_vt"].shape[0] == 5 and found["z_text_vt"].shape[:2] == (5, 5)
    model = small_model()
    out = model.encode(video=[clips / f"{n}.mp4" for n in range(5)], windows=3)["z_video_vt"]
    np.testing.assert_allclose(found["z_video_vt"], out, atol=2e-5)
    errors = failing(capsys, "embed", "--model", run, "--data", clips, "--out", tmp_path / "f.npz",
                     "--windows", 3, "--features")  # fmt: skip
    assert errors == [
        "vatt-fast: features belong to one window; leave windows at 1, or features out"
    ]


@tried(OUTPUT, "no such folder, a folder, a folder without rights", "one line before the work")
@pytest.mark.parametrize("how", ["missing", "folder", "rights"])
def test_outputs_are_checked_first(run, clips, tmp_path, capsys, monkeypatch, how):
    monkeypatch.setattr(embed_module, "embed_batch", None)  # no work is begun
    out = tmp_path / ("nowhere/e.npz" if how == "missing" else "e.npz")
    if how == "folder":
        out.mkdir()
    if how == "rights":

        def refuse(self, *arguments, **options):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr("pathlib.Path.touch", refuse)  # root may write everywhere
    (error,) = failing(capsys, "embed", "--model", run, "--data", clips, "--out", out)
    assert str(out.parent if how == "missing" else out) in error
    assert not list(tmp_path.glob("*.parts"))


@tried(OUTPUT, "the disk fills up during embed", "one line, no file; the next call goes on")
def test_a_full_disk(run, clips, tmp_path, capsys, monkeypatch):
    original, calls = np.savez, []

    def full(file, **arrays):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(file, **arrays)

    monkeypatch.setattr(embed_module.np, "savez", full)
    out = tmp_path / "e.npz"
    (error,) = failing(
        capsys, "embed", "--model", run, "--data", clips, "--out", out, "--batch-size", 2
    )
    assert "No space left on device" in error and not out.exists()
    embed(run, clips, out, "--batch-size", "2")
    assert "5 clips embedded" in (said := capsys.readouterr().out) and "continued" in said
    assert len(calls) == 4  # the first of three was there


@tried(KILLED, "kill -9 amid two runs, then one to the end", "the same file")
def test_kills_are_continued(run, tmp_path):
    clips = make(tmp_path / "clips", 12)
    command = [sys.executable, "-m", "vatt_fast.cli", "embed", "--model", run, "--data", clips]
    command += ["--out", tmp_path / "killed.npz", "--batch-size", "1"]
    parts = tmp_path / "killed.npz.parts"
    for number in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wanted = 2 * number + 2
        while process.poll() is None and len(list(parts.glob("*.npz"))) < wanted:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed.npz").exists()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "12 clips embedded" in done.stdout and "continued" in done.stdout
    whole = embed(run, clips, tmp_path / "whole.npz", "--batch-size", "1")
    with np.load(tmp_path / "killed.npz") as file:
        assert set(file.files) == set(whole)
        for name in file.files:
            np.testing.assert_array_equal(file[name], whole[name])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clips", "killed.npz", "whole.npz"]


@tried(KILLED, "Ctrl-C", "one line that says so, status 130")
def test_an_interruption_is_said(run, clips, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(embed_module, "embed_batch", interrupted)
    with pytest.raises(SystemExit) as stop:
        embed(run, clips, tmp_path / "e.npz")
    assert stop.value.code == 130 and not (tmp_path / "e.npz").exists()
    assert capsys.readouterr().err.splitlines() == ["vatt-fast: interrupted"]


@tried(KILLED, "another model, a changed file, other settings after a kill", "begun anew")
@pytest.mark.parametrize("change", ["model", "file", "settings"])
def test_parts_of_another_work_are_not_used(clips, tmp_path, monkeypatch, change):
    model = small_model()

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embed_module, "_join", killed)
        with pytest.raises(KeyboardInterrupt):
            embed_folder(model, clips, tmp_path / "e.npz", batch_size=2)
    options = {"batch_size": 2}
    if change == "model":
        model.video_tokens.agg.data += 1
    elif change == "file":
        os.utime(clips / "1.mp4", ns=(1, 1))
    else:
        options["pooled"] = True
    assert not embed_folder(model, clips, tmp_path / "e.npz", **options).continued


@tried(KILLED, "a folder of corrupt files; a whole batch of them", "one line, no file; listed")
def test_corrupt_files(run, clips, tmp_path, capsys):
    for number in (0, 1):
        (clips / f"{number}.mp4").write_bytes(b"no")
    with pytest.warns(UserWarning, match="whole batch"):
        found = embed(run, clips, tmp_path / "e.npz", "--batch-size", "2")
    assert found["files"].tolist() == ["2.mp4", "3.mp4", "4.mp4"]
    assert "skipped 2 unreadable: 0.mp4, 1.mp4" in capsys.readouterr().out
    for number in range(2, 5):
        (clips / f"{number}.mp4").write_bytes(b"no")
    with pytest.warns(UserWarning, match="whole batch"):
        errors = failing(capsys, "embed", "--model", run, "--data", clips, "--out",
                         tmp_path / "f.npz")  # fmt: skip
    assert "none of the 5 files" in errors[-1]
    assert not (tmp_path / "f.npz").exists()


@tried(ASKED, "--text of unknown words", "one line before the work")
def test_unknown_queries(run, clips, capsys, monkeypatch):
    monkeypatch.setattr("vatt_fast.commands.evaluation.read_folder", None)
    for text in ("xyzzy plugh", "..."):
        (error,) = failing(
            capsys, "retrieve", "--model", run, "--data", clips, "--text", "a dog", text
        )
        assert f"the model knows no word of {text!r}" in error


@tried(ASKED, "--top 0, --windows 0, --device nowhere", "one line")
@pytest.mark.parametrize(
    ("options", "message"),
    [(("--top", 0), "top is 0"), (("--windows", 0), "windows is 0"), (("--device", "x"), "'x'")],
)
def test_bad_options_of_retrieve(run, clips, capsys, options, message):
    (error,) = failing(
        capsys, "retrieve", "--model", run, "--data", clips, "--text", "dog", *options
    )
    assert message in error


def measured(run, clips, capsys, *options):
    capsys.readouterr()
    main(["retrieve", "--model", str(run), "--data", str(clips), "--json", *options])
    return json.loads(capsys.readouterr().out)


@tried(ASKED, "captions without words, far from every window, of an unreadable file", "counted")
def test_captions_that_cannot_be_asked(run, tmp_path, capsys):
    clips = make(tmp_path / "clips", 2, seconds=24.0)
    (clips / "broken.mp4").write_bytes(b"no")
    said = [(0.1, "a red star"), (4.0, "a dog"), (8.0, "a ring"), (0.4, "..."), (23.9, "star")]
    entries = [{"start": t, "end": t + 0.05, "text": text} for t, text in said]
    (clips / "captions.json").write_text(json.dumps({"0.mp4": entries, "broken.mp4": entries}))
    found = measured(run, clips, capsys)
    # windows of 1.6 s at 0, 7.5, 14.9 and 22.4 s
    assert found["text_to_video"]["queries"] == 3
    assert found["left_out"] == {
        "unreadable files": ["broken.mp4"],
        "captions outside the windows embedded": 1,
        "sentences without words": 1,
    }
    assert found["audio_to_video"]["queries"] == 2


@tried(ASKED, "names in queries.json of no file, of a skipped one, in another form", "said; found")
def test_queries_that_misname(run, clips, capsys):
    (clips / "4.mp4").write_bytes(b"no")
    (clips / "cafe\u0301.mp4").write_bytes((clips / "1.mp4").read_bytes())
    queries = {"0.mp4": "a dog", "1.MP4": "a ring", "nine.mp4": "a star", "4.mp4": "red"}
    queries["caf\u00e9.mp4"] = "blue"
    (clips / "queries.json").write_text("\ufeff" + json.dumps(queries), encoding="utf-8")
    found = measured(run, clips, capsys)
    assert found["text_to_video"]["queries"] == 2
    assert found["left_out"] == {
        "unreadable files": ["4.mp4"],
        "names in queries.json of no file": ["1.MP4", "nine.mp4"],
    }
    (clips / "queries.json").write_text('["a dog"]')
    (error, *_) = failing(capsys, "retrieve", "--model", run, "--data", clips)[-1:]
    assert "queries.json is no object of {file: sentence}" in error


def test_retrieval_is_of_four_windows(run, tmp_path, capsys):
    clips = make(tmp_path / "clips", 3, seconds=6.0)
    main(["retrieve", "--model", str(run), "--data", str(clips), "--text", "dog", "--json"])
    hits = json.loads(capsys.readouterr().out)["dog"]
    model = small_model()
    query = model.encode(text="dog")["z_text_vt"][0]
    for name, similarity in hits.items():
        clip = model.encode(video=clips / name, windows=4)["z_video_vt"][0]
        assert similarity == pytest.approx(float(query @ clip), abs=1e-3)


@tried("names", "a name that is not UTF-8 printed to a strict terminal", "printed, escaped")
def test_a_name_never_ends_a_command(run, clips):
    os.replace(clips / "1.mp4", os.fsencode(clips) + b"/caf\xe9.mp4")
    (clips / "captions.json").unlink()
    process = subprocess.run(
        [sys.executable, "-m", "vatt_fast.cli", "retrieve", "--model", run, "--data", clips,
         "--text", "dog"],
        capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert rb"caf\udce9.mp4" in process.stdout


# -- on several processes --------------------------------------------------------------------------


def torchrun(world: int, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    command += ["--master-port", str(free_port()), "-m", "vatt_fast.cli", *map(str, arguments)]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=environment(), start_new_session=True, **streams)


def test_processes_divide_the_files(run, tmp_path, capsys):
    """Killed, continued by one process more, and in the end what one process writes."""
    clips = make(tmp_path / "clips", 9)
    (clips / "4.mp4").write_bytes(b"not a video")
    options = ["--model", run, "--data", clips, "--out", tmp_path / "divided.npz"]
    options += ["--batch-size", "2", "--windows", "2", "--device", "cpu"]
    parts = tmp_path / "divided.npz.parts"
    process = torchrun(1, "embed", *options)
    while process.poll() is None and not list(parts.glob("*.npz")):
        time.sleep(0.005)
    pid = pid_of(process.pid, 0)
    os.killpg(process.pid, signal.SIGKILL)
    if pid is not None:
        os.killpg(pid, signal.SIGKILL)
    process.communicate()
    assert 1 <= len(list(parts.glob("*.npz"))) < 5
    process = torchrun(2, "embed", *options)
    told, errors = process.communicate()
    assert process.returncode == 0, errors
    assert told.count("8 clips embedded") == 1 and "continued" in told and "4.mp4" in told
    whole = embed(run, clips, tmp_path / "whole.npz", *options[6:])
    with np.load(tmp_path / "divided.npz") as file:
        assert set(file.files) == set(whole)
        for name in file.files:
            np.testing.assert_array_equal(file[name], whole[name])
    assert not parts.exists()
    capsys.readouterr()
    asked = ["--model", run, "--data", clips, "--batch-size", "2", "--json"]
    process = torchrun(2, "retrieve", *asked)
    told, errors = process.communicate()
    assert process.returncode == 0, errors
    main(["retrieve", *map(str, asked)])
    assert json.loads(told) == json.loads(capsys.readouterr().out)
