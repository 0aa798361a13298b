import pytest

from doctor.checkpoint.directory import Checkpoint
from doctor.core import facts
from doctor.core.facts import CHECKPOINT, FACTS, Store, Unavailable, fact, provide
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny
from doctor.scan.header import header_facts


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(facts, "FACTS", dict(FACTS))
    return facts.FACTS


def test_a_misspelt_fact_fails_where_it_is_declared_with_the_nearest_names():
    with pytest.raises(TypeError, match="there is no fact 'n_nann'; nearest: n_nan"):
        facts.latest_stage(("n_nann",), "rule X")


def test_a_derived_fact_is_worked_out_once_and_costs_the_stage_of_what_it_needs(registry):
    calls = []

    @fact("tensor")
    def doubled(tensor, stats):
        calls.append(tensor)
        return stats * 2

    store = Store()
    store.add_subject("tensor", "tensor:a", "thing")
    store.put("tensor:a", "stats", 21)
    assert registry["doubled"].stage == "values"
    assert store.get("tensor:a", "doubled") == store.get("tensor:a", "doubled") == 42 and calls == ["thing"]


def test_a_derived_fact_that_failed_is_worked_out_again_when_what_it_lacked_is_provided(registry):
    @fact("tensor")
    def doubled(tensor, stats):
        return stats * 2

    store = Store()
    store.add_subject("tensor", "tensor:a", "thing")
    with pytest.raises(Unavailable):
        store.get("tensor:a", "doubled")
    store.put("tensor:a", "stats", 21)
    assert store.get("tensor:a", "doubled") == 42


def test_an_asker_gets_none_for_a_fact_that_it_can_do_without(registry):
    @fact("tensor", stage="header")
    def size(tensor):
        raise Unavailable("no size")

    @fact("tensor", stage="header")
    def label(tensor, size=None):
        return (tensor, size)

    store = Store()
    store.add_subject("tensor", "tensor:a", "thing")
    assert store.get("tensor:a", "label") == ("thing", None) and registry["label"].stage == "header"
    assert facts.closure(["label"]) == {"label", "size"}


def test_a_fact_wants_none_that_comes_after_it_and_no_other_default(registry):
    with pytest.raises(TypeError, match="one of stats is of a later stage than header"):
        fact("tensor", stage="header")(lambda tensor, stats=None: stats)
    with pytest.raises(TypeError, match="has the default None"):
        fact("tensor")(lambda tensor, stats=0: stats)


def test_a_fact_that_was_not_produced_says_why(registry):
    store = Store()
    store.add_subject("tensor", "tensor:a", None)
    store.say_missing("values", "the weights were not read")
    with pytest.raises(Unavailable, match="the weights were not read"):
        store.get("tensor:a", "n_nan")
    assert not store.has("tensor:a", "n_nan")


def test_a_linear_may_ask_for_facts_of_its_weight_and_of_the_checkpoint_alone(tmp_path):
    store = header_facts(Checkpoint.open(tiny().write(tmp_path)), Recipe())
    linear = next(iter(store.subjects("linear")))
    store.put("tensor:" + store.subjects("linear")[linear].tensor, "stats", "its stats")
    assert store.get(linear, "stats") == "its stats" and store.get(linear, "spec").family == "llama"
    with pytest.raises(TypeError, match="a rule on checkpoint cannot ask for stats"):
        store.get(CHECKPOINT, "stats")


def test_two_facts_of_one_name_are_refused(registry):
    provide("mine", "tensor", "values", "first")
    provide("mine", "tensor", "values", "first")
    with pytest.raises(TypeError, match="declared twice"):
        provide("mine", "tensor", "values", "second")


def test_every_provided_fact_has_a_document_and_every_stage_is_known():
    for entry in FACTS.values():
        assert entry.doc and entry.stage in facts.STAGES and entry.scope in facts.SCOPES, entry.name


def test_every_gathers_a_fact_over_its_subjects_and_says_why_there_is_none(registry):
    store = Store()
    store.add_subject("checkpoint", CHECKPOINT, None)
    for name in "ab":
        store.add_subject("tensor", f"tensor:{name}", None)
    store.say_missing("values", "the weights were not read")
    with pytest.raises(Unavailable, match="the weights were not read"):
        store.get(CHECKPOINT, "every_stats")
    store.put("tensor:b", "stats", 1)
    assert store.get("tensor:a", "every_stats") == {"b": 1}
    assert facts.known_fact("every_recipe") is None and facts.known_fact("every_stats").stage == "values"


def test_what_a_fact_rests_on_is_known_through_facts_that_gather():
    assert facts.asks("values", ["dead_inputs"]) and facts.asks("values", ["every_stats"])
    assert not facts.asks("values", ["spec", "tokenizer"])
