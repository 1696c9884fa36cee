"""The ``vatt-fast`` command."""

import io
import sys
from collections.abc import Callable
from typing import Annotated, Any

try:
    import tqdm  # noqa: F401 - the verbs'
    import tyro
except ImportError as error:
    raise SystemExit(
        f"the command line needs {error.name}: pip install 'vatt_fast[train]'"
    ) from error

# These need parts of the same extra, so they come after the message above. Every verb's options
# need most of them; all of them take 0.2 s of the 4 s to import torch.
from .commands import data, evaluation, machine, training, weights
from .training.distributed import leave
from .training.metrics import NonFiniteError


def main(arguments: list[str] | None = None) -> None:
    """Run the verb; errors a user can mend are one line on stderr and exit status 2."""
    verbs: dict[str, Callable[..., None]] = {
        "demo": _with_config(training.demo, training.DemoConfig),
        "pretrain": _with_config(training.run_pretrain, training.PretrainConfig),
        "finetune": _with_config(training.run_finetune, training.FineTuneConfig),
        "join": weights.join,
        "evaluate": evaluation.evaluate_classifier,
        "index": data.index,
        "pack": data.pack,
        "plan": _with_config(training.show_plan, training.PlanConfig),
        "compile-tpu": _with_config(training.compile_tpu, training.CompileTPUConfig),
        "convert": weights.convert_checkpoint,
        "export": weights.export_model,
        "embed": evaluation.embed,
        "figures": _with_config(evaluation.draw_figures, evaluation.FiguresConfig),
        "probe": _with_config(evaluation.run_probe, evaluation.ProbeConfig),
        "retrieve": evaluation.retrieve,
        "doctor": machine.doctor,
        "flops": machine.flops,
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
