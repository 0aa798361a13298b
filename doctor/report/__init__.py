"""Renderings of one Report. `render` makes any of them by name; each format is a module of its own, imported when asked
for.
"""

from importlib import import_module

from doctor.core.errors import DoctorError
from doctor.locale.catalogue import language

_HOME = {
    "full": "terminal",
    "concise": "concise",
    "json": "json_report",
    "sarif": "sarif",
    "junit": "junit",
    "github": "github",
    "gitlab": "gitlab",
    "markdown": "markdown",
    "html": "html",
}
FORMATS = tuple(_HOME)
HUMAN = ("full", "markdown", "html")  # the formats that are translated


def render(name: str, reports: list, lang: str = "en") -> str:
    """The text of one format for all reports; `lang` holds for full, markdown and html, other formats are English.

    Raises DoctorError for a format that does not exist.
    """
    if name not in _HOME:
        raise DoctorError(f"format {name!r}: must be one of {', '.join(FORMATS)}.")
    with language(lang if name in HUMAN else "en"):
        return import_module(f"doctor.report.formats.{_HOME[name]}").render(reports)
