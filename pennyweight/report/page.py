"""The report's page: one HTML file that opens offline, with nothing to load and nothing to run.

Its charts are Vega-Lite drawn to SVG when the page is written, each for a narrow and for a wide screen; colours are CSS
variables, so light and dark are one picture. Vega's own JavaScript in the page is the known alternative: 900 kB more,
nothing to see without scripts or in print, and a redraw for the dark. What it would add, words under the pointer, is
fifteen lines here. Cost: no zooming, and each chart twice.
"""

from __future__ import annotations

from importlib import resources

import jinja2

from pennyweight.optimize.trial import Result
from pennyweight.report.charts import figures
from pennyweight.report.view import view


def render(result: Result) -> str:
    """The page as HTML text.

    Raises:
        DeviceError: the packages that draw are not installed.
    """
    template = resources.files("pennyweight.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(view=view(result), result=result, figures=figures(result))
