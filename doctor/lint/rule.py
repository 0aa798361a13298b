"""All that a rule file imports: the decorator, findings, fixes and the closed set of edits.

A rule is one file: its docstring is its page, `check` a generator over facts, `bad()` and `good()` its proof. The
docstring's first line is `CODE name: what is wrong.`; then come sections, each a word and a colon at the start of a
line: `Why:` what follows from it · `Seen as:` lines `- Tool: `exact text`` that other tools print · `Do:` what to do by
hand · `False alarms:` when not to worry · `Fix safety:` · `Sources:`. Other languages have pages of their own in
doctor/locale.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import doctor.scan.header
import doctor.scan.value_facts  # noqa: F401 - both declare facts that rules name
from doctor.core.facts import SCOPES, STAGES, Unavailable, fact, latest_stage, parameters, provide  # noqa: F401
from doctor.core.finding import CERTAINTIES, SEVERITIES, Finding, Fix, Place
from doctor.core.messages import _, listed, plural  # noqa: F401
from doctor.core.methods import is_calibrated, is_rounding  # noqa: F401
from doctor.core.recipe import ASKED, is_kept  # noqa: F401
from doctor.core.tables import families_of, table  # noqa: F401
from doctor.core.tables import family as family_table  # noqa: F401
from doctor.edits.arithmetic import widens  # noqa: F401 - rules import edits from here
from doctor.edits.kinds import (  # noqa: F401 - rules import edits from here
    MISSING,
    AddLowRank,
    CastTensor,
    ClampTensor,
    CleanJson,
    Dequantize,
    DropFile,
    DropTensor,
    Edit,
    EqualZeros,
    GroupsInOrder,
    GrowRows,
    Keep,
    NameFormat,
    PadTensor,
    Rebase,
    RebuildIndex,
    RemoveJson,
    RenameFile,
    RenameTensor,
    ReplaceNonfinite,
    ReplaceText,
    SetJson,
    SetRecipe,
    ShiftZeros,
    TakeTensor,
)
from doctor.edits.padding import grown, keep_edits, pad_edits  # noqa: F401
from doctor.formats.base import KNOWN, read_quantization, scale_tails, word_tails  # noqa: F401
from doctor.formats.known import is_scale_beside_weight, packed_tails, says_packed, shows_packing  # noqa: F401
from doctor.model.lora import ADAPTER, NotMergeable, pairs, product, saved_whole  # noqa: F401
from doctor.model.spec import ROW_PARALLEL, Linear, ModelSpec  # noqa: F401
from doctor.model.special_tokens import TURN_MARKS, Special, token_text  # noqa: F401 - declares `special` and `embedding_rows`
from doctor.model.tensor_map import Placement, assume, keys_of, solve  # noqa: F401 - declares the fact `placement` too
from doctor.plan.groups import FUSED, GroupedLinear, packed_size, together  # noqa: F401 - declares `layout` too
from doctor.plan.runtimes import in_force, nearest_plan, version_before  # noqa: F401 - declares `kernels` too
from doctor.plan.sizes import axis_expression, fits, resized, size_key  # noqa: F401
from doctor.plan.tensor_parallel import on_one_gpu  # noqa: F401
from doctor.scan.packed_words import PackedWordStats  # noqa: F401 - declares `packed_words` too

# Codes are numbered by area; a report says for each area what was established.
AREAS = (
    ("F001", "Files"),
    ("F050", "Tensors"),
    ("C100", "Tokenizer"),
    ("C140", "Config"),
    ("W200", "Weights"),
    ("G300", "Geometry"),
    ("Q400", "Calibration"),
    ("K500", "Serving"),
    ("O600", "Output"),
    ("S001", "Settings"),
)
_SECTION = re.compile(r"^(Why|Seen as|Do|False alarms|Fix safety|Sources):[ ]*", re.M)
QUOTATION = re.compile(r"^- ([^:`]+): (``?)(.+)\2\s*$", re.M)
_FIRST = re.compile(r"^([A-Z]\d{3}) ([a-z][a-z0-9-]+): (.+?)\.?$", re.S)


@dataclass(frozen=True)
class Seen:
    """What another tool prints for the same defect, word for word."""

    tool: str
    text: str


@dataclass(frozen=True)
class Rule:
    """A registered rule: identity, what it needs, and in `doc` its page, which is taken apart when it is first looked
    at.
    """

    code: str
    name: str
    title: str
    severity: str
    certainty: str
    scope: str
    stage: str
    needs: tuple[str, ...]
    check: Callable = field(repr=False)
    doc: str = field(repr=False)
    implied_by: tuple[str, ...] = ()
    module: str = ""
    wants: tuple[str, ...] = ()  # facts that it can do without

    @cached_property
    def sections(self) -> dict[str, str]:
        """Heading of each section of the page -> its text."""
        parts = _SECTION.split(inspect.cleandoc(self.doc))
        return {parts[i]: parts[i + 1].strip() for i in range(1, len(parts) - 1, 2)}

    @cached_property
    def seen_as(self) -> tuple[Seen, ...]:
        """What other tools print for it. A quotation stands between single backticks or between double ones, and may
        hold others.
        """
        return tuple(
            Seen(tool.strip(), text) for tool, _fence, text in QUOTATION.findall(self.sections.get("Seen as", ""))
        )

    @property
    def facts(self) -> tuple[str, ...]:
        """All facts it asks for, those it can do without included."""
        return self.needs + self.wants

    @property
    def area(self) -> str:
        return [name for first, name in AREAS if first[0] == self.code[0] and first <= self.code][-1]

    def section(self, name: str) -> str:
        """A section of the page, "" where it has none."""
        return self.sections.get(name, "")


RULES: dict[str, Rule] = {}


def rule(code: str, severity: str, *, certainty: str = "certain", implied_by: tuple[str, ...] = ()):
    """Register the decorated generator as the rule of its file.

    The first parameter is the scope (checkpoint, shard, tensor, linear), the others are facts; with the default None,
    one it can do without. `implied_by` are codes whose finding on the same tensor or file (or on the checkpoint)
    explains this one, which is then folded under it.
    """

    def wrap(check: Callable) -> Callable:
        module = sys.modules[check.__module__]
        doc = module.__doc__ or ""
        name, title = headline(doc, code)
        scope, needs, wants = parameters(check)
        latest_stage(wants, code)  # they must be facts, but a rule runs without them
        if scope not in SCOPES or severity not in SEVERITIES or certainty not in CERTAINTIES:
            raise TypeError(
                f"rule {code}: scope {scope!r}, severity {severity!r} or certainty {certainty!r} is unknown"
            )
        if severity == "error" and certainty != "certain":
            raise TypeError(f"rule {code}: an error must be certain")
        if code in RULES and RULES[code].module != check.__module__:
            raise TypeError(f"rule {code}: in {RULES[code].module} and in {check.__module__}")
        RULES[code] = Rule(
            code,
            name,
            title,
            severity,
            certainty,
            scope,
            latest_stage(needs, code),
            needs,
            check,
            doc,
            implied_by,
            check.__module__,
            wants,
        )
        return check

    return wrap


def headline(doc: str, code: str) -> tuple[str, str]:
    """(name, title) of a page. Raises TypeError where it does not begin as it must."""
    match = _FIRST.match(_SECTION.split(doc.strip().partition("\n\n")[0], 1)[0].strip())
    if not match or match[1] != code:
        raise TypeError(f"rule {code}: the docstring must begin with '{code} name: what is wrong.'")
    return match[2], " ".join(match[3].split())


def write_page(code: str, name: str, title: str, sections: Mapping[str, str]) -> str:
    """The page that has these sections: what Rule.doc is to a rule that comes without its file."""
    return "\n\n".join([f"{code} {name}: {title}.", *(f"{heading}: {text}" for heading, text in sections.items())])


def finding(
    message: str,
    *,
    at: Place | None = None,
    fix: Fix | None = None,
    advice: str = "",
    evidence: dict | None = None,
    facts_table=(),
    strip: dict | None = None,
    severity: str = "",
) -> Finding:
    """One finding, to be yielded by a rule. `at` defaults to the rule's subject; `severity` may only lower the rule's
    own.
    """
    return Finding(
        message,
        at or Place(""),
        dict(evidence or {}),
        fix,
        advice,
        tuple(tuple(map(str, row)) for row in facts_table),
        strip,
        severity=severity,
    )


def from_base(base, name: str, otherwise: str) -> Fix:
    """A whole file from the donor (--from): safe where evidence shows that it is the lost one. Without a donor,
    `otherwise` tells the user what to do.
    """
    offer = base.offer_file(name) if base is not None else None
    if offer is None:
        return Fix(otherwise, (), "manual")
    edit, why = offer
    if why:
        return Fix(_("take {name} from {base}: {why}", name=name, base=base.text, why=why), (edit,), "safe")
    return Fix(_("take {name} from {base}", name=name, base=base.text), (edit,), "unsafe")


def tensor_from_base(base, tensor) -> Fix | None:
    """This tensor from the donor, in the same dtype and shape: unsafe, because it may have been trained here."""
    edit = base.offer(tensor.name, tensor.dtype.name, tensor.shape) if base is not None else None
    return edit and Fix(_("take the tensor from {base}", base=base.text), (edit,), "unsafe")


def zeros_from_base(base, tensor) -> Fix | None:
    """This tensor from the donor, where only zeros here differ: unsafe, because pruning makes such zeros too."""
    edit = base.offer(tensor.name, tensor.dtype.name, tensor.shape) if base is not None else None
    why = base.fills(tensor) if edit is not None else ""
    return Fix(_("take the tensor from {base}: {why}", base=base.text, why=why), (edit,), "unsafe") if why else None


def value_from_base(base, file: str, pointer: str, now: object, otherwise: str) -> Fix:
    """One JSON value from the donor: unsafe, because a fine-tune may have changed it. Without a donor, `otherwise` says
    what to do.
    """
    value = base.value(file, pointer) if base is not None else MISSING
    if value is MISSING or value == now or value != value:
        return Fix(otherwise, (), "manual")
    key = pointer.rpartition("/")[2]
    return Fix(
        _('set "{key}" as {base} has it', key=key, base=base.text), (SetJson(file, pointer, value, now),), "unsafe"
    )


def run_rule(entry: Rule, subject: str, thing: object, values: tuple) -> Iterator[Finding]:
    """Findings of one rule on one subject, completed with the rule's identity and a default place."""
    for item in entry.check(thing, *values):
        severity = item.severity or entry.severity
        if SEVERITIES.index(severity) < SEVERITIES.index(entry.severity):
            raise TypeError(f"rule {entry.code} raised its severity to {severity}")
        where = item.where if item.where.file or item.where.tensor else default_place(subject, thing)
        yield replace(
            item,
            where=where,
            code=entry.code,
            name=entry.name,
            severity=severity,
            certainty=entry.certainty,
            subject=subject,
        )


def default_place(subject: str, thing: object) -> Place:
    """Where a subject lies when a rule does not say."""
    scope = subject.partition(":")[0]
    if scope == "tensor":
        return Place(thing.shard, tensor=thing.name)
    if scope == "linear":
        return Place("", tensor=thing.tensor)
    if scope == "shard":
        return Place(thing.name)
    return Place("config.json")


def element(info, flat: int) -> Place:
    """Place of one element of a tensor, by its flat index: file, index and byte offset."""
    index, rest = [], flat
    for size in reversed(info.shape):
        index.append(rest % size)
        rest //= size
    return Place(
        info.shard, tensor=info.name, index=tuple(reversed(index)), byte=info.begin + flat * info.dtype.bits // 8
    )


def ranges(numbers) -> str:
    """Block numbers as people write them: {0-3,7}."""
    numbers = sorted(set(numbers))
    parts, i = [], 0
    while i < len(numbers):
        j = i
        while j + 1 < len(numbers) and numbers[j + 1] == numbers[j] + 1:
            j += 1
        parts.append(str(numbers[i]) if i == j else f"{numbers[i]}-{numbers[j]}")
        i = j + 1
    return parts[0] if len(parts) == 1 and "-" not in parts[0] else "{" + ",".join(parts) + "}"
