"""docs/testing.md shows the inputs that the tests try."""

import pytest

pytest.importorskip("av")

import tried


def test_the_table_is_the_tests():
    """``python tests/support/tried.py`` writes it anew."""
    _, inside, _ = tried.parts(tried.PAGE.read_text(encoding="utf-8"))
    assert inside == tried.table()
    assert len(tried.rows()) > 50
