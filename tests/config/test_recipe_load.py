"""Loading: YAML, overrides, what is refused and in which words; dump and load are inverse."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dapo_megatron.config import Recipe, dump_recipe, load_recipe
from dapo_megatron.config.yaml_text import parse_yaml, to_yaml
from dapo_megatron.errors import RequestError

LEAST = "run: {directory: out}\nmodel: {path: hf}\n"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(LEAST)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RequestError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_settings_arrive(recipe_file):
    recipe_file.write_text(
        LEAST + "data:\n  generate: {terms: [3, 7]}\nsupervised:\n  stages:\n"
        "    - {data: worked, steps: 2, batch_sequences: 4, learning_rate: 3e-3}\n"
    )
    recipe = load_recipe(str(recipe_file))
    assert recipe.run.directory == "out"
    assert recipe.data.generate.terms == [3, 7]
    assert recipe.data.generate.operand_max == 9
    assert recipe.supervised.stages[0].learning_rate == 0.003


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.learning_rate=1e-4", 1e-4),
        ("optimizer.learning_rate=1E-4", 1e-4),
        ("optimizer.learning_rate=+2.5e4", 2.5e4),
        ("optimizer.learning_rate=.5e-3", 5e-4),
        ("optimizer.learning_rate=1.e-3", 1e-3),
        ("optimizer.learning_rate=3", 3.0),
        ("parallel.world=8", 8),
        ("parallel.world=null", None),
        ("parallel.world=", None),
        ("parallel.sequence=true", True),
        ("run.name=a=b", "a=b"),
        ("run.name='1e-4'", "1e-4"),
        ("run.name=v1e4", "v1e4"),
        ("data.generate.terms=[2, 3]", [2, 3]),
    ],
)
def test_overrides(recipe_file, override, value):
    recipe = load_recipe(recipe_file, [override])
    found = recipe
    for name in override.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_an_override_may_be_a_mapping(recipe_file):
    assert load_recipe(recipe_file, ["data.generate={terms: [2, 3]}"]).data.generate.terms == [2, 3]


def test_the_last_override_wins_and_leaves_its_neighbours(recipe_file):
    recipe_file.write_text(LEAST + "optimizer: {beta1: 0.5, beta2: 0.6}\n")
    recipe = load_recipe(recipe_file, ["optimizer.beta1=0.1", "optimizer.beta1=0.2", "optimizer={epsilon: 1}"])
    assert (recipe.optimizer.beta1, recipe.optimizer.beta2, recipe.optimizer.epsilon) == (0.2, 0.6, 1.0)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.steps='3'", 'run.steps="3": expected a whole number'),
        ("run.steps=3.0", "run.steps=3.0: expected a whole number; use 3"),
        ("run.steps=3.5", "run.steps=3.5: expected a whole number"),
        ("run.steps=true", "run.steps=true: expected a whole number"),
        ("run.steps=null", "run.steps=null: expected a whole number"),
        ("run.steps.x=3", 'run.steps={"x": 3}: expected a whole number'),
        ("run.steps={2024-01-01: 3}", "run.steps={datetime.date(2024, 1, 1): 3}: expected a whole number"),
        ("run.steps=-1", "run.steps=-1: must be at least 0; use 0"),
        ("optimizer.beta1=1", "optimizer.beta1=1: must be less than 1.0; use 0.9"),
        ("algorithm.reference.decay=1.01", "algorithm.reference.decay=1.01: must be at most 1.0; use 1.0"),
        ("algorithm.reference.every=0", "algorithm.reference.every=0: must be at least 1; use 1"),
        ("rollout.top_p=0", "rollout.top_p=0: must be more than 0.0; use 1.0"),
        ("rollout.top_p=1.5", "rollout.top_p=1.5: must be at most 1.0; use 1.0"),
        ("rollout.top_p=.nan", "rollout.top_p=NaN: expected a finite number"),
        ("optimizer.learning_rate=fast", 'optimizer.learning_rate="fast": expected a number'),
        ("rollout.engine=sglang", 'rollout.engine="sglang": expected hf or vllm'),
        ("parallel.sequence=1", "parallel.sequence=1: expected true or false"),
        ("data=3", "data=3: expected a mapping of settings"),
        ("data=null", "section data is empty; give it a setting or remove it"),
        ("data.generate={terms: []}", "data.generate.terms=[]: must not be empty"),
        ("data.generate={terms: [2, 1]}", "data.generate.terms[1]=1: must be at least 2; use 2"),
        ("run.directory=''", 'run.directory="": must not be empty'),
        ("run.directory=7", "run.directory=7: expected text"),
        ("model.path=null", "model: neither path nor scratch is given; set one of them"),
        (
            "supervised.stages.0.steps=3",
            'supervised.stages={"0": {"steps": 3}}: expected a list; a list is given whole: supervised.stages=[…]',
        ),
        ("data.generate={terms: [2], operand_max: 0}", "data.generate.operand_max=0: must be at least 1; use 1"),
        ("data.answer_after=####", "override 'data.answer_after=####': a value from # on is a comment; quote it twice"),
        ("rollout.time_limit_s=2m", 'rollout.time_limit_s="2m": expected a number of seconds'),
        ("supervised.stages=[3]", "supervised.stages[0]=3: expected a mapping of settings"),
        ("steps", "override 'steps' is not of the form key.sub=value, e.g. run.steps=10"),
        ("=3", "override '=3' is not of the form key.sub=value"),
        ("run..steps=3", "override 'run..steps=3' is not of the form key.sub=value"),
        ("base=other.yaml", "override 'base=other.yaml': base can be set in a recipe file only"),
        ("run.name=[1", "override 'run.name=[1', line 1, column 3: broken YAML"),
    ],
)
def test_wrong_values_take_one_line_each(recipe_file, override, line):
    told = refusal(recipe_file, override)
    assert told.startswith(line)
    assert "\n" not in told


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("rollout.top_pp=1", "rollout.top_pp; did you mean rollout.top_p?"),
        ("rollot.top_p=1", "rollot; did you mean rollout?"),
        ("algorithm.temperature=1", "algorithm.temperature; did you mean rollout.temperature?"),
        ("learning_rate=1", "learning_rate; did you mean optimizer.learning_rate?"),
        ("rollout_top_p=1", "rollout_top_p; did you mean rollout.top_p?"),
        ("rollout.max_length=1", "rollout.max_length; did you mean rollout.max_response_length?"),
        ("optimizer.seed=1", "optimizer.seed; did you mean run.seed?"),
        ("learnin_rate=1", "learnin_rate; did you mean optimizer.learning_rate?"),
        ("algorithm.dynamic_sampling.maxwaves=1", "did you mean algorithm.dynamic_sampling.max_waves?"),
        ("data.generate.term=[4]", "data.generate.term; did you mean data.generate.terms?"),
        (
            "supervised.stages=[{data: x, steps: 1, batch_sequences: 1, learning_rate: 1, warmup: 1}]",
            "supervised.stages[0].warmup; did you mean supervised.stages.warmup_steps?",
        ),
        ("optimizer.lr=1", "optimizer.lr; optimizer has learning_rate, min_learning_rate, "),
        ("qqq=1", "qqq; a recipe has run, model, "),
        ("7=1", "7; a recipe has run, model, "),
        ("run.2024=1", "run.2024; run has name, directory, steps, seed"),
    ],
)
def test_unknown_settings_name_the_nearest(recipe_file, override, suggestion):
    told = refusal(recipe_file, override)
    assert told.startswith("unknown setting ")
    assert suggestion in told
    assert "\n" not in told


def test_all_problems_are_reported_together(recipe_file):
    recipe_file.write_text("run: {steps: ten}\nmodell: {path: x}\ndata:\n")
    lines = refusal(recipe_file, "optimizer.beta1=2").splitlines()
    assert sorted(lines) == sorted(
        [
            "section data is empty; give it a setting or remove it",
            "run.directory is missing and has no default",
            'run.steps="ten": expected a whole number',
            "model: neither path nor scratch is given; set one of them",
            "optimizer.beta1=2: must be less than 1.0; use 0.9",
            "unknown setting modell; did you mean model?",
        ]
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {steps: 1\nmodel: 3\n", "line 2, column 6: broken YAML"),
        ("run:\n\tsteps: 1\n", "line 2, column 1: broken YAML"),
        ("run: {steps: 1, steps: 2}\n", "line 1, column 17: broken YAML: key 'steps' stands twice in one mapping"),
        ("run: {}\nmodel: {}\nrun: {}\n", "line 3, column 1: broken YAML: key 'run' stands twice"),
        ("run: *nowhere\n", "line 1, column 6: broken YAML: found undefined alias"),
        (
            "run: !!python/object/apply:os.getcwd []\n",
            "line 1, column 6: broken YAML: could not determine a constructor",
        ),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: broken YAML"),
        ("run: 2024-13-45\n", "broken YAML: month must be in 1..12"),
        ("run: \x01\n", "broken YAML"),
        ("[" * 3000, "nested too deeply"),
        ("- run\n", "expected a mapping of sections, found a list"),
        ("just text\n", 'expected a mapping of sections, found "just text"'),
    ],
)
def test_broken_files(recipe_file, text, words):
    recipe_file.write_text(text)
    told = refusal(recipe_file)
    assert told.startswith(str(recipe_file))
    assert words in told
    assert "\n" not in told


def test_a_recipe_that_contains_itself_is_refused(recipe_file):
    recipe_file.write_text("run: &run {directory: out, steps: *run}\nmodel: {path: hf}\n")
    assert "run.steps=" in refusal(recipe_file)


def test_files_that_cannot_be_read(tmp_path, recipe_file):
    assert refusal(tmp_path / "none.yaml") == f"no recipe at {tmp_path / 'none.yaml'}"
    assert str(tmp_path) in refusal(tmp_path)
    assert "directory" in refusal(tmp_path)
    recipe_file.write_bytes(b"run: {name: \xff}")
    assert "byte 12 is not UTF-8" in refusal(recipe_file)
    assert "cannot read" in refusal(Path("a\0b"))


def test_an_empty_file_lacks_what_has_no_default(recipe_file):
    recipe_file.write_text("# nothing yet\n")
    assert refusal(recipe_file).splitlines() == [
        "run.directory is missing and has no default",
        "model: neither path nor scratch is given; set one of them",
    ]


names = st.text(min_size=1, max_size=30)
sizes = st.integers(1, 10**12)
shares = st.floats(0, 1, exclude_max=True)
amounts = st.floats(0, 1e300, exclude_min=True)
generated = st.fixed_dictionaries(
    {}, optional={"terms": st.lists(st.integers(2, 9), min_size=1), "direct_fraction": shares}
)
stages = st.lists(
    st.fixed_dictionaries(
        {"data": names, "steps": sizes, "batch_sequences": sizes, "learning_rate": amounts},
        optional={"schedule": st.sampled_from(["constant", "cosine", "linear"])},
    ),
    max_size=3,
)
scratch = st.fixed_dictionaries(
    {
        "hidden": sizes,
        "layers": sizes,
        "heads": st.just(4),
        "kv_heads": st.just(2),
        "head_dim": st.just(8),
        "ffn": sizes,
    }
)
recipes = st.fixed_dictionaries(
    {
        "run": st.fixed_dictionaries({"directory": names}, optional={"name": names, "steps": sizes}),
        "model": st.fixed_dictionaries({"path": names}) | st.fixed_dictionaries({"scratch": scratch}),
    },
    optional={
        "parallel": st.fixed_dictionaries({}, optional={"sequence": st.booleans(), "world": st.none() | sizes}),
        "data": st.fixed_dictionaries({}, optional={"train": st.none() | names, "generate": st.none() | generated}),
        "optimizer": st.fixed_dictionaries({}, optional={"learning_rate": amounts, "beta1": shares}),
        "algorithm": st.fixed_dictionaries({}, optional={"eps_dual": st.none() | amounts}),
        "supervised": st.fixed_dictionaries({"stages": stages}),
    },
).map(Recipe.model_validate)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=recipes)
def test_a_dumped_recipe_loads_back_equal(tmp_path, recipe):
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_a_dump_shows_every_section_with_its_defaults(recipe_file):
    shown = yaml.safe_load(dump_recipe(load_recipe(recipe_file)))
    assert list(shown) == list(Recipe.model_fields)
    assert shown["algorithm"]["dynamic_sampling"] == {
        "enabled": True, "max_waves": 10, "over_sampling": 1.0, "adaptive": True, "keep_surplus": True, "max_age": 2,
        "metric": "accuracy",
    }  # fmt: skip


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


@settings(deadline=None)
@given(value=values)
@example({"\x85": "\u2028a\u2029 \x85\r\n\t"})  # line breaks that YAML folds
@example(["1e-4", "1.5E4", "null", "yes", "2024-01-01", "0x1", "~", "", "- a", "a: b", "#", " a "])
def test_yaml_round_trip(value):
    assert parse_yaml(to_yaml(value), "here") == value


@settings(deadline=None)
@given(number=st.floats(1e-300, 1e300), digits=st.integers(0, 12), form=st.sampled_from("eE"))
def test_numbers_with_an_exponent_are_numbers(number, digits, form):
    text = f"{number:.{digits}{form}}"
    assert parse_yaml(text, "here") == float(text)
    # without a sign in the exponent too
    assert parse_yaml(text.replace("+", ""), "here") == float(text)


@pytest.mark.parametrize("text", ["1e", "e4", "1e4x", "1.2.3e4", "v1e4", "1e-4-5", ".e4"])
def test_text_that_only_resembles_a_number_stays_text(text):
    assert parse_yaml(text, "here") == text
