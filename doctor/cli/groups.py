"""Under which headings the options of a long help page stand, and an example or two for each command."""

from collections.abc import Iterable

import click

from doctor.core.messages import Message, _

FEW = 12  # options that need no headings
_REST = _("Options")
GROUPS: tuple[tuple[Message, str], ...] = (  # heading, names of parameters
    (_("Options"), "output in_place original target dry_run only resume overwrite copy link donor for_readers"),
    (
        _("Recipe"),
        "method scheme bits group_size sym tp runtime config "
        "act_order mse format damp damp_max ignore_linears override bpw size schemes measurement kv_cache tune",
    ),
    (_("Rules"), "select extend_select ignore rules_dirs fail_on fail_on_skipped stage baseline"),
    (_("Text"), "calibration rows max_seq_length seed text context"),
    (_("Fixes"), "fix fix_too unsafe_fixes merge_base adapter"),
    (_("Hub"), "revision download push"),
    (_("Machine"), "memory device capacity plan_only preflight recipes"),
    (_("Comparison"), "verify_rows client client_python tasks"),
    (_("Report"), "formats concise verbose progress lang matrix statistics show_settings imatrix"),
)
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {  # command -> (line to paste, what it does)
    "advise": (
        ("doctor advise model/ --memory 24GB --context 32k", ""),
        ("doctor advise org/model --gpu h100 --gpus 2", _("from headers, nothing downloaded")),
        ("doctor advise model/ --gpu rtx4090 --runtime llama.cpp", ""),
    ),
    "check": (
        ("doctor check model/ --for gptq --group-size 128 --tp 2 --runtime vllm", ""),
        ("doctor check org/model", _("headers of a repository, nothing downloaded")),
        ("doctor check q4/ --runtime vllm -f html:q4.html", _("what is quantized, as it will be served")),
    ),
    "compare": (
        ("doctor compare gptq/ awq/ --original model/", ""),
        ("doctor compare a/ b/ c/ --original model/ --rows 64 -f html:which.html", ""),
    ),
    "convert": (("doctor convert q4/ -o out/ --format compressed-tensors", ""),),
    "completion": (('eval "$(doctor completion bash)"', ""),),
    "explain": (
        ("doctor explain G302", ""),
        ('doctor explain "Hessian is not invertible"', ""),
        ("python quantize.py 2>&1 | doctor explain -", ""),
    ),
    "facts": (("doctor facts config", ""),),
    "fix": (
        ("doctor fix model/ -o fixed/ --dry-run", _("look at the edits")),
        ("doctor fix model/ -o fixed/ --unsafe-fixes", _("also those that change numbers or shapes")),
        ("doctor fix model/ -o fixed/ --from base/", _("lost files and tensors from another copy")),
    ),
    "kvcache": (("doctor kvcache model/ --context 32768 --memory 24GB", ""),),
    "quantize": (
        ("doctor quantize model/ -o q4/ --calibration text.jsonl", ""),
        ("doctor quantize model/ -o fp8/ --scheme FP8_DYNAMIC", ""),
        ("doctor quantize model/ -o q4/ --plan", _("memory and disk that it takes")),
        ("doctor quantize model/ -o q4/ --preflight", _("two layers, nothing written")),
        ("doctor quantize model/ -o q/ --preflight --recipes list.toml", ""),
    ),
    "render": (
        ("doctor render report.json -f html:report.html", ""),
        ("doctor render q4/doctor.json", ""),
    ),
    "rules": (("doctor rules --select G", ""),),
    "trust": (("doctor trust doctor.toml", ""),),
    "tune": (("doctor tune q4/ --to model/ -o tuned/", ""),),
    "undo": (("doctor undo model/", ""),),
    "verify": (
        ("doctor verify model/ q4/", ""),
        ("doctor verify model/ q4/ --tasks choices,gsm8k", ""),
        ("doctor verify model/ q4/ --client vllm --client-python /venv/bin/python", ""),
    ),
}


def grouped(params: Iterable[click.Parameter]) -> list[tuple[Message, list[click.Parameter]]]:
    """(heading, options) of a help page, in the order of GROUPS; one heading where there are few."""
    options = [p for p in params if isinstance(p, click.Option) and not p.hidden]
    if len(options) <= FEW:
        return [(_REST, list(options))]
    place = {name: heading for heading, names in GROUPS for name in names.split()}
    made: dict[Message, list[click.Parameter]] = {heading: [] for heading, _names in GROUPS}
    for option in options:
        made[place.get(option.name or "", _REST)].append(option)
    return [(heading, members) for heading, members in made.items() if members]
