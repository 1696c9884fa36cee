"""``python -m bench``: every measurement of this machine, cheapest first, into bench/results/<device>.jsonl; ``python -m bench.report`` shows it.

Two to three hours on 2 cores. May be killed at any time and continues with the same command. Accuracy is ``python -m bench.accuracy``, and
what waits for a GPU ``python -m bench.gpu``.
"""

import argparse
import subprocess
import sys

STAGES: dict[str, list[str]] = {
    "ops": ["bench.run", "--device", "cpu", "--seconds", "30"],
    "small": ["bench.drop_rate", "--device", "cpu", "--configuration", "tiny"],
    "scaling": ["bench.scaling", "--device", "cpu"],
    "drop_rate": ["bench.drop_rate", "--device", "cpu"],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="measure everything on this CPU, resumable; hours on 2 cores",
    )
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    given = parser.parse_args()
    status = 0
    for stage in given.stage:
        print(f"== {stage}: python -m {' '.join(STAGES[stage])} --resume", flush=True)
        status |= subprocess.call([sys.executable, "-m", *STAGES[stage], "--resume"])
    return int(status != 0)


if __name__ == "__main__":
    raise SystemExit(main())
