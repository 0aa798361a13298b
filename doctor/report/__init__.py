"""Renderings of one Report. `render` makes any of them by name; each format is a module of its own, imported when asked for."""

from importlib import import_module

from doctor.errors import DoctorError

_HOME = {"full": "terminal", "concise": "concise", "json": "json_report", "sarif": "sarif", "junit": "junit", "github": "github",
         "gitlab": "gitlab", "markdown": "markdown", "html": "html"}
FORMATS = tuple(_HOME)


def render(name: str, reports: list) -> str:
    """The text of one format for all reports. Raises DoctorError for a format that does not exist."""
    if name not in _HOME:
        raise DoctorError(f"format {name!r}: must be one of {', '.join(FORMATS)}.")
    return import_module(f"doctor.report.{_HOME[name]}").render(reports)
