"""All that a rule file imports: the decorator, findings, fixes and edits, and helpers for what rules have in common.

A rule is one file: its docstring is its page, `check` a generator over facts, `bad()` and `good()` its proof. The
docstring's first line is `CODE name: what is wrong.`; then come sections, each a word and a colon at the start of a
line: `Why:` what follows from it · `Seen as:` lines `- Tool: `exact text`` that other tools print · `Do:` what to do by
hand · `False alarms:` when not to worry · `Fix safety:` · `Sources:`. Other languages have pages of their own in
doctor/locale.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import doctor.scan.gguf_facts
import doctor.scan.header
import doctor.scan.value_facts  # noqa: F401 - both declare facts that rules name
from doctor.checkpoint.dtypes import CONFIG_NAMES, DTYPES, stored_float  # noqa: F401
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.facts import COSTS, SCOPES, Unavailable, fact, highest_cost, parameters, provide  # noqa: F401
from doctor.core.finding import CERTAINTIES, SEVERITIES, Finding, Fix, Place
from doctor.core.messages import _, listed, plural  # noqa: F401
from doctor.core.methods import is_calibrated, is_rounding  # noqa: F401
from doctor.core.numbers import is_finite  # noqa: F401
from doctor.core.recipe import ASKED, is_kept  # noqa: F401
from doctor.core.tables import families_of, family_names, table  # noqa: F401
from doctor.core.tables import family as family_table  # noqa: F401
from doctor.edits.arithmetic import widens  # noqa: F401 - rules import edits from here
from doctor.edits.decoding import coarser, decoding  # noqa: F401
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
from doctor.formats.exl2 import exl2_defects  # noqa: F401
from doctor.formats.known import (  # noqa: F401
    COMPANION_WORDS,
    companion_shapes,
    companions_missing,
    is_mlx_words,
    is_scale_beside_weight,
    is_written,
    mlx_parts_missing,
    mlx_shapes,
    packed_tails,
    packs_fused_experts,
    quantized,
    says_packed,
    shows_packing,
    streams,
    undoes_packing,
)
from doctor.formats.registry import KNOWN, format_of, read_quantization, scale_tails, word_tails  # noqa: F401
from doctor.formats.wanted import MUST, NEVER  # noqa: F401
from doctor.lint.donor_fixes import chat_template_fix, from_base, tensor_from_base, value_from_base, zeros_from_base  # noqa: F401
from doctor.lint.page import QUOTATION, Seen, headline, quotations, sections_of, write_page  # noqa: F401
from doctor.lint.plain_fixes import decoding_fix  # noqa: F401
from doctor.lint.shard_names import parts_of, renumbered  # noqa: F401
from doctor.model.bias_keys import ATTENTION, keyed_linears  # noqa: F401
from doctor.model.chat_template import free_names, parse_template, parsed_template  # noqa: F401
from doctor.model.directory_kind import HALVES, KINDS  # noqa: F401 - declares the fact `kind` too
from doctor.model.expressions import keys_of  # noqa: F401
from doctor.model.fused_experts import holds_experts  # noqa: F401
from doctor.model.gguf_names import architecture_in, unwritable  # noqa: F401
from doctor.model.linears import BUFFERS, ROW_PARALLEL, Linear, is_router, shown_role  # noqa: F401
from doctor.model.lora import ADAPTER, NotMergeable, pairs, product, saved_whole  # noqa: F401
from doctor.model.misnamed import Misnamed  # noqa: F401 - declares the fact `misnamed` too
from doctor.model.prefixes import WrongPrefix, wrong_prefix  # noqa: F401
from doctor.model.quantization_config import quantization_blocks  # noqa: F401
from doctor.model.routing_bias import routing_biases_missing  # noqa: F401
from doctor.model.solve_sizes import assume, solve  # noqa: F401
from doctor.model.spec import ModelSpec  # noqa: F401
from doctor.model.special_tokens import TURN_MARKS, Special, token_text  # noqa: F401 - declares `special` and `embedding_rows`
from doctor.model.spellings import old_keys, rope_of_old_readers  # noqa: F401
from doctor.model.stored_weights import lacks  # noqa: F401 - declares `stored_weights` too
from doctor.model.tensor_map import Placement  # noqa: F401 - declares the fact `placement` too
from doctor.model.turn_end import turn_end  # noqa: F401
from doctor.plan.block_scales import cuts  # noqa: F401 - declares `blocked_linears` too
from doctor.plan.groups import FUSED, GroupedLinear, packed_size, together  # noqa: F401 - declares `layout` too
from doctor.plan.loading import load_problem  # noqa: F401 - declares `packed_loading` too
from doctor.plan.mixture import planned_types, with_mixture  # noqa: F401
from doctor.plan.runtimes import in_force, nearest_plan, old_reader, version_before  # noqa: F401 - declares `kernels` too
from doctor.plan.serving import (  # noqa: F401
    capability_of,
    computes_on,
    first_with,
    groups_of,
    least_capability,
    newest,
    readers_of,
    reads_method,
    schemes,
    serves,
    stated,
)
from doctor.plan.sizes import axis_expression, fits, resized, size_key  # noqa: F401
from doctor.plan.tensor_parallel import on_one_gpu  # noqa: F401
from doctor.scan.packed_words import PackedWordStats  # noqa: F401 - declares `packed_words` and `stored_bytes` too

# Defects of files that lose tensors or make them unreadable: what is then said of the tensors follows from them.
LOST_DATA = ("F001", "F002", "F003", "F004", "F005", "F006", "F007", "F010", "F011", "F018", "F019", "F020")

# Codes are numbered by area; a report says for each area what was checked.
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


@dataclass(frozen=True)
class Rule:
    """A registered rule: identity, the facts it needs, and its page in `doc`, which is parsed when it is first asked
    for.

    cost: that of its most costly fact. check: the generator of findings.
    """

    code: str
    name: str
    title: str
    severity: str
    certainty: str
    scope: str
    cost: str
    needs: tuple[str, ...]
    check: Callable = field(repr=False)
    doc: str = field(repr=False)
    implied_by: tuple[str, ...] = ()
    module: str = ""
    wants: tuple[str, ...] = ()  # facts that it can do without

    @cached_property
    def sections(self) -> dict[str, str]:
        """Heading of each section of the page -> its text."""
        return sections_of(self.doc)

    @cached_property
    def seen_as(self) -> tuple[Seen, ...]:
        """The messages of other tools that the page quotes."""
        return quotations(self.section("Seen as"))

    @property
    def facts(self) -> tuple[str, ...]:
        """All facts it asks for, those it can do without included."""
        return self.needs + self.wants

    @property
    def area(self) -> str:
        """What the rule is about, one of AREAS."""
        return [name for first, name in AREAS if first[0] == self.code[0] and first <= self.code][-1]

    def section(self, name: str) -> str:
        """A section of the page, "" if it has none."""
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
        highest_cost(wants, code)  # they must be facts, but a rule runs without them
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
            highest_cost(needs, code),
            needs,
            check,
            doc,
            implied_by,
            check.__module__,
            wants,
        )
        return check

    return wrap


def finding(
    message: str,
    *,
    at: Place | None = None,
    fix: Fix | None = None,
    advice: str = "",
    evidence: dict[str, Any] | None = None,
    facts_table: Iterable[Iterable[object]] = (),
    strip: dict[str, Any] | None = None,
    severity: str = "",
) -> Finding:
    """One finding, for a rule to yield. `at` defaults to the rule's subject; `severity` may only lower the rule's own.

    Cells of facts_table become text; a Message stays one, so that it can be translated.
    """
    return Finding(
        message,
        at or Place(""),
        dict(evidence or {}),
        fix,
        advice,
        tuple(tuple(cell if isinstance(cell, str) else str(cell) for cell in row) for row in facts_table),
        strip,
        severity=severity,
    )


def run_rule(entry: Rule, subject: str, thing: Any, values: Iterable[Any]) -> Iterator[Finding]:
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


def default_place(subject: str, thing: Any) -> Place:
    """The place of a subject, for a finding that names none."""
    scope = subject.partition(":")[0]
    if scope == "tensor":
        return Place(thing.shard, tensor=thing.name)
    if scope == "linear":
        return Place("", tensor=thing.tensor)
    if scope == "shard":
        return Place(thing.name)
    return Place("config.json")


def element(info: TensorInfo, flat: int) -> Place:
    """Place of one element of a tensor, by its flat index: file, index and byte offset."""
    index: list[int] = []
    rest = flat
    for size in reversed(info.shape):
        index.append(rest % size)
        rest //= size
    return Place(
        info.shard, tensor=info.name, index=tuple(reversed(index)), byte=info.begin + flat * info.dtype.bits // 8
    )


def ranges(found: Iterable[int]) -> str:
    """Numbers of decoder layers as people write them: {0-3,7}."""
    numbers = sorted(set(found))
    parts: list[str] = []
    i = 0
    while i < len(numbers):
        j = i
        while j + 1 < len(numbers) and numbers[j + 1] == numbers[j] + 1:
            j += 1
        parts.append(str(numbers[i]) if i == j else f"{numbers[i]}-{numbers[j]}")
        i = j + 1
    return parts[0] if len(parts) == 1 and "-" not in parts[0] else "{" + ",".join(parts) + "}"
