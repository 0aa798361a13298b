"""Words that lower wings keep as data and screens say through a variable: here they are templates too, to be extracted.

tests/locale/test_catalogue.py says which data they must cover.
"""

from doctor.core.messages import _

WORDS = (
    # severities and certainties (core/finding.py)
    _("error"),
    _("warning"),
    _("info"),
    _("certain"),
    _("likely"),
    _("hint"),
    # areas (lint/rule.py)
    _("Files"),
    _("Tensors"),
    _("Tokenizer"),
    _("Config"),
    _("Weights"),
    _("Geometry"),
    _("Calibration"),
    _("Serving"),
    _("Output"),
    _("Settings"),
    # sections of a rule's page (lint/explain.py)
    _("Why it matters"),
    _("Ways out"),
    _("When not to worry"),
    _("How safe the fix is"),
    _("Sources"),
    # what a line under a finding begins with (report/presentation.py)
    _("why"),
    _("else"),
    _("do"),
    _("fix"),
    _("fix!"),
    _("you"),
    _("then"),
    # how safe a fix is
    _("safe"),
    _("unsafe"),
    _("by name"),
    _("manual"),
    # steps of the table by GPU count (report/figures.py)
    _("after safe fixes"),
    _("after padding"),
    _("after unsafe fixes"),
    # the machine of a run, and rows of a receipt (core/host.py, report/figures.py)
    _("when"),
    _("system"),
    _("processor"),
    _("cores"),
    _("memory"),
    _("recipe"),
    _("linears"),
    _("versions"),
    _("calibration"),
    _("note"),
    # phases of a run (cli/progress.py)
    _("compare"),
    _("predict"),
    _("measure"),
    _("score"),
    _("reply"),
    _("quantize"),
    _("tune"),
    _("tune layers"),
    _("tasks"),
    _("reading"),
    _("fetch"),
    _("scan"),
    _("write"),
    _("verify"),
    # verdicts on a cache's keys (evaluate/kvcache/advice.py), and what they head on a page
    _("Q4"),
    _("Q6"),
    _("never Q4"),
    _("unknown"),
    _("4-bit"),
    _("8-bit"),
    _("Q4, key bias apart"),
)
