"""Rules that span sections, or a section and the model."""

from dataclasses import replace

import pytest

from dapo_megatron.config import Architecture, Recipe, check_recipe
from dapo_megatron.errors import RequestError

SHAPE = Architecture(
    family="qwen2", layers=64, hidden=5120, heads=40, kv_heads=8, head_dim=128, ffn=27648, vocab=152064, tied=False,
    qkv_bias=True, qk_norm=False, rms_eps=1e-5, rope_theta=1e6, rope_scaling=None, max_positions=131072,
    sliding_window=None, eos_token_ids=(151643,), init_std=0.02, torch_dtype="bfloat16",
)  # fmt: skip
STAGE = {"data": "worked", "steps": 1, "batch_sequences": 1, "learning_rate": 1e-3}


def recipe(**sections: dict) -> Recipe:
    least = {"run": {"directory": "out"}, "model": {"path": "hf"}, "data": {"train": "t.jsonl"}}
    return Recipe.model_validate(least | sections)


def refusal(shape: Architecture = SHAPE, **sections: dict) -> str:
    with pytest.raises(RequestError) as caught:
        check_recipe(recipe(**sections), shape)
    return str(caught.value)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"evaluation": {"top_p": 0.3, "temperature": 0.1}},
        {"reward": {"overlong": {"max_length": 20480, "cache_length": 4096}}},
        {"reward": {"overlong": {"max_length": 20480, "cache_length": 20480}}},
        {"reward": {"overlong": {"max_length": None, "cache_length": 4096}}},
        {"algorithm": {"eps_dual": 1.01}},
        {"algorithm": {"advantage": "gae", "gae": {"lam": 1.0}}, "critic": {"path": "hf", "warmup_steps": 3}},
        {"critic": {"learning_rate": 1e-5}},  # the default, written out
        {"algorithm": {"kl": {"coefficient": 0.1, "estimator": "k2"}}},
        {"algorithm": {"kl": {"coefficient": 0.1, "estimator": "k1", "place": "reward"}}},
        {"algorithm": {"kl": {"estimator": "k1"}}},  # off
        {"algorithm": {"kl": {"coefficient": 0.1}, "reference": {"kind": "periodic", "every": 1}}},
        {"algorithm": {"kl": {"coefficient": 0.1}, "reference": {"kind": "ema", "decay": 1.0}}},
        {"algorithm": {"policy_loss": "dpo", "reference": {"kind": "ema", "placement": "resident"}}},  # iterative DPO
        {"rollout": {"samples_per_prompt": 2, "temperature": 0.01}},
        {"learner": {"tokens_per_micro_batch": 22528}},
        {"run": {"directory": "out", "steps": 0}, "data": {}},
        {"data": {"generate": {}}},
        {"data": {"generate": {}}, "supervised": {"stages": [STAGE | {"response_template": "A: {response}"}]}},
        {"data": {"generate": {}}, "supervised": {"stages": [STAGE | {"data": "own.jsonl", "weight_column": "w"}]}},
        {"reward": {"grader": "judge", "judge": {"model": "judge", "mode": "binary"}}},
        {"reward": {"judge": {"mode": "soft"}}},  # the default, written out
    ],
)
def test_what_is_allowed(sections):
    check_recipe(recipe(**sections), SHAPE)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"algorithm": {"adaptive_entropy": {"delta": 0.01}}},
            ["algorithm.adaptive_entropy.delta=0.01", "without its target"],
        ),
        ({"algorithm": {"adaptive_entropy": {"target": 99.0}}}, ["adaptive_entropy.target=99 nats", "rise for ever"]),
        (
            {"algorithm": {"adaptive_entropy": {"target": 0.2, "max": 0.01}, "entropy_coefficient": 0.5}},
            ["algorithm.entropy_coefficient=0.5", "between 0 and", "adaptive_entropy.max=0.01", "use 0.01"],
        ),
        (
            {"evaluation": {"fork_temperature": 1.2}},
            ["evaluation.fork_temperature=1.2", "needs evaluation.entropy_threshold", "analyze entropy"],
        ),
        (
            {"evaluation": {"fork_temperature": 1.2, "entropy_threshold": 0.6}, "rollout": {"engine": "vllm"}},
            ["evaluation.fork_temperature=1.2", "vllm", "use hf"],
        ),
        ({"rollout": {"top_p": 0.7}}, ["rollout.top_p=0.7", "could not reproduce", "use 1.0", "evaluation.top_p"]),
        (
            {"reward": {"judge": {"model": "judge"}}},
            ["reward.judge.model='judge'", "would not act", "reward.grader=rule", "use reward.grader=judge"],
        ),
        (
            {"reward": {"grader": "judge", "custom": "a.py:f", "judge": {"fallback": "stop"}}},
            ["reward.judge.fallback='stop'", "reward.custom"],
        ),
        (
            {"data": {"generate": {}}, "supervised": {"stages": [STAGE | {"weight_column": "w"}]}},
            ["supervised.stages.0.weight_column='w'", "data=worked", "leave it out"],
        ),
        ({"rollout": {"temperature": 0.0}}, ["rollout.temperature=0.0", "more than 0", "use 1.0"]),
        ({"rollout": {"temperature": -1.0}}, ["rollout.temperature=-1.0", "more than 0", "use 1.0"]),
        (
            {"optimizer": {"learning_rate": 1e-4, "min_learning_rate": 1e-3, "schedule": "cosine"}},
            ["optimizer.min_learning_rate=0.001 exceeds optimizer.learning_rate=0.0001", "use 0.0001 or less"],
        ),
        ({"data": {"train": "~/train.jsonl"}}, ["data.train=~/train.jsonl", "use /", "/train.jsonl"]),
        (
            {"algorithm": {"kl": {"coefficient": 0.1, "estimator": "k1"}}},
            ["algorithm.kl.estimator=k1", "algorithm.kl.place=loss", "gradient 0", "use estimator=k3", "place=reward"],
        ),
        (
            {"algorithm": {"reference": {"kind": "ema"}}},
            ["algorithm.reference.kind=ema", "kl.coefficient=0 and algorithm.policy_loss=clip", "leave it out"],
        ),
        (
            {"algorithm": {"kl": {"coefficient": 0.1}, "reference": {"kind": "periodic", "decay": 0.5}}},
            ["algorithm.reference.decay=0.5", "of kind=ema", "reference.kind=periodic", "use kind=ema"],
        ),
        (
            {"algorithm": {"kl": {"coefficient": 0.1}, "reference": {"every": 3}}},
            ["algorithm.reference.every=3", "reference.kind=fixed", "use kind=periodic"],
        ),
        (
            {"algorithm": {"policy_loss": "dpo", "reference": {"kind": "ema"}}, "rollout": {"shape": "preferences"}},
            ["algorithm.reference.kind=ema", "log-probs of the whole file", "use kind=fixed"],
        ),
        (
            {
                "algorithm": {"policy_loss": "dpo", "reference": {"placement": "resident"}},
                "rollout": {"shape": "preferences"},
            },
            ["algorithm.reference.placement=resident", "only once", "use host"],
        ),
        (
            {"critic": {"epochs": 2}, "algorithm": {"advantage": "group-mean"}},
            ["critic.epochs=2", "group-mean has no critic", "use advantage=gae"],
        ),
        ({"critic": {"parallel": {"tensor": 1}}}, ["critic.parallel.tensor=1", "group has no critic", "remove it"]),
        (
            {"algorithm": {"advantage": "gae", "policy_loss": "dpo"}},
            ["algorithm.advantage=gae", "policy_loss=dpo", "use advantage=group"],
        ),
        ({"algorithm": {"gae": {"lam": 0.5}}}, ["algorithm.gae.lam=0.5", "remove it", "use advantage=gae"]),
        (
            {"algorithm": {"advantage": "gae"}, "critic": {"warmup_steps": 7}, "run": {"directory": "out", "steps": 7}},
            ["critic.warmup_steps=7", "run.steps=7", "use 6 or less"],
        ),
        ({"algorithm": {"eps_dual": 1.0}}, ["algorithm.eps_dual=1.0", "more than 1", "or null"]),
        ({"algorithm": {"eps_dual": -3.0}}, ["algorithm.eps_dual=-3.0"]),
        ({"rollout": {"engine": "vllm", "servers": ["gpu-7:8000"]}}, ["'gpu-7:8000'", "http://host:8000"]),
        (
            {"rollout": {"engine": "vllm", "servers": ["http://a:1", "http://b:1"], "engines": 3}},
            ["rollout.engines=3", "2 rollout.servers", "use 2 or null"],
        ),
        (
            {"rollout": {"engine": "vllm", "servers": ["http://a:1"]}, "resharding": {"transport": "shared"}},
            ["resharding.transport=shared", "rollout.servers", "use group or auto"],
        ),
        (
            {"rollout": {"engine": "vllm", "placement": "disaggregated"}, "resharding": {"transport": "shared"}},
            ["resharding.transport=shared", "rollout.placement=colocated", "use transport=group or auto"],
        ),
        (
            {"rollout": {"engine": "vllm", "placement": "disaggregated"}, "resharding": {"transport": "relay"}},
            ["resharding.transport=relay", "rollout.placement=colocated", "use transport=group or auto"],
        ),
        (
            {"rollout": {"engine": "vllm", "tensor": 8}, "hardware": {"gpus_per_node": 4}},
            ["rollout.tensor=8", "hardware.gpus_per_node=4", "use rollout.tensor=4"],
        ),
        ({"rollout": {"servers": ["http://a:1"]}}, ["rollout.servers", "rollout.engine=vllm", "with hf use []"]),
        ({"rollout": {"placement": "disaggregated"}}, ["rollout.placement=disaggregated", "vllm", "use colocated"]),
        ({"rollout": {"tensor": 4}}, ["rollout.tensor=4", "vllm", "with hf use 1"]),
        ({"rollout": {"engines": 1}}, ["rollout.engines=1", "vllm", "with hf use null"]),
        (
            {"learner": {"tokens_per_micro_batch": 22527}},
            ["2048", "20480", "22528 tokens", "tokens_per_micro_batch=22527", "use tokens_per_micro_batch=22528"],
        ),
        (
            {"reward": {"overlong": {"max_length": 20481}}},
            ["reward.overlong.max_length=20481", "rollout.max_response_length=20480", "use 20480 or less"],
        ),
        (
            {"reward": {"overlong": {"max_length": 100, "cache_length": 101}}},
            ["reward.overlong.cache_length=101", "reward.overlong.max_length=100", "use 100 or less"],
        ),
        ({"data": {}}, ["run.steps=100", "data.train or data.generate"]),
        ({"data": {"generate": {}}, "reward": {"grader": "code"}}, ["reward.grader=code", "data.generate", "rule"]),
    ],
)
def test_refusals(sections, words):
    told = refusal(**sections)
    assert all(word in told for word in words), told
    assert "\n" not in told


def test_sequences_fit_the_positions():
    check_recipe(recipe(), replace(SHAPE, max_positions=22528))
    told = refusal(replace(SHAPE, max_positions=22527))
    assert told == (
        "data.max_prompt_length=2048 + rollout.max_response_length=20480 = 22528 tokens exceed the model's "
        "22527 positions; use rollout.max_response_length=20479 or less"
    )


def test_a_prompt_that_leaves_no_room_is_the_one_to_shorten():
    assert "use data.max_prompt_length less than 2048" in refusal(replace(SHAPE, max_positions=2048))


def test_sequences_fit_the_sliding_window():
    check_recipe(recipe(), replace(SHAPE, sliding_window=22528))
    told = refusal(replace(SHAPE, sliding_window=4096))
    assert "4096 tokens of its sliding window" in told
    assert "use rollout.max_response_length=2048 or less" in told


def test_the_values_proposed_work():
    shape = replace(SHAPE, max_positions=8192, sliding_window=4096)
    response = {"max_response_length": 2048}
    check_recipe(recipe(rollout=response, reward={"overlong": {"max_length": 2048}}), shape)


def test_all_problems_are_told_at_once():
    told = refusal(
        rollout={"top_p": 0.9, "temperature": 0.0, "tensor": 2},
        algorithm={"eps_dual": 0.5},
        learner={"tokens_per_micro_batch": 10},
        reward={"overlong": {"max_length": 30000}},
        data={},
    ).splitlines()
    assert len(told) == 7
    assert len(set(told)) == 7
