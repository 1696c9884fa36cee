"""The ``vatt-fast`` command, one function a verb."""

import dataclasses
import importlib.metadata
import importlib.util
import io
import os
import platform
import sys
import textwrap
from collections.abc import Callable, Iterable
from json import dumps  # ``json`` is an option of the verbs
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from . import VATT, __version__, create_model
from .kernels import explain, native
from .kernels.cases import make
from .kernels.dispatch import native_bf16
from .kernels.ops import OPS
from .kernels.settings import requested

try:
    import tyro
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(
        f"the command line needs {error.name}: pip install 'vatt_fast[train]'"
    ) from error

# These need parts of the same extra, so they come after the message above. Every verb's options
# need most of them; all of them take 0.2 s of the 4 s to import torch.
from .checkpoints.convert import convert
from .config import VATTConfig
from .data.clips import ClipSpec
from .data.index import build_index, summary_of, warn_of_scripts
from .data.listing import list_source, parse
from .data.pack import Packing, clips_per_second, sample
from .data.pack import pack as write_shards
from .data.sources import open_source
from .demo.run import DemoConfig, run_demo
from .devices import pick_device
from .encoding import Protocol, embed_sentences, encode
from .evaluation.classify import evaluate, write_evaluation
from .evaluation.embed import checked_output, embed_folder
from .evaluation.figures import PAGE, FiguresConfig, figures
from .evaluation.page import Answer, answers_of, write_page
from .evaluation.probing import ProbeConfig, probe
from .evaluation.queries import read_queries
from .evaluation.search import (
    WINDOWS,
    best_clips,
    directions,
    read_folder,
    require_known_words,
    results_of,
)
from .files import check_folder
from .finetuning.loop import finetune
from .finetuning.settings import FineTuneConfig
from .on_jax.compile_tpu import CompileTPUConfig, compile_step, write_report
from .paper_tables import flops_table, format_tables, input_table, parameter_table
from .plan import PlanConfig, markdown, plan
from .training.distributed import joined, leave, speaks
from .training.loop import PretrainConfig, pretrain
from .training.metrics import NonFiniteError

_WIDTH = 100
_PACKING = Packing()
_A_DAY = 24 * 3600  # seconds: ranks share files, which may take one of them much longer
# what ``doctor`` asks about: a training step of base_base_small
_DOCTOR_CASES = {
    "attention": "video_bbs_drop50",
    "drop_token": "video_bbs_drop50",
    "contrastive_lse": "va_bbs",
    "patch_embed": "video_bbs_drop50",
}


def demo(config: DemoConfig) -> None:
    """Render a small world of clips, pre-train tiny on it, and print retrieval before and after."""
    summary = run_demo(config)
    print(f"report: {summary['report']}")
    print(dumps(summary))


def run_pretrain(config: PretrainConfig) -> None:
    """Pre-train on a folder of media with captions.json; continue an interrupted run.

    On several GPUs or hosts: torchrun --nproc-per-node 8 $(which vatt-fast) pretrain ...
    """
    pretrain(config)
    if speaks():
        print(f"trained model: {config.out}")


def index(
    source: Annotated[tuple[str, ...], tyro.conf.Positional],
    out: str | None = None,
    captions: str | None = None,
    media: str | None = None,
    workers: int | None = None,
    problems: bool = False,
    json: bool = False,
) -> None:
    """Index folders, manifests or tar shards, so that training on them starts at once.

    Killed and started again it goes on; when media have changed it reads only those.

    Args:
        source: a folder, folder/** for all below, a .csv, .tsv or .parquet of path, start, end and
            text, a folder of tars, shards/{000..099}.tar, a URL of such, or a .toml of several.
        out: folder of the index; by default it lies beside the data, where pretrain looks for it.
        captions: JSON or folder of captions by the media's names, as HowTo100M's caption.json; for
            clips without captions of their own.
        media: folder that a manifest's paths are relative to, instead of the manifest's.
        workers: processes; by default one a core.
        problems: list all that was left out, and why, instead of the first ten.
        json: print JSON.
    """
    if not source:
        raise ValueError("name a source: vatt-fast index clips")
    wanted = [each for text in source for each in parse(text)]
    if out is not None and len(wanted) > 1:
        raise ValueError(f"--out {out} has room for one index; leave it out, or name one source")
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    told = {}
    for each in wanted:
        listing = list_source(
            dataclasses.replace(each, captions=captions or each.captions, media=media or each.media)
        )
        folder = Path(out) if out is not None else listing.home
        if folder is None:
            raise ValueError(f"{each.text} is remote; name a folder for its index with --out")
        check_folder(folder)
        with tqdm(desc=each.text, unit="part", disable=json or None) as bar:

            def show(done: int, total: int, bar: Any = bar) -> None:
                bar.total, bar.n = total, done
                bar.refresh()

            built = build_index(listing, folder, workers=count, progress=show)
        told[str(folder)] = summary_of(built)
        if not json:
            warn_of_scripts(built)
            print(f"{folder}: {told[str(folder)].pop('line')}")
            left_out = list(built.problems.items())
            for name, reason in left_out if problems else left_out[:10]:
                print(f"  {name}: {reason}")
            if len(left_out) > 10 and not problems:
                print(f"  and {len(left_out) - 10} more; --problems lists them")
    if json:
        print(dumps(told))


def pack(
    source: Annotated[str, tyro.conf.Positional],
    out: str,
    packing: Annotated[Packing, tyro.conf.arg(name="")] = _PACKING,
    workers: int | None = None,
    problems: bool = False,
    json: bool = False,
) -> None:
    """Write a source into tar shards of small pictures with many key frames, and say what it saves.

    Killed and started again it goes on after the last whole shard.

    Args:
        source: as pretrain's --data.
        out: folder of the shards, which --data then names.
        workers: processes; by default one a core.
        problems: list all that was left out, and why, instead of the first ten.
        json: print JSON.
    """
    opened = open_source(source, index_folder=Path(out) / "source_index")
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    with tqdm(desc=source, unit="shard", disable=json or None) as bar:

        def show(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        done = write_shards(opened, out, packing, workers=count, progress=show)
    config = VATTConfig()
    window = ClipSpec.from_config(config).reader_arguments()
    report: dict[str, Any] = {
        "shards": done.shards,
        "clips": done.clips,
        "gigabytes": round(done.bytes / 1e9, 3),
        "gigabytes_before": round(done.source_bytes / 1e9, 3),
    }
    if pairs := sample(opened, out):
        before, after = clips_per_second(pairs, window)
        report |= {
            "clips_per_second_a_core": round(after, 1),
            "clips_per_second_a_core_before": round(before, 1),
            "measured_on_clips": len(pairs),
        }
    left_out = done.problems
    if json:
        print(dumps({**report, "left_out": left_out}))
        return
    _print(report, False)
    print(f"left_out: {len(left_out)}")
    for name, reason in list(left_out.items())[: None if problems else 10]:
        print(f"  {name}: {reason}")
    if len(left_out) > 10 and not problems:
        print(f"  and {len(left_out) - 10} more; --problems lists them")


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
        print(f"{done.files} clips embedded into {done.path}{continued}{_skipped(done.skipped)}")


def _skipped(files: Iterable[str]) -> str:
    names = list(files)
    listed = ", ".join(names[:5])
    return f"; skipped {len(names)} unreadable: {listed}" if names else ""


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
        json: print JSON.
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
        print(f"vatt-fast: {_skipped(folder.skipped)[2:]}", file=sys.stderr)
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
    _print(found, json)


def _answer(asked: str, hits: dict[str, float]) -> Answer:
    return Answer(asked, tuple((name, similarity, False) for name, similarity in hits.items()))


def run_finetune(config: FineTuneConfig) -> None:
    """Fine-tune a tower on labelled video, sound or pictures; continue an interrupted run.

    torchrun starts it on several devices.
    """
    finetune(config)
    if speaks():
        print(f"trained classifier: {config.out}")


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

    Args:
        model: folder that finetune wrote, or convert --labels of a fine-tuned checkpoint.
        data: labelled media, as finetune's --data.
        out: folder for result.json, classes.csv, scores.npz, confusion.csv and confusion.png.
        media: folder of the media that a file of labels names.
        split: of the data; by default test, else val. Where the data name none, what the model was
            trained on is left out, unless this is train.
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
    found = evaluate(
        model, data, media=media, split=split, fold=fold, skip_missing=skip_missing,
        windows=windows, crops=crops, batch_size=batch_size,
        precision=precision, workers=workers, device=device, **sizes,
    )  # fmt: skip
    if found.predictions.skipped:
        print(f"vatt-fast: {_skipped(found.predictions.skipped)[2:]}", file=sys.stderr)
    if out is not None:
        for left_out in write_evaluation(found, out):
            print(f"vatt-fast: {left_out}", file=sys.stderr)
    if json:
        print(dumps(found.result))
        return
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.result.items()}
    _print({k: v for k, v in shown.items() if k not in ("settings", "skipped")}, False)
    if out is not None:
        print(f"written: {out}")


def run_probe(config: ProbeConfig) -> None:
    """Fit linear classifiers to a model's frozen features of labelled media, and measure them."""
    found = probe(config)
    if found["skipped"]:
        print(f"vatt-fast: {_skipped(found['skipped'])[2:]}", file=sys.stderr)
    hidden = ("settings", "skipped")
    _print({name: value for name, value in found.items() if name not in hidden}, False)
    print(f"written: {config.out}")


def draw_figures(config: FiguresConfig) -> None:
    """Draw what a model makes of clips: features by class, spaces by modality, activations."""
    for one in figures(config):
        print(f"{Path(config.out) / one.file}: {one.title}. {one.said}")
    print(f"page: {Path(config.out) / PAGE}")


def convert_checkpoint(
    checkpoint: str,
    out: str,
    words: str | None = None,
    labels: str | None = None,
    head_dim: str | None = None,
    partial: bool = False,
    json: bool = False,
) -> None:
    """Turn a released TensorFlow checkpoint into a folder that torch and JAX load.

    Args:
        checkpoint: what stands before .index, such as tx_fac_mbs/ckpt-500000.
        out: folder to write: config.json, model.safetensors, vocabulary.txt or labels.txt.
        words: word list of the text tower (misc/howto100m_en.txt), so that encode takes sentences.
        labels: names of a fine-tuned checkpoint's classes, one a line in their order.
        head_dim: size of an attention head, where neither the shapes nor the published sizes tell:
            64, or video=64,audio=32.
        partial: go on where keys don't match; weights that are not there are random.
        json: print JSON.
    """
    heads = None if head_dim is None else _head_dim(head_dim)
    found = convert(checkpoint, out, words=words, labels=labels, head_dim=heads, partial=partial)
    if not json:
        for name in ("not matched", "notes"):
            for line in found.pop(name, ()):
                print(f"vatt-fast: {line}", file=sys.stderr)
    _print(found | {"written": out}, json)


def _head_dim(text: str) -> int | dict[str, int]:
    try:
        if "=" not in text:
            return int(text)
        pairs = (part.split("=") for part in text.split(","))
        return {modality.strip(): int(size) for modality, size in pairs}
    except ValueError as error:
        raise ValueError(
            f"--head-dim is {text!r}; it is a number, or one each: video=64,audio=32"
        ) from error


def compile_tpu(config: CompileTPUConfig) -> None:
    """Compile the sharded training step for a TPU slice, on this machine without one.

    It reports memory, kernels and layout copies. Exit status 1 if the step does not fit.
    """
    report = compile_step(config)
    if config.out:
        write_report(config, report, Path(config.out))
    if not config.json:
        report = {
            name: f"{value:.3g}" if isinstance(value, float) else value
            for name, value in report.items()
        }
    _print(report, config.json)
    if not report["fits"]:
        raise SystemExit(1)


def show_plan(config: PlanConfig) -> None:
    """Say what a pre-training step takes on so many devices: memory, exchanges, time at least.

    Computed, nothing is measured. Several numbers of devices make a table.
    """
    cases = plan(config)
    if config.json:
        print(dumps(cases))
    elif len(cases) > 1:
        print(markdown(config, cases))
    else:
        _print({name: _rounded(value) for name, value in cases[0].items()}, False)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return f"{value:.4g}" if isinstance(value, float) else value


def doctor(json: bool = False) -> None:
    """Say what this machine offers: versions, device, codecs, and which backend runs each op.

    Args:
        json: print JSON.
    """
    device = pick_device("auto")
    report: dict[str, Any] = {
        "vatt_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    names = "triton jax optax libtpu av tyro tensorboard scikit-learn matplotlib google-crc32c"
    report |= {name: _version(name) for name in names.split()}
    threads = f"cpu, {torch.get_num_threads()} threads"
    report["device"] = torch.cuda.get_device_name() if device.type == "cuda" else threads
    report["native bf16"] = native_bf16(device)
    if importlib.util.find_spec("av"):
        import av

        encoders = [name for name in ("libx264", "mpeg4", "aac") if name in av.codecs_available]
        report["encoders"] = ", ".join(encoders)
    report["C++ kernels"] = native.explain()
    dtype = torch.bfloat16 if native_bf16(device) else torch.float32
    report["backends"] = {op: _verdicts(op, dtype, device) for op in OPS}
    report["requested"] = {op: requested(op) for op in OPS if requested(op)} or "automatic"
    report["note"] = (
        "recipe 'released' trains with attention dropout, which is torch's own attention whatever "
        "the backend"
    )
    if json:
        print(dumps(report))
        return
    verdicts = report.pop("backends")
    for name, value in report.items():
        print(textwrap.fill(f"{name}: {value}", _WIDTH, subsequent_indent="    "))
    for op, by_backend in verdicts.items():
        print(f"\n{op} on the case {_DOCTOR_CASES[op]} in {str(dtype).removeprefix('torch.')}:")
        for backend, verdict in by_backend.items():
            print(_row(backend, verdict))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _verdicts(op: str, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """What each backend says to a call of real size."""
    options = make(OPS[op].cases[_DOCTOR_CASES[op]], dtype, device)
    tensors = [options.pop(name) for name in OPS[op].tensors]
    return explain(op, *tensors, **options)


def _row(name: str, text: str) -> str:
    """``name`` and ``text`` in two columns, the text wrapped."""
    first, following = f"  {name:<14}", " " * 16
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=following)


def flops(json: bool = False) -> None:
    """Print the paper's GFLOPs beside its convention and the true counts, and parameter counts.

    Also those of other clip and patch sizes, and of spectrograms.

    Args:
        json: print JSON.
    """
    if json:
        tables = dict(flops=flops_table(), inputs=input_table(), parameters=parameter_table())
        print(dumps(tables, indent=2))
    else:
        print(format_tables())


def _print(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(dumps(values))
        return
    for name, value in values.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, inner in value.items():
                print(f"  {key}: {inner}")
        else:
            print(f"{name}: {value}")


def main(arguments: list[str] | None = None) -> None:
    """Run the verb; errors a user can mend are one line on stderr and exit status 2."""
    verbs: dict[str, Callable[..., None]] = {
        "demo": _with_config(demo, DemoConfig),
        "pretrain": _with_config(run_pretrain, PretrainConfig),
        "finetune": _with_config(run_finetune, FineTuneConfig),
        "evaluate": evaluate_classifier,
        "index": index,
        "pack": pack,
        "plan": _with_config(show_plan, PlanConfig),
        "compile-tpu": _with_config(compile_tpu, CompileTPUConfig),
        "convert": convert_checkpoint,
        "embed": embed,
        "figures": _with_config(draw_figures, FiguresConfig),
        "probe": _with_config(run_probe, ProbeConfig),
        "retrieve": retrieve,
        "doctor": doctor,
        "flops": flops,
    }
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of any bytes
    try:
        tyro.extras.subcommand_cli_from_dict(
            verbs, prog="vatt-fast", description="VATT on replaceable kernels", args=arguments
        )
    except (ValueError, OSError, NonFiniteError) as error:
        _say(error, str(error))
        leave(2)
        raise SystemExit(2) from error
    except KeyboardInterrupt as stop:
        _say(stop, str(stop) or "interrupted")
        leave(130)
        raise SystemExit(130) from stop
    leave(0)


def _say(error: BaseException, text: str) -> None:
    if not getattr(error, "told_by_another", False):
        print(f"vatt-fast: {text}", file=sys.stderr)


def _with_config(verb: Callable[[Any], None], config_class: type) -> Callable[[Any], None]:
    """``verb`` with its config's fields as flat options."""

    def run(config: Any) -> None:
        verb(config)

    run.__doc__ = verb.__doc__
    run.__annotations__ = {
        "config": Annotated[config_class, tyro.conf.arg(name="")],
        "return": None,
    }
    return run


if __name__ == "__main__":
    main()
