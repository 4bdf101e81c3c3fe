"""`base:` inheritance of recipe files."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dapo_megatron.config import load_recipe
from dapo_megatron.config.yaml_text import to_yaml
from dapo_megatron.errors import RequestError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_chain_merges_deeply_relative_to_each_file(tmp_path, monkeypatch):
    write(
        tmp_path / "common" / "root.yaml",
        "run: {directory: out, steps: 1, seed: 1}\nmodel: {path: hf}\n"
        "algorithm: {eps_low: 0.1, dynamic_sampling: {max_waves: 3, enabled: false}}\n",
    )
    write(tmp_path / "common" / "middle.yaml", "base: root.yaml\nrun: {steps: 2}\n")
    leaf = write(
        tmp_path / "leaf.yaml",
        "base: common/middle.yaml\nrun: {seed: 3}\nalgorithm: {dynamic_sampling: {max_waves: 5}}\n",
    )
    monkeypatch.chdir(tmp_path / "common")  # the working directory plays no part
    recipe = load_recipe(leaf, ["run.name=top"])
    assert (recipe.run.directory, recipe.run.steps, recipe.run.seed, recipe.run.name) == ("out", 2, 3, "top")
    assert recipe.algorithm.eps_low == 0.1
    assert recipe.algorithm.dynamic_sampling.max_waves == 5
    assert recipe.algorithm.dynamic_sampling.enabled is False


def test_lists_and_null_replace(tmp_path):
    write(
        tmp_path / "base.yaml",
        "run: {directory: out}\n"
        "model: {scratch: {hidden: 8, layers: 1, heads: 2, kv_heads: 1, head_dim: 4, ffn: 8}}\n"
        "data: {generate: {terms: [4, 5, 6], operand_max: 3}}\n",
    )
    leaf = write(
        tmp_path / "leaf.yaml", "base: base.yaml\nmodel: {path: hf, scratch: null}\ndata: {generate: {terms: [7]}}\n"
    )
    recipe = load_recipe(leaf)
    assert (recipe.model.path, recipe.model.scratch) == ("hf", None)
    assert (recipe.data.generate.terms, recipe.data.generate.operand_max) == ([7], 3)


def test_a_path_inside_the_recipe_stays_as_written(tmp_path):
    write(tmp_path / "deep" / "base.yaml", "run: {directory: out}\nmodel: {path: models/x}\ndata: {train: t.jsonl}\n")
    recipe = load_recipe(write(tmp_path / "leaf.yaml", "base: deep/base.yaml\n"))
    assert (recipe.model.path, recipe.data.train) == ("models/x", "t.jsonl")


def test_an_absolute_base(tmp_path):
    base = write(tmp_path / "a" / "base.yaml", "run: {directory: out}\nmodel: {path: hf}\n")
    assert load_recipe(write(tmp_path / "b" / "leaf.yaml", f"base: {base}\n")).run.directory == "out"


@pytest.mark.parametrize("length", [1, 2, 3])
def test_cycles_are_refused(tmp_path, length):
    for i in range(length):
        write(tmp_path / f"{i}.yaml", f"base: {(i + 1) % length}.yaml\n")
    with pytest.raises(RequestError) as caught:
        load_recipe(tmp_path / "0.yaml")
    told = str(caught.value)
    assert "cycle" in told
    assert all(str(tmp_path / f"{i}.yaml") in told for i in range(length))


def test_a_cycle_hidden_by_a_link_is_refused(tmp_path):
    write(tmp_path / "real.yaml", "base: link.yaml\n")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "real.yaml")
    with pytest.raises(RequestError, match="cycle"):
        load_recipe(tmp_path / "real.yaml")


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("none.yaml", ["no recipe at", "none.yaml", "base of", "leaf.yaml"]),
        ("3", ["leaf.yaml", "base=3", "path of one YAML file"]),
        ("[a.yaml]", ["leaf.yaml", 'base=["a.yaml"]']),
        ("''", ["leaf.yaml", 'base=""']),
        ("null", ["leaf.yaml", "base=null"]),
        ("list.yaml", ["list.yaml", "expected a mapping"]),
        ("broken.yaml", ["broken.yaml, line 1, column 6"]),
    ],
)
def test_bases_that_cannot_be_used(tmp_path, base, words):
    write(tmp_path / "list.yaml", "- 1\n")
    write(tmp_path / "broken.yaml", "run: *x\n")
    leaf = write(tmp_path / "leaf.yaml", f"base: {base}\nrun: {{directory: out}}\nmodel: {{path: hf}}\n")
    with pytest.raises(RequestError) as caught:
        load_recipe(leaf)
    assert all(word in str(caught.value) for word in words), str(caught.value)


settable = st.fixed_dictionaries(
    {},
    optional={
        "run": st.fixed_dictionaries({}, optional={"steps": st.integers(0, 9), "seed": st.integers(0, 9)}),
        "optimizer": st.fixed_dictionaries({}, optional={"beta1": st.floats(0, 0.9), "epsilon": st.floats(0.1, 1)}),
        "reward": st.fixed_dictionaries(
            {"overlong": st.fixed_dictionaries({}, optional={"max_length": st.none() | st.integers(1, 9)})}
        ),
    },
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(below=settable, above=settable)
def test_a_child_file_and_overrides_do_the_same(tmp_path, below, above):
    least = {"run": {"directory": "out"}, "model": {"path": "hf"}}
    write(tmp_path / "least.yaml", to_yaml(least))
    write(tmp_path / "below.yaml", to_yaml({"base": "least.yaml"} | below))
    write(tmp_path / "above.yaml", to_yaml({"base": "below.yaml"} | above))
    overrides = [
        f"{section}.{name}={to_yaml(value)}" for section, inner in above.items() for name, value in inner.items()
    ]
    child = load_recipe(tmp_path / "above.yaml")
    assert child == load_recipe(tmp_path / "below.yaml", overrides)
    for section, inner in {**below, **above}.items():
        for name, value in inner.items():
            if section != "reward":
                assert getattr(getattr(child, section), name) == value
