"""What came of an optimization: a page to show, a summary for scripts, a few lines for the terminal."""

from pennyweight.report.page import render
from pennyweight.report.text import summary, table
from pennyweight.report.view import view

__all__ = ["render", "summary", "table", "view"]
