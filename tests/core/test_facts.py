import pytest

from doctor.checkpoint.directory import Checkpoint
from doctor.core import facts
from doctor.core.facts import CHECKPOINT, FACTS, Unavailable, fact, provide
from doctor.core.recipe import Recipe
from doctor.core.store import Store
from doctor.lint.engine import load_rules
from doctor.lint.testing import tiny
from doctor.scan.header import SPEC, header_facts
from doctor.scan.value_facts import STATS


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(facts, "FACTS", dict(FACTS))
    return facts.FACTS


def test_a_misspelt_fact_fails_where_it_is_declared_with_the_nearest_names():
    with pytest.raises(TypeError, match="there is no fact 'n_nann'; nearest: n_nan"):
        facts.highest_cost(("n_nann",), "rule X")


def test_a_derived_fact_is_worked_out_once_and_costs_the_stage_of_what_it_needs(registry):
    calls = []

    @fact("tensor")
    def doubled(tensor, stats):
        calls.append(tensor)
        return stats * 2

    store = Store()
    store.add_subject("tensor", "tensor:a", "thing")
    store.put(STATS, 21, "tensor:a")
    assert registry["doubled"].cost == "values"
    assert store.value("doubled", "tensor:a") == store.value("doubled", "tensor:a") == 42 and calls == ["thing"]


def test_a_derived_fact_that_failed_is_worked_out_again_when_what_it_lacked_is_provided(registry):
    @fact("tensor")
    def doubled(tensor, stats):
        return stats * 2

    store = Store()
    store.add_subject("tensor", "tensor:a", "thing")
    with pytest.raises(Unavailable):
        store.value("doubled", "tensor:a")
    store.put(STATS, 21, "tensor:a")
    assert store.value("doubled", "tensor:a") == 42


def test_an_asker_gets_none_for_a_fact_that_it_can_do_without(registry):
    @fact("tensor", cost="header")
    def size(tensor):
        raise Unavailable("no size")

    @fact("tensor", cost="header")
    def label(tensor, size=None):
        return (tensor, size)

    store = Store()
    store.add_subject("tensor", "tensor:a", "thing")
    assert store.value("label", "tensor:a") == ("thing", None) and registry["label"].cost == "header"
    assert facts.closure(["label"]) == {"label", "size"}


def test_a_fact_wants_none_that_comes_after_it_and_no_other_default(registry):
    with pytest.raises(TypeError, match="one of stats costs more than header"):
        fact("tensor", cost="header")(lambda tensor, stats=None: stats)
    with pytest.raises(TypeError, match="has the default None"):
        fact("tensor")(lambda tensor, stats=0: stats)


def test_a_fact_that_was_not_produced_says_why(registry):
    store = Store()
    store.add_subject("tensor", "tensor:a", None)
    store.say_missing("values", "the weights were not read")
    with pytest.raises(Unavailable, match="the weights were not read"):
        store.value("n_nan", "tensor:a")
    assert not store.has_value("n_nan", "tensor:a")


def test_a_linear_may_ask_for_facts_of_its_weight_and_of_the_checkpoint_alone(tmp_path):
    store = header_facts(Checkpoint.open(tiny().write(tmp_path)), Recipe())
    linear = next(iter(store.subjects("linear")))
    store.put(STATS, "its stats", "tensor:" + store.subjects("linear")[linear].tensor)
    assert store.get(STATS, linear) == "its stats" and store.get(SPEC, linear).family == "llama"
    with pytest.raises(TypeError, match="a rule on checkpoint cannot ask for stats"):
        store.get(STATS)


def test_two_facts_of_one_name_are_refused(registry):
    provide("mine", "tensor", "values", "first")
    provide("mine", "tensor", "values", "first")
    with pytest.raises(TypeError, match="declared twice"):
        provide("mine", "tensor", "values", "second")


def test_every_provided_fact_has_a_document_and_every_stage_is_known():
    for entry in FACTS.values():
        assert entry.doc and entry.cost in facts.COSTS and entry.scope in facts.SCOPES, entry.name


def test_every_gathers_a_fact_over_its_subjects_and_says_why_there_is_none(registry):
    store = Store()
    store.add_subject("checkpoint", CHECKPOINT, None)
    for name in "ab":
        store.add_subject("tensor", f"tensor:{name}", None)
    store.say_missing("values", "the weights were not read")
    with pytest.raises(Unavailable, match="the weights were not read"):
        store.value("every_stats")
    store.put(STATS, 1, "tensor:b")
    assert store.value("every_stats", "tensor:a") == {"b": 1}
    assert facts.known_fact("every_recipe") is None and facts.known_fact("every_stats").cost == "values"


def test_what_a_fact_rests_on_is_known_through_facts_that_gather():
    assert facts.asks("values", ["dead_inputs"]) and facts.asks("values", ["every_stats"])
    assert not facts.asks("values", ["spec", "tokenizer"])


def test_the_table_of_facts_lists_every_fact_with_scope_cost_and_doc():
    load_rules()
    table = facts.fact_table()
    assert {one.name for one in table} == set(FACTS) and all(one.doc for one in table)
    assert [(facts.SCOPES.index(x.scope), facts.COSTS.index(x.cost), x.name) for x in table] == sorted(
        (facts.SCOPES.index(x.scope), facts.COSTS.index(x.cost), x.name) for x in table
    )
    assert [one.name for one in facts.fact_table("tensor", "values") if one.name == "n_nan"] == ["n_nan"]
    assert {one.scope for one in facts.fact_table("linear")} == {"linear"}
    assert {one.cost for one in facts.fact_table(cost="output")} == {"output"}


def test_a_key_asks_for_the_fact_whose_function_it_names(tmp_path):
    checkpoint = Checkpoint.open(tiny().write(tmp_path))
    store = header_facts(checkpoint, tiny().recipe)
    assert facts.key_of(FACTS["spec"].compute) == SPEC and store.get(SPEC).family == "llama"
    assert store.find(STATS, "tensor:lm_head.weight") is None and store.find(SPEC) is store.get(SPEC)
    with pytest.raises(TypeError, match="there is no fact 'n_nann'"):
        store.value("n_nann")
