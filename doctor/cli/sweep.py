"""`doctor quantize --preflight --recipes FILE`: several recipes on a few layers, a row each."""

import sys
from pathlib import Path
from typing import Any, NoReturn

from doctor.cli.options import KV_FORMATS, outputs_of
from doctor.cli.output import emit_table, json_on_failure, notice
from doctor.cli.progress import run_lines
from doctor.core.messages import _
from doctor.core.recipe import Recipe


def try_recipes(
    path: str, output: Path, file: Path, base: Recipe, formats: tuple[str, ...], **options: Any
) -> NoReturn:
    """Print the table and exit: 0 where one of them would work, else 1."""
    from doctor import api
    from doctor.lint.recipe_list import read_recipes

    outputs = outputs_of(formats, known=KV_FORMATS)
    with json_on_failure(outputs):
        recipes = read_recipes(file, base)
        with run_lines(notice) as line:
            found = api.try_recipes(path, output, recipes, progress=line, **options)
        from doctor.report.sweep_text import sweep_page

        emit_table(sweep_page(found), outputs)
    sys.exit(0 if found.ok else 1)


HELP = _("With --preflight: try each recipe of this TOML or JSON list, and print what each loses, weighs and takes.")
