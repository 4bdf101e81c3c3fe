"""Section `reward`: what a response is worth and how it is graded."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.section import Section


class Overlong(Section):
    """Soft punishment of long responses: 0 up to max_length - cache_length, falling to -1 at max_length."""

    max_length: int | None = Field(None, ge=1)
    """Length with the full punishment of -1 (tokens); null = no punishment."""

    cache_length: int = Field(0, ge=0)
    """Width of the ramp below max_length (tokens); 0 = a step at max_length."""


class Code(Section):
    """Programs graded by test cases: the last fenced code block of a response, and JSON in the answer column."""

    score: Literal["fraction", "all-pass"] = "all-pass"
    """all-pass = `reward.right` for all tests passed, else `reward.wrong`; fraction = between these by the share."""

    time_limit_s: float = Field(6.0, gt=0)
    """Longest time of one test (seconds); after it this test and those behind it count as failed."""

    memory_limit_mib: int = Field(512, ge=64)
    """Most address space of one test (MiB)."""

    max_tests: int = Field(20, ge=1)
    """Most tests a response, those with the longest inputs."""


class RewardModel(Section):
    """Scores by a sequence classifier with one label, on rank 0's device: reward = scale · score, within the bound."""

    path: str | None = Field(None, min_length=1)
    """Folder in Hugging Face form: config.json, safetensors, tokenizer."""

    chat_template: bool = True
    """true = prompt and response as two turns of the tokenizer's chat template; false = as one plain text."""

    max_length: int | None = Field(None, ge=1)
    """Most tokens of prompt and response, of longer ones the end is scored (tokens); null = the model's positions."""

    tokens_per_batch: int = Field(16384, ge=1)
    """Most tokens at a time, padding included (tokens)."""

    scale: float = 1.0
    """Factor of the model's score."""

    bound: float | None = Field(None, gt=0)
    """Rewards are cut to -bound … bound; null = they are not."""

    threshold: float = 0.0
    """A response counts as right, for accuracy and dynamic sampling, where the model's own score is more than this."""


class JudgeEngine(Section):
    """A judge on a vLLM engine of the run: one server, which rank 0 starts on its own machine and ends with the run."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel size (devices)."""

    device: int | None = Field(None, ge=0)
    """First of its GPUs, counted as rank 0's machine shows them; null = rank 0's own, beside learner and engine."""

    gpu_memory_share: float = Field(0.3, gt=0, lt=1)
    """Share of each of its GPUs' memory for weights and KV cache; the judge keeps it while others learn."""

    cpu_kv_cache_gib: int = Field(1, ge=1)
    """KV cache on a CPU (GiB)."""

    start_limit_s: float = Field(600.0, gt=0)
    """Longest time to start (seconds); training waits for it."""


class Judge(Section):
    """A generative verifier: a language model answers YES or NO on question, final answer and reference.

    P = P(YES) / (P(YES) + P(NO)) of its first token. Accuracy = right by the rule, or P > 0.5. Rewards lie between
    `reward.wrong` and `reward.right`; z-scores of B rewards between -sqrt(B - 1) and sqrt(B - 1).
    """

    model: str | None = Field(None, min_length=1)
    """Folder of a language model in Hugging Face form; with `url` the model's name there."""

    url: str | None = Field(None, min_length=1)
    """OpenAI-compatible server that sends log-probs, for example http://host:8000/v1; null = `model` is a folder."""

    key_variable: str | None = Field(None, min_length=1)
    """Environment variable with the server's key; null = no key is sent."""

    engine: Literal["embedded", "vllm"] = "embedded"
    """Where a folder's model runs. embedded = by transformers in rank 0's process, on its device; vllm = on a vLLM
    engine of the run's own, asked like a `url`."""

    vllm: JudgeEngine = JudgeEngine()
    """That engine."""

    prompt: str | None = Field(None, min_length=1)
    """What the judge is asked: text with {answer} and {reference}, and {question} where it is to see it; null = the
    built-in wording."""

    chat_template: bool = True
    """true = the prompt is a user turn of the folder's chat template; false = plain text."""

    mode: Literal["soft", "binary"] = "soft"
    """soft = reward by P, from `reward.wrong` at 0 to `reward.right` at 1; binary = by P > 0.5."""

    normalise: Literal["none", "z-score"] = "none"
    """z-score = (R - mean) / std over the responses graded together, before the overlong punishment."""

    rule_first: bool = True
    """true = what the rule finds right is right, and the judge sees the rest; false = it sees all."""

    answer_characters: int = Field(300, ge=1)
    """Most of a final answer that the judge is shown, and of a response's end where there is none (characters)."""

    tokens_per_batch: int = Field(16384, ge=1)
    """Most tokens at a time of a folder's model, padding included; with engine vllm the longest prompt (tokens)."""

    concurrency: int = Field(16, ge=1)
    """Requests to a server or an engine under way at once."""

    timeout_s: float = Field(30.0, gt=0)
    """Longest wait for one reply of the server (seconds)."""

    retries: int = Field(3, ge=0)
    """Further tries after a lost connection, a time-out or an overloaded server, after 1, 2, 4 … seconds."""

    limit_s: float = Field(300.0, gt=0)
    """Longest time for all responses graded together (seconds); the server's later replies do not count."""

    fallback: Literal["rule", "stop"] = "rule"
    """Where the judge says neither YES nor NO, or nothing: rule = the rule decides, which is counted; stop = the run
    ends."""

    collect: str | None = Field(None, min_length=1)
    """FILE.parquet for what the judge is asked in training and what it says, written with every checkpoint; null =
    off."""


class Reward(Section):
    """Reward = right or wrong by the grader, plus the overlong punishment."""

    right: float = 1.0
    """Reward of a right answer."""

    wrong: float = -1.0
    """Reward of a wrong answer or of none."""

    grader: Literal["rule", "code", "model", "judge"] = "rule"
    """rule = the final answer is compared with the reference as an integer, as normalised text, else as mathematics;
    code = test cases; model = a reward model's score; judge = a language model's YES or NO beside the rule."""

    code: Code = Code()
    """How programs are graded (`grader: code`)."""

    model: RewardModel = RewardModel()
    """How a reward model scores (`grader: model`)."""

    judge: Judge = Judge()
    """How a language model judges (`grader: judge`)."""

    custom: str | None = Field(None, min_length=1)
    """FILE.py:FUNCTION, a function (responses, answers, prompts) -> one number each, instead of grader; null = off."""

    custom_bound: float = Field(1000.0, gt=0)
    """Largest absolute reward that `custom` may return."""

    custom_threshold: float = 0.0
    """A response counts as right where `custom` returns more than this."""

    workers: int = Field(1, ge=1)
    """Grader processes."""

    time_limit_s: float = Field(2.0, gt=0)
    """Longest time to grade one response (seconds); after it the response counts as wrong. Not for code and model."""

    memory_limit_mib: int = Field(1024, ge=64)
    """Most memory to grade one response (MiB of address space); beyond it the response counts as wrong. A program's own
    limit is `code.memory_limit_mib`."""

    shuffle: bool = False
    """Control experiment: rewards are permuted across all responses of the step, so nothing can be learnt."""

    overlong: Overlong = Overlong()
    """Soft punishment of long responses."""

    @property
    def method(self) -> Literal["rule", "custom", "code", "model", "judge"]:
        """Who grades: `custom` where it is set, else `grader`."""
        return self.grader if self.custom is None else "custom"

    @property
    def answers_are_counted(self) -> bool:
        """Whether responses end in a final answer on which a majority can vote; programs do not."""
        return self.method in ("rule", "custom", "judge")
