"""O648 width-without-kernel: runtime has no kernel for the bits of some linears.

Why: in a mixture of widths every linear needs a kernel for its own. vLLM reads 4 and 8 bits of compressed-tensors and
refuses the file at the first linear of 3, 5 or 6, however many of the others it reads; transformers reads 2 to 8.

Seen as:
- vLLM: `No compressed-tensors compatible scheme was found`

Do: quantize again with widths that the runtime reads: --runtime says which, and --bpw chooses among those alone. Or serve
the file with transformers.

False alarms: a runtime newer than the table, or one with kernels from a plugin.

Fix safety: no fix: a width of a linear is its codes.

Sources: rules/tables/kernels.toml and what it names; vllm-project/vllm
vllm/model_executor/layers/quantization/compressed_tensors (get_scheme).
"""

from doctor.lint.rule import _, finding, plural, rule
from doctor.lint.testing import tiny


@rule("O648", "error", implied_by=("G305", "G318"))
def width_without_kernel(checkpoint, unread_widths, layout, recipe):
    for bits, names in unread_widths.items():
        yield finding(
            plural(
                "{runtime} has no kernel for {format} {bits}-bit group {group}, which {n} linear has: {first}",
                "{runtime} has no kernel for {format} {bits}-bit group {group}, which {n} linears have, first {first}",
                len(names),
                runtime=f"{recipe.runtime} {recipe.runtime_version}".strip(),
                format=layout.format,
                bits=bits,
                group=layout.group_size,
                first=names[0],
            ),
            evidence={"bits": bits, "linears": names[:20]},
            advice=_("quantize with widths that the runtime reads, or serve it with another runtime"),
        )


def _case(bits):
    case = tiny()
    recipe = case.recipe.with_field("runtime", "vllm").with_field("format", "compressed-tensors")
    case.recipe = recipe.with_field("bits_for", (f"{case.name('down').removesuffix('.weight')}={bits}",))
    return case


def bad():
    case = _case(5)
    name = case.name("down").removesuffix(".weight")
    return case, f"vllm has no kernel for compressed-tensors 5-bit group 32, which 1 linear has: {name}"


def good():
    return _case(8)
