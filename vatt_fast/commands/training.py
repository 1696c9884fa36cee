"""The verbs that train, and those that say beforehand what that takes."""

from json import dumps
from pathlib import Path
from typing import Any

from ..demo.run import DemoConfig, run_demo
from ..finetuning.loop import finetune
from ..finetuning.settings import FineTuneConfig
from ..on_jax.compile_tpu import CompileTPUConfig, compile_step, write_report
from ..plan import PlanConfig, markdown, plan
from ..training.distributed import speaks
from ..training.loop import PretrainConfig, pretrain
from .printing import print_report


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


def run_finetune(config: FineTuneConfig) -> None:
    """Fine-tune a tower on labelled video, sound or pictures; continue an interrupted run.

    torchrun starts it on several devices.
    """
    finetune(config)
    if speaks():
        print(f"trained classifier: {config.out}")


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
        print_report({name: _rounded(value) for name, value in cases[0].items()}, False)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return f"{value:.4g}" if isinstance(value, float) else value


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
    print_report(report, config.json)
    if not report["fits"]:
        raise SystemExit(1)
