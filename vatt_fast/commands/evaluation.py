"""The verbs that use a trained model: embed, retrieve, evaluate, probe, figures."""

import sys
from json import dumps  # ``json`` is an option of the verbs
from pathlib import Path
from typing import Any, Literal

from .. import VATT, create_model
from ..devices import pick_device
from ..encoding import Protocol, embed_sentences, encode
from ..evaluation.classify import evaluate, write_evaluation
from ..evaluation.embed import checked_output, computed_with, embed_folder, model_digest
from ..evaluation.figures import PAGE, FiguresConfig, figures
from ..evaluation.page import Answer, answers_of, write_page
from ..evaluation.probing import ProbeConfig, probe
from ..evaluation.queries import read_queries
from ..evaluation.search import (
    WINDOWS,
    best_clips,
    directions,
    queries_digest,
    read_folder,
    require_known_words,
    results_of,
)
from ..files import check_folder
from ..training.distributed import joined, speaks
from .printing import print_report, unreadable

_A_DAY = 24 * 3600  # seconds: ranks share files, which may take one of them much longer


def embed(
    model: str,
    data: str,
    out: str,
    batch_size: int = 32,
    windows: int = 1,
    pooled: bool = False,
    features: bool = False,
    device: str = "auto",
) -> None:
    """Embed every clip into an .npz file; continues where it was killed.

    Args:
        model: saved model or run folder.
        data: folder of media files, or whatever pretrain takes; captions add text embeddings.
        out: .npz to write: files (N,), z_video_va and z_audio_va (N, d_va), z_video_vt (N, d_vt),
            z_text_vt (N, P, d_vt), of unit norm. They belong to the window in a file's middle and
            its P nearest sentences; rows of a missing stream or sentence are nan.
        batch_size: files at a time, and between two points where a killed run continues.
        windows: windows spread evenly over each file, whose embeddings are averaged; 1 is the
            middle.
        pooled: add the towers' pooled outputs: video_pooled (N, dim) and so on.
        features: add the features of all tokens: video_features (N, tokens, dim) and so on.
        device: torch device; auto takes a GPU where there is one.
    """
    path = checked_output(out)  # before the seconds that the model takes
    with joined(device, _A_DAY) as ranks:
        done = embed_folder(
            _trained(model, ranks.device),
            data,
            path,
            batch_size=batch_size,
            windows=windows,
            pooled=pooled,
            features=features,
            ranks=ranks,
        )
    continued = ", continued" if done.continued else ""
    if speaks():
        print(f"{done.files} clips embedded into {done.path}{continued}{unreadable(done.skipped)}")


def _trained(model: str, device: str) -> VATT:
    net = create_model(model).to(pick_device(device))
    if net.vocabulary is None:
        raise ValueError(
            "this model has no vocabulary.txt; give the folder of a finished or running pretrain, "
            "or of convert --words"
        )
    return net


def retrieve(
    model: str,
    data: str,
    text: tuple[str, ...] = (),
    audio: str | None = None,
    annotations: str | None = None,
    split: str | None = None,
    protocol: Protocol = "paper",
    top: int = 5,
    batch_size: int = 32,
    windows: int = WINDOWS,
    html: str | None = None,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Find clips by sentences or by a sound.

    Without either, measure retrieval on the clips: text to video, audio to video, and back.

    Args:
        model: saved model or run folder.
        data: folder of media files, or whatever pretrain takes. The measurement asks with the
            captions, or with the folder's queries.json, {name: sentence}, where that is there.
        text: sentences to look for.
        audio: media file whose sound to look for.
        annotations: measure by this file: MSR-VTT's JSON or its table of 1000 pairs, YouCook2's
            JSON. The data are then its videos, named by their ids.
        split: of the annotations: train, val or test; by default test, of YouCook2 val.
        protocol: paper: the mean of the windows' raw embeddings, then of unit norm. cosines: the
            mean of the windows' cosines.
        top: clips to list for each query.
        batch_size: files at a time.
        windows: windows spread evenly over each file.
        html: a page to write, with queries and their clips to play.
        device: torch device; auto takes a GPU where there is one.
        json: print JSON, of a measurement with its settings.
    """
    if top < 1:
        raise ValueError(f"top is {top}; at least 1 clip is listed")
    if annotations is not None and (text or audio is not None):
        raise ValueError("annotations hold the queries; leave --text and --audio out")
    if split is not None and annotations is None:
        raise ValueError(f"split {split!r} is one of a file of annotations; name it, or leave it")
    if html is not None and not Path(html).absolute().parent.is_dir():
        raise ValueError(f"{Path(html).absolute().parent} is no folder; write {html} elsewhere")
    queries = None if annotations is None else read_queries(annotations, data, split)
    asked = data if queries is None else queries.source
    sizes: dict[str, Any] = dict(windows=windows, batch_size=batch_size, protocol=protocol)
    with joined(device, _A_DAY) as ranks:
        net = _trained(model, ranks.device)
        require_known_words(net, text)
        sound = None if audio is None else encode(net, audio=audio, windows=windows)
        folder = read_folder(net, asked, ranks=ranks, **sizes)
    if not speaks():
        return
    if folder.skipped:
        print(f"vatt-fast: {unreadable(folder.skipped)[2:]}", file=sys.stderr)
    sections: dict[str, list[Answer]] = {}
    if not text and sound is None:
        ways, left_out = directions(net, data, folder, queries)
        found = results_of(ways, left_out)
        sections = {name: answers_of(way, top) for name, way in ways.items()} if html else {}
    else:
        found = {
            sentence: best_clips(vector, folder.video_vt, folder.files, top)
            for sentence, vector in zip(
                text, embed_sentences(net, text) if text else (), strict=True
            )
        }
        if text:
            sections["text_to_video"] = [_answer(sentence, found[sentence]) for sentence in text]
        if audio is not None and sound is not None:
            vector = sound["z_audio_va"].numpy()[0]
            found[audio] = best_clips(vector, folder.video_va, folder.files, top)
            sections["audio_to_video"] = [_answer(audio, found[audio])]
    if html is not None:
        plural = "window" if windows == 1 else "windows"
        about = f"{model} on {annotations or data}: {windows} {plural} a clip, protocol {protocol}."
        write_page(html, folder.source, sections, found, about)
        print(f"vatt-fast: {html} shows the clips", file=sys.stderr)
    if json and not text and sound is None:
        found["settings"] = {
            "model": model,
            "model_sha256": model_digest(net),
            "data": data,
            "annotations": annotations,
            "split": split,
            "protocol": protocol,
            "windows": windows,
            "batch_size": batch_size,
            "clips": folder.source.identity,
            "queries_sha256": queries_digest(ways),
            **computed_with(net),
        }
    print_report(found, json)


def _answer(asked: str, hits: dict[str, float]) -> Answer:
    return Answer(asked, tuple((name, similarity, False) for name, similarity in hits.items()))


def evaluate_classifier(
    model: str,
    data: str,
    out: str | None = None,
    media: str | None = None,
    split: str | None = None,
    fold: int = 1,
    skip_missing: bool = False,
    windows: int | None = None,
    crops: int | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    frames_per_second: float | None = None,
    samples: int | None = None,
    sample_rate_hz: int | None = None,
    batch_size: int = 4,
    precision: Literal["auto", "bf16", "fp32"] = "fp32",
    workers: int = 2,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Measure a fine-tuned classifier: top-1 and top-5, or mAP, AUC and d', and each class.

    Under torchrun the files are divided among its processes.

    Args:
        model: folder that finetune wrote, or convert --labels of a fine-tuned checkpoint.
        data: labelled media, as finetune's --data.
        out: folder for result.json, classes.csv, scores.npz, confusion.csv and confusion.png.
        media: folder of the media that a file of labels names.
        split: of the data; by default test, else val. Where the data name none, or train alone,
            what the model was trained on is left out, unless this is train.
        fold: of UCF101 and HMDB51 the split, of ESC-50 the fold that is the test.
        skip_missing: leave out media that are named and not there.
        windows: spread evenly over each file; by default 4, of pictures 1. Logits are averaged.
        crops: of each window, along the picture's longer side; by default 3, of pictures 1.
        frames: of a window, where it is not the model's; so the next five.
        batch_size: files whose views go through the model together.
        workers: threads that read ahead.
        device: torch device; auto takes a GPU where there is one.
        json: print JSON.
    """
    if out is not None:
        check_folder(Path(out))  # before the work
    sizes: dict[str, Any] = dict(frames=frames, height=height, width=width)
    sizes |= dict(frames_per_second=frames_per_second, samples=samples)
    sizes |= dict(sample_rate_hz=sample_rate_hz)
    with joined(device, _A_DAY) as ranks:
        found = evaluate(
            model, data, media=media, split=split, fold=fold, skip_missing=skip_missing,
            windows=windows, crops=crops, batch_size=batch_size, precision=precision,
            workers=workers, device=ranks.device, ranks=ranks, **sizes,
        )  # fmt: skip
    if not speaks():
        return
    if found.predictions.skipped:
        print(f"vatt-fast: {unreadable(found.predictions.skipped)[2:]}", file=sys.stderr)
    if out is not None:
        for left_out in write_evaluation(found, out):
            print(f"vatt-fast: {left_out}", file=sys.stderr)
    if count := found.result["settings"]["trained_on"]:
        print(f"vatt-fast: the model was trained on {count} of these examples", file=sys.stderr)
    if json:
        print(dumps(found.result))
        return
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.result.items()}
    settings = found.result["settings"]
    shown["split"] = settings["split"] or "none named"
    shown["left out as trained on"] = settings["left_out_as_trained"]
    print_report({k: v for k, v in shown.items() if k not in ("settings", "skipped")}, False)
    if out is not None:
        print(f"written: {out}")


def run_probe(config: ProbeConfig) -> None:
    """Fit linear classifiers to a model's frozen features of labelled media, and measure them."""
    found = probe(config)
    if found["skipped"]:
        print(f"vatt-fast: {unreadable(found['skipped'])[2:]}", file=sys.stderr)
    hidden = ("settings", "skipped")
    print_report({name: value for name, value in found.items() if name not in hidden}, False)
    print(f"written: {config.out}")


def draw_figures(config: FiguresConfig) -> None:
    """Draw what a model makes of clips: features by class, spaces by modality, activations."""
    for one in figures(config):
        print(f"{Path(config.out) / one.file}: {one.title}. {one.said}")
    print(f"page: {Path(config.out) / PAGE}")
