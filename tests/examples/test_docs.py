"""The pages are true: links lead somewhere, commands exist, snippets run, lines are short."""

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vatt_fast.cli import main
from vatt_fast.demo.world import render_world
from vatt_fast.training.loop import PretrainConfig, pretrain

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# without those that tell history, whose files and commands may be gone
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md" and "notes" not in page.parts]
README_WORDS, COLUMNS = 900, 100


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


on_every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def prose_and_code(page: Path) -> list[tuple[bool, str]]:
    """(whether it is a line of code, the line)."""
    lines, fenced = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
        lines.append((fenced or line.startswith("    "), line))
    return lines


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip("# ").replace("`", "").lower())
    return kept.replace(" ", "-")


def test_the_readme_is_a_page():
    words = (ROOT / "README.md").read_text().split()
    assert sum(any(map(str.isalnum, word)) for word in words) <= README_WORDS


@on_every_page
def test_lines_are_short(page):
    long = [
        f"{number}: {line[:60]}"
        for number, (_, line) in enumerate(prose_and_code(page), 1)
        if len(line) > COLUMNS and not line.startswith(("|", "![")) and " " in line.strip()
    ]
    assert not long


@on_every_page
def test_links_lead_somewhere(page):
    broken = []
    text = "\n".join(line for is_code, line in prose_and_code(page) if not is_code)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, part = target.partition("#")
        if "://" in target:
            continue
        found = (page.parent / path).resolve() if path else page
        if not found.exists():
            broken.append(target)
        elif part:
            headings = [line for line in found.read_text().splitlines() if line.startswith("#")]
            if part not in map(anchor, headings):
                broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_paths_in_prose_exist(page):
    folders = "bench/results|csrc|docs|examples|kernels|tests|vatt_fast"
    named = re.findall(rf"`((?:{folders})/[\w./-]+\w)`", page.read_text())
    assert not [path for path in named if not (ROOT / path).exists()]


# in an indented block or in backquotes, behind environment variables or not
COMMAND = r"(?:^ {4}|`)((?:\w+=\S+ )*(?:python -m bench|vatt-fast)\b[^`\n]*)"

# -- commands ----------------------------------------------------------------------------------


def commands() -> dict[tuple[str, ...], set[str]]:
    """Every documented command with its verb -> the options that some page gives it."""
    found: dict[tuple[str, ...], set[str]] = {}
    for page in CURRENT:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(COMMAND, text, re.MULTILINE):
            for part in re.split(r"&&|  +#|#|\|", line.replace("...", "")):
                words = [word for word in shlex.split(part) if "=" not in word.partition("-")[0]]
                program = 3 if words[:2] == ["python", "-m"] else 1
                if words[:program] not in (["python", "-m", "bench"], ["vatt-fast"]):
                    continue
                verb = words[program : program + 1]
                verb = () if not verb or verb[0].startswith("-") else tuple(verb)
                options = {word for word in words if word.startswith("--") and word != "--help"}
                found.setdefault((*words[:program], *verb), set()).update(options)
    return found


COMMANDS = commands()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_exist_and_have_their_options(command):
    if command[0] == "vatt-fast":
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
            main([*command[1:], "--help"])
        assert not stop.value.code
        text = out.getvalue()
    else:
        arguments = [sys.executable, *command[1:], "--help"]
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        text = done.stdout
    assert not [option for option in COMMANDS[command] if option not in text]


def test_enough_commands_are_found():
    assert {("vatt-fast", "pretrain"), ("python", "-m", "bench", "ops")} <= set(COMMANDS)
    assert "--learning-rate" in COMMANDS["vatt-fast", "pretrain"]


# -- snippets ----------------------------------------------------------------------------------

WITH_SNIPPETS = [page for page in PAGES if "```python" in page.read_text()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with what the pages speak of: clips/, clip.mp4, a run and a released checkpoint."""
    root = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "tests/support/tiny_ckpt_tx_fac", root / "tx_fac_mbs")
    for path in (root / "tx_fac_mbs").iterdir():
        path.rename(path.with_name(path.name.replace("ckpt-1", "ckpt-500000")))
    world = root / "runs" / "world" / "seed0_1200_200"  # where `make demo` puts its own
    render_world(world, num_train=4, num_test=1, seed=0, workers=1, progress=False)
    shutil.copytree(world / "train", root / "clips")
    os.link(root / "clips" / "clip_00001.mp4", root / "clip.mp4")
    steps = dict(steps=1, batch_size=2, warmup_steps=0, workers=0)
    run = PretrainConfig(str(root / "clips"), str(root / "runs/demo"), device="cpu", **steps)
    pretrain(run, progress=False)
    return root


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=name_of)
def test_snippets_run(page, prepared, monkeypatch, tmp_path):
    """The snippets of a page, one after the other in one program."""
    monkeypatch.chdir(prepared)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    script = tmp_path / "snippets.py"
    script.write_text("\n".join(blocks))
    runpy.run_path(str(script))
