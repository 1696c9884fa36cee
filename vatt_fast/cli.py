"""The ``vatt-fast`` command, one function a verb."""

import platform
import sys
from json import dumps, loads  # ``json`` is an option of the verbs
from pathlib import Path
from typing import Annotated

import numpy as np
import torch


def _tyro():
    try:
        import tyro
    except ImportError as error:
        raise SystemExit("the command line needs tyro: pip install 'vatt_fast[train]'") from error
    return tyro


def demo(config) -> None:
    """Render a small world of clips, pre-train tiny on it, and print retrieval before and after."""
    from .demo.run import run_demo

    summary = run_demo(config)
    print(f"report: {summary['report']}")
    print(dumps(summary))


def run_pretrain(config) -> None:
    """Pre-train on a folder of media with captions.json; continues an interrupted run of the same settings."""
    from .training.loop import pretrain

    pretrain(config)
    print(f"trained model: {config.out}")


def embed(model: str, data: str, out: str, batch_size: int = 32) -> None:
    """Embed every clip of a folder into an .npz file.

    Args:
        model: saved model or run folder.
        data: folder of media files; captions.json adds text embeddings.
        out: .npz to write: files (N,), z_video_va, z_audio_va (N, d_va) and z_video_vt (N, d_vt), unit norm, nan rows for missing streams, of
            the window in a file's middle; z_text_vt (N, P, d_vt), its P nearest sentences, nan where there are fewer.
        batch_size: clips at a time.
    """
    embeddings, files, skipped = _embed_folder(model, data, batch_size)
    np.savez(out, allow_pickle=False, files=np.array(files), **embeddings)
    print(
        f"{len(files)} clips embedded into {out}"
        + (f"; skipped {len(skipped)} unreadable: {', '.join(skipped[:5])}" if skipped else "")
    )


def retrieve(
    model: str,
    data: str,
    text: tuple[str, ...] = (),
    audio: str | None = None,
    top: int = 5,
    batch_size: int = 32,
    json: bool = False,
) -> None:
    """Find clips of a folder by sentences or by a sound; without either, measure text-to-video and audio-to-video retrieval on it.

    Args:
        model: saved model or run folder.
        data: folder of media files, with captions.json for the measurement (queries.json, {file: sentence}, takes precedence).
        text: sentences to look for.
        audio: media file whose sound to look for.
        top: clips to list for each query.
        batch_size: clips at a time.
        json: print JSON.
    """
    from .encoding import embed_sentences, encode
    from .evaluation.retrieval import top_k
    from .model import create_model

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
    net, data: str, embeddings: dict[str, np.ndarray], files: list[str]
) -> dict[str, dict]:
    from .data.dataset import folder_captions
    from .encoding import embed_sentences
    from .evaluation.retrieval import retrieval_metrics

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
    model, data: str, batch_size: int
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    from .data.dataset import ClipSpec, evaluation_clips
    from .encoding import embed_batches
    from .model import create_model

    net = create_model(model) if isinstance(model, str) else model
    if net.vocabulary is None:
        raise ValueError(
            "this model has no vocabulary.txt; give the folder of a finished or running pretrain"
        )
    skipped: list[str] = []

    def watched():
        for batch in evaluation_clips(
            data, ClipSpec.from_config(net.config), vocabulary=net.vocabulary, batch_size=batch_size
        ):
            skipped.extend(one.file for one in batch.skipped)
            yield batch

    return *embed_batches(net, watched()), skipped


def compile_tpu(config) -> None:
    """Compile the sharded training step for a TPU slice, on this machine without one: memory, kernels, layout copies.

    Exit status 1 if it does not fit.
    """
    from .on_jax.compile_tpu import compile_step, write_report

    report = compile_step(config)
    if config.out:
        write_report(config, report, Path(config.out))
    _print(
        {
            name: f"{value:.3g}" if isinstance(value, float) and not config.json else value
            for name, value in report.items()
        },
        config.json,
    )
    if not report["fits"]:
        raise SystemExit(1)


def doctor(json: bool = False) -> None:
    """Say what this machine offers: versions, device, codecs, and which backend runs each op, and why.

    Args:
        json: print JSON.
    """
    import importlib.metadata
    import importlib.util

    from . import __version__
    from .kernels import explain, native
    from .kernels.dispatch import native_bf16
    from .kernels.ops import OPS
    from .kernels.settings import requested
    from .training.loop import pick_device

    device = pick_device("auto")
    report: dict = {
        "vatt_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in (
        "triton",
        "jax",
        "optax",
        "libtpu",
        "av",
        "tyro",
        "tensorboard",
        "scikit-learn",
        "matplotlib",
    ):
        try:
            report[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            report[name] = "not installed"
    report["device"] = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    report["native bf16"] = native_bf16(device)
    if importlib.util.find_spec("av"):
        import av

        encoders = [name for name in ("libx264", "mpeg4", "aac") if name in av.codecs_available]
        report["encoders"] = ", ".join(encoders)
    report["C++ kernels"] = native.explain()
    dtype = torch.bfloat16 if native_bf16(device) else torch.float32
    q = torch.zeros(1, 785, 12, 64, dtype=dtype, device=device)
    rows, weight = (
        torch.zeros(1, 8, 16, dtype=torch.uint8, device=device),
        torch.zeros(4, 16, device=device),
    )
    z = torch.zeros(8, 16, device=device)
    calls: dict[str, tuple] = {
        "attention": ((q, q, q), dict(scale=0.125, bias=None, key_mask=None, deterministic=False)),
        "drop_token": ((q[0], torch.zeros(1, dtype=torch.int32)), {}),
        "contrastive_lse": ((z, z), dict(scale=1.0, texts_per_clip=1, first=0)),
        "patch_embed": (
            (rows, weight, weight[:, 0]),
            dict(scale=1.0, shift=0.0, dtype=torch.float32),
        ),
    }
    report["backends"] = {op: (explain(op, *calls[op][0], **calls[op][1])) for op in OPS}
    report["requested"] = {op: requested(op) for op in OPS if requested(op)} or "automatic"
    report["note"] = (
        "recipe 'released' trains with attention dropout, which is torch's own attention whatever the backend"
    )
    _print(report, json)


def flops(json: bool = False) -> None:
    """Print the paper's GFLOPs tables beside its convention and the true counts, and the parameter counts.

    Args:
        json: print JSON.
    """
    from .paper_tables import flops_table, format_tables, parameter_table

    print(
        dumps({"flops": flops_table(), "parameters": parameter_table()}, indent=2)
        if json
        else format_tables()
    )


def _print(values: dict, as_json: bool) -> None:
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
    tyro = _tyro()
    from .demo.run import DemoConfig
    from .on_jax.compile_tpu import CompileTPUConfig
    from .training.loop import PretrainConfig

    verbs = {
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


def _with_config(verb, config_class):
    """``verb`` with its config's fields as flat options."""
    tyro = _tyro()

    def run(config) -> None:
        verb(config)

    run.__doc__ = verb.__doc__
    run.__annotations__ = {
        "config": Annotated[config_class, tyro.conf.arg(name="")],
        "return": None,
    }
    return run


if __name__ == "__main__":
    main()
