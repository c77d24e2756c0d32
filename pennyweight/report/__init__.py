"""What came of an optimization: a page to show, a summary for scripts, a few lines for the terminal."""

from pennyweight.report.page import render
from pennyweight.report.text import layers, summary, table, tried
from pennyweight.report.view import view

__all__ = ["layers", "render", "summary", "table", "tried", "view"]
