"""F063 foreign-names: no tensor has a name of the family.

Why: the weights are in the names of another program: Meta's or Mistral's own release, llama.cpp, Megatron. Readers of
the class find no weight at all. Names are not all that differs: Meta's query and key rows are in another order.

Seen as:
- transformers: `were not initialized from the model checkpoint`
- llama.cpp: `Can not map tensor`
- vLLM: `There is no module or parameter named 'tok_embeddings'`

Do: convert the weights with the converter of the program that wrote them, or take the Hugging Face release.

False alarms: none known. Packed weights, fused experts, custom code and families without a table are not judged.

Fix safety: manual: a renaming alone would leave rows in the wrong order.

Sources: transformers src/transformers/models/llama/convert_llama_weights_to_hf.py; ggml-org/llama.cpp
gguf-py/gguf/constants.py.
"""

import re

from doctor.lint.rule import Fix, Place, _, family_table, finding, packed_tails, rule
from doctor.lint.testing import tiny

NUMBER = re.compile(r"\.\d+(?=\.)")
PROGRAMS = (
    (re.compile(r"^(model\.)?layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])\."), "Meta or Mistral"),
    (re.compile(r"^blk\.\d+\."), "llama.cpp"),
    (re.compile(r"\.(linear_qkv|linear_fc1|query_key_value|dense_h_to_4h)\."), "Megatron"),
)


@rule("F063", "error", implied_by=("F057", "F058", "F059", "F061", "F062", "F022", "C147"))
def foreign_names(checkpoint, spec, tensors, config, stacks):
    table = family_table(spec.family)
    if not table or table["architecture"] != spec.architecture or config.get("auto_map"):
        return
    tails = packed_tails()
    if spec.linears or stacks or any(name.endswith(tails) for name in tensors):
        return
    if not any(NUMBER.search(name) for name in tensors):
        return
    inner = [t for t in spec.templates if "{i}" in t.tensor and "norm" not in t.tensor]  # programs share names of norms
    # Patterns take any number, so one name of each kind is enough, unless a family's own names hold one.
    alike = tensors if any(NUMBER.search(t.tensor) for t in inner) else {NUMBER.sub(".0", name) for name in tensors}
    # Parts of a linear stand under its name, whatever a format that is not known here calls them.
    alike = {*alike, *(f"{name.rpartition('.')[0]}.weight" for name in alike)}
    if not inner or any(t.pattern.match(name) for name in alike for t in inner):
        return
    program, names = next(
        ((p, [n for n in tensors if pattern.search(n)]) for pattern, p in PROGRAMS if any(map(pattern.search, alike))),
        ("", list(tensors)),
    )
    first = min(names)
    want = inner[0].tensor.replace("{i}", "0").replace("{e}", "0")
    yield finding(
        _(
            "none of {total:,} tensor names is one of {architecture}, such as {want}; {first} is a name of {program}",
            total=len(tensors),
            architecture=spec.architecture,
            want=want,
            first=first,
            program=program,
        )
        if program
        else _(
            "none of {total:,} tensor names is one of {architecture}, such as {want}; there is {first}",
            total=len(tensors),
            architecture=spec.architecture,
            want=want,
            first=first,
        ),
        at=Place(tensors[first].shard, tensor=first),
        evidence={"tensors": len(tensors)},
        fix=Fix(_("convert the weights with the converter of the program that wrote them"), (), "manual"),
    )


def bad():
    case = tiny()
    spec = case.spec
    for old in list(case.tensors):
        new = re.sub(r"^.*?layers\.(\d+)\.", r"blk.\1.", old)
        case.tensors[new], case.dtypes[new] = case.tensors.pop(old), case.dtypes.pop(old)
    first = min(name for name in case.tensors if name.startswith("blk."))
    want = next(t.tensor for t in spec.templates if "{i}" in t.tensor).replace("{i}", "0").replace("{e}", "0")
    return case, (
        f"none of {len(case.tensors)} tensor names is one of {spec.architecture}, such as {want}; {first} is a name "
        "of llama.cpp"
    )


def good():
    return tiny()
