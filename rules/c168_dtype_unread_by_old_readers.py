"""C168 dtype-unread-by-old-readers: dtype is stated only as `dtype`, which this runtime does not read.

Why: transformers 5 writes `dtype`, transformers 4 before 4.56 reads `torch_dtype` alone. Without it vLLM takes float32 for the
model's own type and serves in float16, in which a bfloat16 model may overflow; transformers loads twice the memory.

Do: write both keys.

False alarms: none for a runtime that old; with no --runtime, or a newer one, nothing is said.

Fix safety: safe: it adds a key with the value that the file already states.

Sources: vllm-project/vllm vllm/config.py of 0.6 to 0.9 (_get_and_verify_dtype reads torch_dtype); transformers 4.57
src/transformers/configuration_utils.py.
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, _, finding, old_keys, old_reader, rule
from doctor.lint.testing import tiny


@rule("C168", "warning", implied_by=("C160",))
def dtype_unread_by_old_readers(checkpoint, spec, config, recipe, files):
    old = old_reader(recipe, json_of_its_own=True)
    value = old_keys(config).get("torch_dtype")
    if not old or value is None:
        return
    yield finding(
        _("dtype {dtype} is stated only as dtype; {reader} reads torch_dtype", dtype=value, reader=old),
        at=Place("config.json", pointer="/dtype"),
        evidence={"dtype": value},
        fix=Fix(
            _('set "{key}": "{value}"', key="torch_dtype", value=value),
            (SetJson("config.json", "/torch_dtype", value, config.get("torch_dtype", MISSING)),),
        ),
    )


def bad():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "exllamav2")
    case.config["dtype"] = case.config.pop("torch_dtype")
    return case, "dtype bfloat16 is stated only as dtype; exllamav2 reads torch_dtype"


def good():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "exllamav2")
    case.config["dtype"] = case.config["torch_dtype"]
    return case
