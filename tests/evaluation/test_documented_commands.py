"""The commands of docs/evaluation.md and docs/probing.md: all parse, and the first three run."""

import functools
import json
import re
import shlex
from pathlib import Path

import pytest
from labelled_media import CLASSES, write_labelled

from vatt_fast.cli import main
from vatt_fast.commands import evaluation, machine, training, weights

DOCS = Path(__file__).resolve().parents[2] / "docs"
VERBS = (
    (training, ("run_finetune", "run_pretrain")),
    (evaluation, ("evaluate_classifier", "embed", "retrieve", "run_probe", "draw_figures")),
    (machine, ("flops",)),
    (weights, ("convert_checkpoint",)),
)


def commands(page):
    """In an indented block, or in backquotes within a table."""
    text = (DOCS / page).read_text().replace("\\\n", " ")
    return re.findall(r"^(?: {4}|\|.*`)vatt-fast ([^`\n]+)", text, re.MULTILINE)


@pytest.mark.parametrize("page", ["evaluation.md", "probing.md"])
def test_commands_parse(page, monkeypatch):
    """With their values: settings that do not go together are refused."""
    called = []
    for module, names in VERBS:
        for name in names:
            verb = getattr(module, name)
            monkeypatch.setattr(
                module, name, functools.wraps(verb)(lambda *_, verb=name, **__: called.append(verb))
            )
    found = commands(page)
    for command in found:
        main(shlex.split(command))
    assert len(called) == len(found) > 4


def test_the_first_commands_go_from_nothing_to_a_confusion_matrix(tmp_path, monkeypatch, capsys):
    """As they are printed but for the number of steps."""
    pytest.importorskip("matplotlib", reason="draws the confusion")
    monkeypatch.chdir(tmp_path)
    write_labelled(tmp_path / "media", each=5, splits=(".",))
    (tmp_path / "media").rename("videos")
    finetune, evaluate = commands("evaluation.md")[:2]
    main([*shlex.split(finetune), "--steps", "1", "--workers", "0"])
    main(shlex.split(evaluate))
    assert (tmp_path / "results" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "results" / "result.json").read_text())
    assert (result["examples"], result["classes"]) == (2, len(CLASSES))
    assert "left out as trained on: 8\n" in capsys.readouterr().out
