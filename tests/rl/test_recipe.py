"""Recipes: what they merge to, that they survive being printed, and the one sentence each mistake ends with."""

import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rl.choices import Aggregation, ContextStrategy, EngineKind, ZeroVariance
from rl.config import Domain, EnvironmentUse, Model, Recipe, RewardUse, Sampling
from rl.errors import RecipeError
from rl.recipe import load_recipe, to_yaml
from rl.recipe_checks import _RANGES

WHOLE = """\
name: whole
model: {path: /models/small}
domains:
  math:
    prompts: /data/math.jsonl
    rewards:
      - use: math_answer
      - use: length_penalty
        weight: 0.1
        args: {target: 4096}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def complaint(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence.replace(f"{path.parent}/", "")


def test_defaults_fill_what_is_not_written(write):
    recipe = load_recipe(write(WHOLE))
    domain = Domain(
        prompts="/data/math.jsonl",
        rewards=[RewardUse(use="math_answer"), RewardUse(use="length_penalty", weight=0.1, args={"target": 4096})],
    )
    assert recipe == Recipe(name="whole", model=Model(path="/models/small"), domains={"math": domain})
    assert isinstance(recipe.domains["math"].rewards[0], RewardUse)


def test_values_keep_their_types(write):
    recipe = load_recipe(
        write(
            WHOLE + "learner: {lr: 3e-6, grad_clip: 1}\nobjective: {off_policy_delta: null, aggregation: token_mean}\n"
        )
    )
    assert recipe.learner.lr == 3e-6 and recipe.learner.grad_clip == 1.0
    assert recipe.objective.off_policy_delta is None
    assert recipe.objective.aggregation is Aggregation.token_mean


class TestExtends:
    def test_merges_key_by_key_along_the_chain(self, write):
        write(WHOLE + "sampling: {top_p: 0.9, top_k: 20}\n", "base/root.yaml")
        write("extends: base/root.yaml\nsampling: {top_k: 50}\nsteps: 7\n", "middle.yaml")
        recipe = load_recipe(write("extends: ../middle.yaml\nname: leaf\nsampling: {min_p: 0.1}\n", "leaves/leaf.yaml"))
        assert recipe.name == "leaf" and recipe.steps == 7
        assert recipe.sampling == Sampling(top_p=0.9, top_k=50, min_p=0.1)

    def test_replaces_lists(self, write):
        write(WHOLE, "base.yaml")
        recipe = load_recipe(write("extends: base.yaml\ndomains: {math: {rewards: [{use: format}]}}\n"))
        assert [reward.use for reward in recipe.domains["math"].rewards] == ["format"]

    def test_an_empty_section_changes_nothing(self, write):
        write(WHOLE + "sampling: {top_k: 5}\n", "base.yaml")
        recipe = load_recipe(write("extends: base.yaml\nsampling:\n  # top_k: 7\ndomains:\n"))
        assert recipe.sampling.top_k == 5 and "math" in recipe.domains

    def test_paths_are_relative_to_the_file_that_holds_them(self, write, tmp_path, monkeypatch):
        data = "prompts: data/a.jsonl, eval_prompts: {file: ../b.parquet}"
        write(f"name: x\nmodel: {{path: model}}\ndomains: {{d: {{{data}, rewards: [{{use: r}}]}}}}\n", "base/root.yaml")
        leaf = write("extends: base/root.yaml\nsupervised: {steps: 1, demonstrations: shown.jsonl}\n", "leaf.yaml")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        recipe = load_recipe(leaf)
        assert recipe.model.path == str(tmp_path / "base/model")
        assert recipe.domains["d"].prompts == str(tmp_path / "base/data/a.jsonl")
        assert recipe.domains["d"].eval_prompts == {"file": str(tmp_path / "b.parquet")}
        assert recipe.supervised.demonstrations == str(tmp_path / "shown.jsonl")
        assert load_recipe(leaf, ["model.path=here"]).model.path == str(tmp_path / "elsewhere/here")

    def test_a_circle_is_named(self, write):
        write("extends: b.yaml\n", "a.yaml")
        path = write("extends: a.yaml\n", "b.yaml")
        assert complaint(path) == "recipes extend each other in a circle: b.yaml -> a.yaml -> b.yaml"

    def test_a_missing_one_is_named_with_its_line(self, write):
        assert complaint(write("name: x\nextends: nope.yaml\n")) == (
            "recipe.yaml:2: extends nope.yaml, but there is no file nope.yaml; write its path from the folder of "
            "recipe.yaml"
        )


class TestOverrides:
    def test_reach_every_depth_and_are_yaml(self, write):
        recipe = load_recipe(
            write(WHOLE),
            [
                "steps=3",
                "rollout.engine=vllm",
                "model.dtype=bfloat16",
                "learner.lr=1e-4",
                "domains.math.rewards.1.weight=0.5",
                "domains.math.rewards[1].args.limit=9",
                "domains.code={prompts: /c.jsonl, rewards: [{use: unit_tests}]}",
                "objective.off_policy_delta=null",
                "domains.math.system=a = b",
            ],
        )
        assert recipe.steps == 3 and recipe.rollout.engine is EngineKind.vllm and recipe.learner.lr == 1e-4
        penalty = RewardUse(use="length_penalty", weight=0.5, args={"target": 4096, "limit": 9})
        assert recipe.domains["math"].rewards == [RewardUse(use="math_answer"), penalty]
        assert recipe.domains["code"].prompts == "/c.jsonl"
        assert recipe.objective.off_policy_delta is None
        assert recipe.domains["math"].system == "a = b"

    def test_the_last_one_wins(self, write):
        assert load_recipe(write(WHOLE + "seed: 1\n"), ["seed=2", "seed=3"]).seed == 3

    @pytest.mark.parametrize(
        ("override", "sentence"),
        [
            ("steps", ": an override is written key.path=value"),
            ("a..b=1", ": an override is written key.path=value"),
            ("sampling.topp=1", ": unknown key 'sampling.topp'; did you mean 'top_p'?"),
            ("sampling.top_p=2", ": sampling.top_p is 2.0; it must be above 0 and at most 1"),
            ("sampling={top_p: 2}", ": sampling.top_p is 2.0; it must be above 0 and at most 1"),
            ("domains.math.rewards.5.weight=1", ": '5' is not one of the 2 elements, numbered from 0"),
            ("domains.math.rewards.0.weight=-1", ": domains.math.rewards[0].weight is -1.0; it must be 0 or more"),
            ("steps={", ":1: this is not YAML: expected the node content, but found '<stream end>'"),
        ],
    )
    def test_mistakes_name_the_override(self, write, override, sentence):
        assert complaint(write(WHOLE + "sampling: {top_p: 0.9}\n"), override) == f"override '{override}'{sentence}"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stepz: 3\n", ":11: unknown key 'stepz'; did you mean 'steps'?"),
        ("sampling:\n  top_k: 3\n  top_pp: 1\n", ":13: unknown key 'sampling.top_pp'; did you mean 'top_p'?"),
        ("max_staleness: 3\n", ":11: unknown key 'max_staleness'; did you mean 'rollout.max_staleness'?"),
        ("steps: many\n", ":11: steps is 'many'; it must be a whole number"),
        ("steps: 1.5\n", ":11: steps is 1.5; it must be a whole number"),
        ("steps: true\n", ":11: steps is True; it must be a whole number"),
        ("steps:\n", ":11: steps is empty; it must be a whole number"),
        ("learner: {lr: fast}\n", ":11: learner.lr is 'fast'; it must be a number"),
        ("learner:\n  betas: [0.9, x]\n", ":12: learner.betas[1] is 'x'; it must be a number"),
        ("learner: {betas: 0.9}\n", ":11: learner.betas is 0.9; it must be a list"),
        ("objective: {keep_routing: 3}\n", ":11: objective.keep_routing is 3; it must be true or false"),
        ("rollout: {engine: vlm}\n", ":11: rollout.engine is 'vlm'; it must be one of torch, vllm"),
        ("runs: [a]\n", ":11: runs is ['a']; it must be text"),
        ("sampling: 3\n", ":11: sampling is 3; it must be a section with keys such as temperature, top_p, top_k"),
        ("name: again\n", ":11: name is already set in line 1"),
        ("runs: ${nope}\n", ":11: runs: Interpolation key 'nope' not found"),
        ("runs: [\n", ":12: this is not YAML: expected the node content, but found '<stream end>'"),
    ],
)
def test_keys_and_types(write, text, sentence):
    assert complaint(write(WHOLE + text)) == f"recipe.yaml{sentence}"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("prompts:", "promts:"), ":5: unknown key 'domains.math.promts'; did you mean 'prompts'?"),
        (("weight: 0.1", "wieght: 0.1"), ":9: unknown key 'domains.math.rewards[1].wieght'; did you mean 'weight'?"),
        (("weight: 0.1", "weight: heavy"), ":9: domains.math.rewards[1].weight is 'heavy'; it must be a number"),
        (("weight: 0.1", "weight: -0.1"), ":9: domains.math.rewards[1].weight is -0.1; it must be 0 or more"),
        (("name: whole\n", ""), ": no value for name; write it there or add name=..."),
        (
            ("/data/math.jsonl", "???"),
            ": no value for domains.math.prompts; write it there or add domains.math.prompts=...",
        ),
        (
            ("domains:\n", "domains:\n  maths: {group_size: 4}\n"),
            ":4: no value for domains.maths.prompts; write it there or add domains.maths.prompts=...; "
            "if it is no new domain, did you mean 'math'?",
        ),
        (("/data/math.jsonl", "[1]"), ":5: domains.math.prompts is [1]; it must be a file or {reasoning_gym: task}"),
        (("path: /models/small", "path: ???"), ": no value for model.path; write it there or add model.path=..."),
        (("model: {path: /models/small}\n", ""), ": give either model.path or model.init"),
        (
            ("{path: /models/small}", "{path: /m, init: {}}"),
            ":2: give either model.path or model.init, not both; set the other one to null",
        ),
    ],
)
def test_mistakes_inside_domains_and_models(write, change, sentence):
    assert complaint(write(WHOLE.replace(*change))) == f"recipe.yaml{sentence}"


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (
            ["prompts_per_step=10", "learner.minibatches=4"],
            "prompts_per_step is 10; it must be a multiple of learner.minibatches, which is 4",
        ),
        (["sampling.max_tokens=4096"], "leaves no room for a prompt in model.max_context 4096"),
        (["rollout.tensor_parallel=2"], "the torch engine runs in one process"),
        (["rollout.dsa=keel"], "rollout.dsa keel is a choice within vLLM, but rollout.engine is torch"),
        (
            ["objective.keep_selection=true", "rollout.engine=vllm", "model.dtype=bfloat16"],
            "objective.keep_selection needs rollout.dsa keel: vLLM's own sparse attention does not return",
        ),
        (["rollout.batch_invariant=true"], "rollout.batch_invariant true is a choice within vLLM, but rollout.engine"),
        (["supervised.steps=5"], "supervised.demonstrations names nothing to learn from"),
        (["checkpoint.best=eval/maths", "evaluation.num_prompts=4"], "checkpoint.best is eval/maths, which nothing"),
        (["checkpoint.best=eval/math"], "checkpoint.best is eval/math, which nothing measures"),
        ([f"seed={2**63}"], f"seed is {2**63}; it must be from 0 to {2**63 - 1}"),
        (["supervised.dense_warmup_steps=5"], "supervised.dense_warmup_steps is 5, but supervised.steps is 0"),
        (["domains.math.weight=0"], "domains.math.weight is 0.0; it must be above 0"),
        (["domains.mean=${domains.math}"], "a domain cannot be called 'mean': reward/mean is another metric"),
        (["domains.math/format=${domains.math}"], "a domain cannot be called 'math/format': reward/math/format is"),
        (["learner.zero_stage=0", "model.dtype=bfloat16"], "learner.zero_stage 0 trains float32 only"),
        (["domains.math.rewards=[]"], "domains.math.rewards is empty"),
        (
            ["domains.math.rewards.0.weight=0", "domains.math.rewards.1.weight=0"],
            "all rewards of domains.math have weight 0",
        ),
        (["name=a/b"], "a directory name"),
        (["name=.."], "a directory name"),
        (["learner.betas=[0.9]"], "two numbers"),
        (["steps=${name}"], "'whole' of type 'str' could not be converted to Integer"),
        (["learner.lr=.nan"], "learner.lr is nan; it must be finite"),
        (["learner.zero_stage=4"], "learner.zero_stage is 4; it must be 0, 1, 2 or 3"),
        (["domains.math.group_size=1"], "domains.math.group_size is 1; it must be 2 or more"),
    ],
)
def test_values_that_cannot_work(write, overrides, fragment):
    assert fragment in complaint(write(WHOLE), *overrides)


def test_selections_that_vllm_returns_can_be_kept(write):
    overrides = ["rollout.engine=vllm", "rollout.dsa=keel", "model.dtype=bfloat16", "objective.keep_selection=true"]
    assert load_recipe(write(WHOLE), overrides).objective.keep_selection


def test_a_recipe_without_domains(write):
    assert complaint(write("name: x\nmodel: {path: /m}\n")) == "recipe.yaml: domains is empty; name at least one"


SECTIONS = {
    Recipe: "",
    Domain: "domains.math.",
    RewardUse: "domains.math.rewards[0].",
    EnvironmentUse: "domains.math.environment.",
}
WITH_TOOLS = WHOLE + "    environment: {use: search}\n"
NUMBERS = [
    (SECTIONS.get(section, f"{section.__name__.lower()}.") + name, allowed.words)
    for section, ranges in _RANGES.items()
    for name, allowed in ranges.items()
    if get_type_hints(section)[name] in (int, float, float | None)
]


@pytest.mark.parametrize(("key", "words"), NUMBERS)
def test_no_number_may_be_negative(write, key, words):
    assert re.search(rf": {re.escape(key)} is -1(\.0)?; it must be {words}$", complaint(write(WITH_TOOLS), f"{key}=-1"))


def test_every_number_of_the_recipe_has_a_range():
    """A field that is added to rl/config.py without a range would pass any value on to a traceback."""

    def numbers(section):
        for field in fields(section):
            hint = get_type_hints(section)[field.name]
            for option in (hint, *get_args(hint)):
                if is_dataclass(option):
                    yield from numbers(option)
                elif option in (int, float):
                    yield section, field.name

    without = [f"{section.__name__}.{name}" for section, name in numbers(Recipe) if name not in _RANGES[section]]
    assert not without


def test_environments(write):
    recipe = load_recipe(write(WITH_TOOLS), ["domains.math.environment.context=discard_75"])
    environment = recipe.domains["math"].environment
    assert environment == EnvironmentUse(use="search", context=ContextStrategy.discard_75)
    assert to_yaml(load_recipe(write(to_yaml(recipe), "again.yaml"))) == to_yaml(recipe)
    assert load_recipe(write(WHOLE)).domains["math"].environment is None


def test_paths_in_the_arguments_of_an_environment_are_relative_to_the_recipe(write):
    text = WHOLE + "    environment: {use: search, args: {corpus: ./corpus.jsonl, name: corpus.jsonl, n: [../x]}}\n"
    path = write(text, "below/recipe.yaml")
    environment = load_recipe(path).domains["math"].environment
    assert environment is not None
    assert environment.args == {"corpus": str(path.parent / "corpus.jsonl"), "name": "corpus.jsonl", "n": ["../x"]}


@pytest.mark.parametrize(
    ("text", "overrides", "fragment"),
    [
        (WHOLE, ["domains.math.environment.max_turns=3"], "no value for domains.math.environment.use"),
        (WHOLE, ["domains.math.prompt_style=tools"], "domains.math.environment names no tools"),
        (WHOLE, ["domains.math.prompt_style=reasoning", "domains.math.thinking=false"], "thinking to be true"),
        (WITH_TOOLS, ["domains.math.prompt_style=tools"], "prompt_style tools needs domains.math.thinking to be false"),
        (WHOLE, ["domains.math.prompt_style=reasoning", "domains.math.system=x"], "both a system message and a prompt"),
        (WITH_TOOLS, ["domains.math.environment.context=forget"], "one of none, summary, discard_75, discard_all"),
    ],
)
def test_environments_that_cannot_work(write, text, overrides, fragment):
    assert fragment in complaint(write(text), *overrides)


def test_missing_and_unreadable_files(tmp_path):
    assert complaint(tmp_path / "nope.yaml") == "there is no recipe nope.yaml"
    assert complaint(tmp_path / ".").endswith("is a directory; name a recipe in it")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert complaint(tmp_path / "list.yaml") == "list.yaml: a recipe maps keys to values, but this is [1]"
    (tmp_path / "empty.yaml").write_text("")
    assert complaint(tmp_path / "empty.yaml").startswith("empty.yaml: no value for name;")


texts = st.one_of(
    st.sampled_from(["1e-6", "yes", "null", "2024-01-01", "12", "a: b", "${seed}", "\\${x}", "\\\\${", "", " x ", "#"]),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12).filter(lambda text: text != "???"),
)
keys = st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
mappings = st.dictionaries(keys, anything, max_size=3)


@given(
    system=st.none() | texts,
    args=mappings,
    init=mappings,
    lr=st.floats(1e-12, 1e3),
    delta=st.none() | st.floats(0, 1e6),
    engine=st.sampled_from(EngineKind),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_printing_and_loading_is_the_identity(tmp_path, system, args, init, lr, delta, engine):
    start = Recipe(name="n", domains={"d": Domain(prompts={"reasoning_gym": "x"}, system=system)})
    recipe = replace(
        start,
        model=replace(start.model, init=init, dtype="bfloat16"),
        domains={"d": replace(start.domains["d"], rewards=[RewardUse(use="u", args=args)])},
        learner=replace(start.learner, lr=lr),
        objective=replace(start.objective, off_policy_delta=delta, zero_variance=ZeroVariance.replace),
        rollout=replace(start.rollout, engine=engine),
    )
    printed = tmp_path / "printed.yaml"
    printed.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(printed) == recipe


def test_prints_enums_as_plain_text_and_every_key(write):
    printed = to_yaml(load_recipe(write(WHOLE)))
    assert "engine: torch\n" in printed and "aggregation: sequence_mean\n" in printed and "!!" not in printed
    assert all(f"{field.name}:" in printed for field in fields(Recipe))


def test_every_missing_value_is_named(write):
    write("model: {path: ???}\ndomains: {d: {rewards: [{weight: 2}]}}\n", "base.yaml")
    path = write("extends: base.yaml\nsampling: {top_p: ???}\n")
    missing = "domains.d.prompts, domains.d.rewards[0].use, model.path, name, sampling.top_p"
    assert complaint(path) == f"recipe.yaml: no value for {missing}; write it there or add domains.d.prompts=..."
    values = ["name=x", "model.path=/m", "domains.d.prompts=/p", "domains.d.rewards.0.use=r", "sampling.top_p=0.5"]
    assert load_recipe(path, values).domains["d"].rewards == [RewardUse(use="r", weight=2.0)]


def test_references_to_other_values(write):
    recipe = load_recipe(write(WHOLE + "seed: 5\nlog_samples: ${seed}\nruns: '${oc.env:HOME}/\\${literal}'\n"))
    assert recipe.log_samples == 5 and recipe.runs == f"{Path.home()}/${{literal}}"
