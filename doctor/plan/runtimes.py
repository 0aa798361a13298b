"""Which kernels a serving runtime has for grouped weights, and since which version: the table `kernels`, asked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from doctor.core.errors import DoctorError
from doctor.core.facts import Unavailable, fact
from doctor.core.messages import _
from doctor.core.methods import METHODS
from doctor.core.recipe import FORMATS, Recipe
from doctor.core.tables import table
from doctor.plan.groups import Layout
from doctor.plan.tensor_parallel import on_one_gpu


@dataclass(frozen=True)
class Kernel:
    """One kernel of a runtime that reads this layout. tiles: legal (in_features, out_features) multiples on one GPU."""

    name: str
    tiles: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...]

    def takes(self, in_features: int, out_features: int) -> bool:
        return any(in_features % i == 0 and out_features % o == 0 for i, o in self.tiles)


@fact("checkpoint", cost="header")
def kernels(checkpoint, layout, recipe):
    """Kernels of recipe.runtime that read this format, width and group size, in the order they are tried."""
    rows = [row for entries in table("kernels").values() for row in entries]
    entries = runtime_entries(recipe)
    if not any(layout.format in row.get("formats", ()) for row in rows):
        raise Unavailable(_("no table of kernels for {format}", format=layout.packing.label))
    return tuple(
        Kernel(e["name"], tuple(map(tuple, e["tiles"])), tuple(e["dtypes"]))
        for e in reads(entries, layout.format, layout.bits, layout.group_size, layout.sym)
    )


@fact("checkpoint", cost="header")
def unread_widths(checkpoint, layout, recipe, quantization=None):
    """Bits of single linears, other than most have, that recipe.runtime has no kernel for -> names of those linears."""
    entries = runtime_entries(recipe)
    if not any(layout.format in entry["formats"] for entry in entries):
        raise Unavailable(_("no table of kernels for {format}", format=layout.packing.label))
    if not (quantization if layout.quantized else recipe.bits_for):
        return {}
    own: dict[int, list[str]] = {}
    for x in layout.linears:
        bits = quantization.bits_of(x.name) if layout.quantized else recipe.for_linear(x.name).bits
        if bits != layout.bits:
            own.setdefault(bits, []).append(x.name)
    return {
        bits: names
        for bits, names in sorted(own.items())
        if not reads(entries, layout.format, bits, layout.group_size, layout.sym)
    }


def runtime_entries(recipe: Recipe) -> list[dict]:
    """Rows of the table `kernels` for the recipe's runtime and version. Raises Unavailable where there are none."""
    if not recipe.runtime:
        raise Unavailable(_("no runtime was named: --runtime asks for one"))
    entries = table("kernels").get(recipe.runtime)
    if not entries:
        raise Unavailable(_("no table of {runtime}'s kernels for grouped weights", runtime=recipe.runtime))
    return [e for e in entries if in_force(e, recipe.runtime_version)]


def in_force(entry: Mapping, version: str) -> bool:
    """Whether a table row holds for a version; without a version, for the newest."""
    if not version:
        return "until" not in entry
    asked = _release(version)
    return _release(entry.get("since", "0")) <= asked and ("until" not in entry or asked < _release(entry["until"]))


def version_before(version: str, other: str) -> bool:
    """Whether a release came before another; what follows its first three numbers is not compared."""
    return _release(version) < _release(other)


def old_reader(recipe: Recipe, *, json_of_its_own: bool = False) -> str | bool | None:
    """The runtime of the recipe where it is built on transformers 4, False where it is not, None where none is named.

    json_of_its_own: also a runtime that reads config.json with code of its own and knows the old keys alone.
    """
    if not recipe.runtime:
        return None
    readers = table("readers")
    if json_of_its_own and recipe.runtime in readers["old"]:
        return recipe.runtime
    first = readers["first"].get(recipe.runtime)
    if first and recipe.runtime_version and version_before(recipe.runtime_version, first):
        return f"{recipe.runtime} {recipe.runtime_version}"
    return False


def _release(version: str) -> tuple[int, ...]:
    numbers = [int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3]]
    return tuple(numbers + [0] * (3 - len(numbers)))


def reads(entries: Iterable[Mapping], form: str, bits: int, group_size: int, sym: bool) -> list[Mapping]:
    """Those rows of the table of kernels that read this format, width, group size and symmetry."""
    return [
        e
        for e in entries
        if form in e["formats"]
        and bits in e["bits"]
        and sym in e["sym"][form]
        and (not e["groups"] or group_size in e["groups"])
    ]


def nearest_plan(
    recipe: Recipe, layout: Layout, n_kv_heads: int | None, dtype: str = ""
) -> tuple[str, dict[str, Any]] | None:
    """(in words, {recipe field: value}) of the smallest change after which the runtime has a kernel, None where no two
    fields help.

    dtype: one that the kernel must compute in. The order is by what it costs: symmetry, groups, the form of the file,
    then bits.
    """
    shapes = {(k, n) for _roles, k, n, _linear in on_one_gpu(layout, recipe.tp, n_kv_heads)}
    fitting = lambda e: any(all(k % i == 0 and n % o == 0 for k, n in shapes) for i, o in e["tiles"])  # noqa: E731
    entries = [e for e in runtime_entries(recipe) if (not dtype or dtype in e["dtypes"]) and fitting(e)]
    single = _changes(recipe, {x.in_features for x in layout.linears})
    pairs = [
        (_("{first} and {second}", first=a, second=short), x | y)
        for a, _short, x in single
        for _b, short, y in single
        if x.keys().isdisjoint(y)
    ]
    for words, values in [*((a, x) for a, _short, x in single), *sorted(pairs, key=lambda p: "bits" in p[1])]:
        try:
            other = replace(recipe, **values)
        except DoctorError:  # a width that the format does not have
            continue
        if other != recipe and reads(entries, other.output_format, *other.scheme[:3]):
            return words, values
    return None


def _changes(recipe: Recipe, widths: set[int]) -> list[tuple[str, str, dict[str, Any]]]:
    """(in words, in words after "and", {recipe field: value}) of changes of one field, the cheapest first."""
    method = METHODS[recipe.method]
    groups = [g for g in (128, 64, 32, -1) if g == -1 or not any(w % g for w in widths)]
    forms = [f for f in FORMATS.values() if recipe.bits in f.bits and f.name in (method.proposed or FORMATS)]
    forms.sort(key=lambda f: -len(f.bits))  # a format of many widths leaves more open
    return [
        (_("quantize symmetrically"), _("symmetrically"), {"sym": True}),
        (_("quantize asymmetrically"), _("asymmetrically"), {"sym": False}),
        *(
            (_("quantize in groups of {size}", size=g), _("in groups of {size}", size=g), {"group_size": g})
            if g > 0
            else (_("quantize whole rows"), _("whole rows"), {"group_size": g})
            for g in groups
        ),
        *((_("write {format}", format=f.name), _("write {format}", format=f.name), {"format": f.name}) for f in forms),
        *(
            (_("quantize to {bits} bits", bits=bits), _("to {bits} bits", bits=bits), {"bits": bits})
            for bits in (4, 8)
            if not method.bits
        ),
    ]
