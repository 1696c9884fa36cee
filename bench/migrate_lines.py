"""Stamp the lines that were fresh by commits with the digest of today's sources; run once.

    python -m bench.migrate_lines

Until commit 628a216 a line was stale where a later commit had touched what it measured. By that
rule all 470 lines of the commits below were fresh at 628a216. What they ran has changed since in
its wording, its files and the calls between them, and a step is given other patch rows; kernels and
steps were compared old against new then, and were level. Lines of other commits stay without a
digest, and so stay stale. Files take the name of their machine and its instruction level.
"""

from dataclasses import replace
from pathlib import Path

from . import lines

_FRESH = {"cb6562b19d", "f8f91e64af", "628a216d0f"}


def main(folder: Path = lines.RESULTS) -> None:
    """Rewrite the files of result lines in a folder."""
    for path in lines.files(folder):
        stamped = [
            replace(line, source=lines.source_of(line)) if line.commit in _FRESH else line
            for line in lines.read(path)
        ]
        last = stamped[-1]
        target = folder / lines.file_of(last.device, last.versions).name
        path.unlink()
        lines.append(target, stamped)
        fresh = sum(lines.stale(line) is None for line in stamped)
        print(f"{target.name}: {len(stamped)} lines, {fresh} fresh")


if __name__ == "__main__":
    main()
