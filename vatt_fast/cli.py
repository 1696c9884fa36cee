"""The ``vatt-fast`` command, one function a verb."""

import importlib.metadata
import importlib.util
import platform
import sys
import textwrap
from collections.abc import Callable, Iterator
from json import dumps, loads  # ``json`` is an option of the verbs
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from . import VATT, __version__, create_model
from .kernels import explain, native
from .kernels.cases import make
from .kernels.dispatch import native_bf16
from .kernels.ops import OPS
from .kernels.settings import requested

try:
    import tyro
except ImportError as error:
    raise SystemExit("the command line needs tyro: pip install 'vatt_fast[train]'") from error

# These need parts of the same extra, so they come after the message above. Every verb's options
# need most of them; all of them take 0.2 s of the 4 s to import torch.
from .data.clips import Batch, ClipSpec
from .data.dataset import folder_captions
from .data.loader import evaluation_clips
from .demo.run import DemoConfig, run_demo
from .devices import pick_device
from .encoding import embed_batches, embed_sentences, encode
from .evaluation.retrieval import retrieval_metrics, top_k
from .on_jax.compile_tpu import CompileTPUConfig, compile_step, write_report
from .paper_tables import flops_table, format_tables, parameter_table
from .training.loop import PretrainConfig, pretrain

_WIDTH = 100
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
    """Pre-train on a folder of media with captions.json; continue an interrupted run."""
    pretrain(config)
    print(f"trained model: {config.out}")


def embed(model: str, data: str, out: str, batch_size: int = 32) -> None:
    """Embed every clip of a folder into an .npz file.

    Args:
        model: saved model or run folder.
        data: folder of media files; captions.json adds text embeddings.
        out: .npz to write: files (N,), z_video_va and z_audio_va (N, d_va), z_video_vt (N, d_vt),
            z_text_vt (N, P, d_vt), of unit norm. They belong to the window in a file's middle and
            its P nearest sentences; rows of a missing stream or sentence are nan.
        batch_size: clips at a time.
    """
    embeddings, files, skipped = _embed_folder(model, data, batch_size)
    np.savez(out, allow_pickle=False, files=np.array(files), **embeddings)
    print(f"{len(files)} clips embedded into {out}{_skipped(skipped)}")


def _skipped(files: list[str]) -> str:
    listed = ", ".join(files[:5])
    return f"; skipped {len(files)} unreadable: {listed}" if files else ""


def retrieve(
    model: str,
    data: str,
    text: tuple[str, ...] = (),
    audio: str | None = None,
    top: int = 5,
    batch_size: int = 32,
    json: bool = False,
) -> None:
    """Find clips of a folder by sentences or by a sound.

    Without either, measure text-to-video and audio-to-video retrieval on the folder.

    Args:
        model: saved model or run folder.
        data: folder of media files. The measurement needs captions.json, or takes queries.json,
            {file: sentence}, where that is there.
        text: sentences to look for.
        audio: media file whose sound to look for.
        top: clips to list for each query.
        batch_size: clips at a time.
        json: print JSON.
    """
    net = create_model(model)
    embeddings, files, _ = _embed_folder(net, data, batch_size)
    if not text and audio is None:
        _print(_measure(net, data, embeddings, files), json)
        return
    queries = [(sentence, embed_sentences(net, [sentence]), "z_video_vt") for sentence in text]
    if audio is not None:
        queries.append((audio, encode(net, audio=audio)["z_audio_va"].numpy(), "z_video_va"))
    found = {}
    for name, query, space in queries:
        seen = np.flatnonzero(np.isfinite(embeddings[space]).all(1))
        if not seen.size:
            raise ValueError(f"{data} has no clip with video to look for")
        best = seen[top_k(query, embeddings[space][seen], min(top, seen.size))[0]]
        found[name] = {files[i]: round(float(query[0] @ embeddings[space][i]), 4) for i in best}
    _print(found, json)


def _measure(
    net: VATT, data: str, embeddings: dict[str, np.ndarray], files: list[str]
) -> dict[str, dict[str, float]]:
    """Retrieval by the folder's own sentences and sounds, as far as it has them."""
    given = Path(data) / "queries.json"
    if given.is_file():
        sentences = [
            (files.index(name), sentence)
            for name, sentence in loads(given.read_text()).items()
            if name in files
        ]
    else:
        captions = folder_captions(data)
        sentences = [
            (i, caption.text) for i, name in enumerate(files) for caption in captions[name]
        ]
    video = np.isfinite(embeddings["z_video_vt"]).all(1)
    place = np.cumsum(video) - 1  # index among the clips with video
    results = {}
    sentences = [(i, sentence) for i, sentence in sentences if video[i]]
    if sentences:
        queries = embed_sentences(net, [sentence for _, sentence in sentences])
        truth = np.array([place[i] for i, _ in sentences])
        results["text_to_video"] = {
            "queries": len(truth),
            **retrieval_metrics(queries, embeddings["z_video_vt"][video], truth),
        }
    both = video & np.isfinite(embeddings["z_audio_va"]).all(1)
    if both.any():
        metrics = retrieval_metrics(
            embeddings["z_audio_va"][both], embeddings["z_video_va"][video], place[both]
        )
        results["audio_to_video"] = {"queries": int(both.sum()), **metrics}
    if not results:
        raise ValueError(
            f"{data} has neither captions nor sound to query with; give --text or --audio"
        )
    return results


def _embed_folder(
    model: VATT | str, data: str, batch_size: int
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Embeddings by name, the files they belong to, and the files that could not be read."""
    net = create_model(model) if isinstance(model, str) else model
    if net.vocabulary is None:
        raise ValueError(
            "this model has no vocabulary.txt; give the folder of a finished or running pretrain"
        )
    skipped: list[str] = []

    spec = ClipSpec.from_config(net.config)

    def watched() -> Iterator[Batch]:
        for batch in evaluation_clips(data, spec, vocabulary=net.vocabulary, batch_size=batch_size):
            skipped.extend(one.file for one in batch.skipped)
            yield batch

    return *embed_batches(net, watched()), skipped


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
    names = "triton jax optax libtpu av tyro tensorboard scikit-learn matplotlib"
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

    Args:
        json: print JSON.
    """
    if json:
        print(dumps({"flops": flops_table(), "parameters": parameter_table()}, indent=2))
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
        "compile-tpu": _with_config(compile_tpu, CompileTPUConfig),
        "embed": embed,
        "retrieve": retrieve,
        "doctor": doctor,
        "flops": flops,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(
            verbs, prog="vatt-fast", description="VATT on replaceable kernels", args=arguments
        )
    except ValueError as error:
        print(f"vatt-fast: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as stop:
        print(f"vatt-fast: {stop or 'interrupted'}", file=sys.stderr)
        raise SystemExit(130) from stop


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
