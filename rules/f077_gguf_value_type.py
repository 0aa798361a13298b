"""F077 gguf-value-type: a metadata value has another type than llama.cpp reads.

Why: each metadata value states its type, and llama.cpp asks for one type a key: sizes and token ids in u32, epsilon and
the rotary base in f32, flags in bool. It converts nothing: a size in i32 or u64, as writers in Python choose by
themselves, ends the load although the number is right. A list with one value a layer must have as many as layers.

Seen as:
- llama.cpp: `has wrong type`
- llama.cpp: `has wrong array length; expected`

Do: write the metadata again with the types that llama.cpp's converter uses (gguf-py: add_uint32, add_float32, add_bool).

False alarms: readers that convert numbers, such as gguf-py and transformers.

Fix safety: manual; the file must be written anew, since values of another type take other room.

Sources: ggml-org/llama.cpp src/llama-model-loader.cpp (get_key, get_key_or_arr), src/llama-model.cpp (load_hparams).
"""

from doctor.lint.rule import Place, _, finding, plural, rule, table
from doctor.lint.testing import tiny_gguf, w

# Names of GGUF's types by their numbers.
NAMES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64")
ARRAY = NAMES.index("array")


@rule("F077", "error", implied_by=("F070", "F072"))
def gguf_value_type(checkpoint, gguf_models):
    known = table("llama_cpp")["types"]
    for model in gguf_models:
        if model.metadata.get("general.type", "model") != "model" or model.architecture == "clip":
            continue
        wrong = [
            (model.architecture + key if key.startswith(".") else key, wanted)
            for wanted, keys in known.items()
            if wanted in NAMES
            for key in keys
            if not _fits(model, key, NAMES.index(wanted), known["by_layer"])
        ]
        wrong += [
            (key, f"array of {' or '.join(elements)}")
            for key, elements in known["arrays"].items()
            if key in model.types and _named(model, key) not in [f"array of {of}" for of in elements]
        ]
        if wrong:
            key, wanted = wrong[0]
            yield finding(
                plural(
                    "{model}: {key} is of type {found}; llama.cpp reads {wanted}",
                    "{model}: {n:,} values are of other types than llama.cpp reads, first {key}: {found}, must be {wanted}",
                    len(wrong),
                    model=model.name,
                    key=key,
                    found=_named(model, key),
                    wanted=wanted,
                ),
                at=Place(model.files[0].name),
                evidence={"keys": [key for key, _wanted in wrong]},
                advice=_("write the metadata again with llama.cpp's types"),
            )
        yield from _lengths(model, known["by_layer"])


def _fits(model, key, wanted, by_layer):
    """Whether a key is absent or of the type; a list by layer holds u32 or i32."""
    kind, elements = model.types.get(model.architecture + key if key.startswith(".") else key, (wanted, 0))
    return kind == wanted or (kind == ARRAY and key in by_layer and NAMES[elements] in ("u32", "i32"))


def _named(model, key):
    """The type of a value that is there."""
    kind, elements = model.types[key]
    return f"array of {NAMES[elements]}" if kind == ARRAY else NAMES[kind]


def _lengths(model, by_layer):
    layers = model.own("block_count")
    for key in by_layer:
        values = model.own(key[1:])
        if isinstance(values, list) and isinstance(layers, int) and len(values) != layers:
            yield finding(
                _(
                    "{model}: {key} has {n:,} values for {layers:,} layers",
                    model=model.name,
                    key=model.architecture + key,
                    n=len(values),
                    layers=layers,
                ),
                at=Place(model.files[0].name),
                evidence={"values": len(values), "layers": layers},
                advice=_("write the metadata again with llama.cpp's types"),
            )


def bad():
    case = tiny_gguf()
    key = f"{case.family}.rope.freq_base"
    case.keys[key] = w.u32(10000)
    return case, f"model.gguf: {key} is of type u32; llama.cpp reads f32"


def good():
    return tiny_gguf()


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny_gguf()
    case.keys[f"{case.family}.attention.head_count"] = w.i32s([4, 4])
    yield case
