"""How much a rollout step draws and learns from: what the recipe leaves open is assumed, and told."""

from dataclasses import dataclass

from dapo_megatron.config import Layout, Recipe

MIXED_SHARE = 0.5  # groups with right and wrong answers among those drawn, where uniform ones are replaced


@dataclass(frozen=True)
class Workload:
    """Sizes of one rollout step. Means are of responses that are trained on; `drawn` counts all that are sampled."""

    prompt: float  # mean (tokens)
    response: float  # mean (tokens)
    longest: int  # response (tokens)
    trained: int  # responses
    drawn: float  # responses
    waves: int  # rounds of sampling, each of which waits for its longest response
    updates: int

    @property
    def sequence(self) -> float:
        return self.prompt + self.response

    @property
    def trained_tokens(self) -> int:
        return round(self.trained * self.sequence)


def workload_of(recipe: Recipe, layout: Layout, *, prompt: float | None, response: float | None) -> Workload:
    """The step of a recipe.

    `prompt`, `response`: mean lengths (tokens); None assumes an eighth of data.max_prompt_length and half of
    rollout.max_response_length. With dynamic sampling half of all groups are taken to be mixed, so that twice as many
    responses are drawn as trained on, or over_sampling times as many where that is more and rounds are not adaptive.
    """
    rollout, sampling = recipe.rollout, recipe.algorithm.dynamic_sampling
    drawn, waves = 1.0, 1
    if sampling.enabled and rollout.shape != "preferences":
        drawn = 1 / MIXED_SHARE
        waves = max(1, round(drawn / sampling.over_sampling))
        if not sampling.adaptive:
            drawn = max(drawn, sampling.over_sampling)
    return Workload(
        prompt=recipe.data.max_prompt_length / 8 if prompt is None else prompt,
        response=rollout.max_response_length / 2 if response is None else response,
        longest=rollout.max_response_length,
        trained=layout.responses_per_step,
        drawn=0.0 if rollout.shape == "preferences" else drawn * layout.responses_per_step,
        waves=waves,
        updates=layout.updates_per_step,
    )


@dataclass(frozen=True)
class MicroBatches:
    """What a data-parallel rank computes in one pass over `sequences` responses: `count` packs of `rows` rows."""

    count: int
    rows: int


def micro_batches(recipe: Recipe, layout: Layout, sequences: int, length: float) -> MicroBatches:
    """Packs of responses of `length` tokens, as many as the token budget holds in each.

        each = max(1, floor(budget / length))     count = ceil(sequences / (data x each))

    rounded up to a multiple of the pipeline size under virtual pipeline parallelism; rows to one of the tensor size.
    """
    budget = recipe.learner.tokens_per_micro_batch
    share = max(1, -(-sequences // layout.data))
    each = min(share, max(1, int(budget // max(1.0, length))))
    count = -(-share // each)
    if layout.virtual_pipeline > 1:
        count = -(-count // layout.pipeline) * layout.pipeline
    rows = min(budget, round(each * length))
    return MicroBatches(count, -(-max(1, rows) // layout.tensor) * layout.tensor)
