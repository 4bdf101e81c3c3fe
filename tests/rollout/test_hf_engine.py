from dataclasses import replace

import numpy as np
import pytest
import torch

from dapo_megatron.errors import RunError
from dapo_megatron.rollout.engine import Fork, sample_seed
from tests.rollout.engines import generate, logprob_table, request, requests, same, set_weights, start_engine
from tests.tiny_models import load_model, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", tied=False)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


def by_hand(model, prompt: list[int], new: int) -> list[int]:
    whole = torch.tensor([prompt])
    mask = torch.ones_like(whole)  # left to itself, generate hides a prompt's own token 0 as padding
    with torch.no_grad():
        tokens = model.generate(
            whole, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=1, pad_token_id=0
        )
    return tokens[0, len(prompt) :].tolist()


def test_greedy_is_what_transformers_generates(folder, model):
    wanted = requests(12, temperature=0.0)
    found = generate(start_engine(folder, stop=(1,), batch=5), wanted)
    for r in wanted:
        assert found[r.ticket].tokens.tolist() == by_hand(model, r.prompt_tokens.tolist(), r.max_new_tokens)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.7])
def test_logprobs_are_those_of_the_whole_sequence(tmp_path, tied, temperature):
    folder = write_model(tmp_path / "m", "qwen2", tied=tied, seed=3)
    model = load_model(folder)
    wanted = requests(12, seed=1, temperature=temperature)
    for ticket, completion in generate(start_engine(folder, batch=7), wanted).items():
        prompt = wanted[ticket].prompt_tokens.tolist()
        tokens = completion.tokens.tolist()
        table = logprob_table(model, prompt + tokens, temperature or 1.0)
        expected = [table[len(prompt) - 1 + i, token].item() for i, token in enumerate(tokens)]
        np.testing.assert_allclose(completion.logprobs, expected, atol=3e-5, rtol=0)
        assert completion.tokens.dtype == completion.policy_versions.dtype == np.int32
        assert completion.logprobs.dtype == np.float32


def test_a_sample_depends_on_its_seed_alone(folder):
    wanted = requests(24, seed=2)
    together = generate(start_engine(folder, stop=(1, 2, 3), batch=64), wanted)
    for batch, order in ((1, 1), (5, 1), (7, -1)):
        found = generate(start_engine(folder, stop=(1, 2, 3), batch=batch), wanted[::order])
        assert all(same(found[t], together[t]) for t in together), batch
    # other mates, a much longer one among them
    strangers = [request(100 + i, list(range(40)), 30) for i in range(3)]
    found = generate(start_engine(folder, stop=(1, 2, 3), batch=64), [*strangers, *wanted[:6]])
    assert all(same(found[t], together[t]) for t in range(6))


def test_equal_seeds_give_equal_samples_and_others_differ(folder):
    wanted = [request(i, [5, 6, 7], 12, seed=i // 2) for i in range(8)]
    found = generate(start_engine(folder), wanted)
    texts = [tuple(found[i].tokens.tolist()) for i in range(8)]
    assert texts[0::2] == texts[1::2] and len(set(texts)) == 4


def chi_square_z(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Standard normal deviate of Pearson's statistic (Wilson and Hilferty); bins of less than 5 expected are joined."""
    total = counts.sum()
    large = probabilities * total >= 5
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(probabilities[large] * total, probabilities[~large].sum() * total)
    if expected[-1] < 5:
        observed = np.append(observed[:-2], observed[-2:].sum())
        expected = np.append(expected[:-2], expected[-2:].sum())
    freedom = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


def test_the_chi_square_measure_tells_right_from_wrong():
    probabilities = np.array([0.5, 0.3, 0.2])
    draws = np.random.default_rng(0).choice(3, 2000, p=probabilities)
    counts = np.bincount(draws)
    assert abs(chi_square_z(counts, probabilities)) < 4
    assert chi_square_z(counts, np.array([0.45, 0.35, 0.2])) > 4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_two_tokens_are_drawn_with_their_joint_probabilities(folder, model, temperature):
    prompt = [5, 6, 7]
    wanted = [request(i, prompt, 2, seed=sample_seed(1, i), temperature=temperature) for i in range(3000)]
    found = generate(start_engine(folder, batch=3000), wanted)
    first = logprob_table(model, prompt, temperature)[-1].exp()
    with torch.no_grad():
        every = torch.tensor([[*prompt, t] for t in range(100)])
        second = torch.softmax(model(every).logits[:, -1].double() / temperature, -1)
    joint = (first[:, None] * second).numpy()
    counts = np.zeros((100, 100))
    for completion in found.values():
        counts[tuple(completion.tokens)] += 1
    assert chi_square_z(counts.ravel(), joint.ravel()) < 4
    assert chi_square_z(counts.sum(1), joint.sum(1)) < 4
    assert chi_square_z(counts.sum(0), joint.sum(0)) < 4
    # the test has the power to see another temperature
    assert chi_square_z(counts.sum(1), torch.softmax(first.log() * 0.8, 0).numpy()) > 4


def drawn_by_hand(model, wanted) -> tuple[list[int], list[float], int]:
    """Tokens, their log-probs, and how many were drawn above the threshold: one sequence, fp64, no cache or batch."""
    uniforms = np.random.Generator(np.random.Philox(wanted.seed)).random(wanted.max_new_tokens)
    tokens, logprobs, forks = [], [], 0
    for uniform in uniforms:
        plain = logprob_table(model, wanted.prompt_tokens.tolist() + tokens)[-1].numpy()
        forking = -(np.exp(plain) * plain).sum() > wanted.fork.threshold
        forks += forking
        temperature = wanted.fork.temperature if forking else wanted.temperature
        scaled = plain / (temperature or 1.0)
        scaled -= np.log(np.exp(scaled).sum())
        token = int(np.searchsorted(np.exp(scaled).cumsum(), uniform)) if temperature else int(plain.argmax())
        tokens.append(token)
        logprobs.append(scaled[token])
    return tokens, logprobs, int(forks)


@pytest.mark.parametrize(("cold", "hot"), [(0.5, 1.8), (0.0, 1.0), (1.0, 0.0)])
def test_forking_tokens_have_a_temperature_of_their_own(folder, model, cold, hot):
    entropies = [-(t.exp() * t).sum(-1).median() for t in (logprob_table(model, [i, i + 3, 7]) for i in range(9))]
    fork = Fork(hot, float(np.median(entropies)))
    wanted = requests(12, seed=6, temperature=cold, fork=fork)
    ordinary = [request(100 + i, [4, 2], 6, temperature=0.7) for i in range(3)]  # beside them in the batch
    found = generate(start_engine(folder, batch=9), [*wanted, *ordinary])
    forks = 0
    for r in wanted:
        tokens, logprobs, above = drawn_by_hand(model, r)
        forks += above
        assert found[r.ticket].tokens.tolist() == tokens
        np.testing.assert_allclose(found[r.ticket].logprobs, logprobs, atol=3e-5, rtol=0)
    assert 10 < forks < sum(r.max_new_tokens for r in wanted) - 10
    alone = generate(start_engine(folder), ordinary)
    assert all(same(found[r.ticket], alone[r.ticket]) for r in ordinary)


def test_one_temperature_on_both_sides_gives_the_ordinary_samples(folder):
    ordinary = requests(10, seed=7, temperature=0.8)
    forked = [replace(r, fork=Fork(0.8, 1.0)) for r in ordinary]
    first, second = (generate(start_engine(folder), wanted) for wanted in (ordinary, forked))
    for ticket, completion in first.items():
        assert completion.tokens.tolist() == second[ticket].tokens.tolist()
        assert completion.logprobs.tolist() == second[ticket].logprobs.tolist()  # to the bit
    # the threshold itself is not above it: with one that nothing exceeds, the other temperature does not act
    never = [replace(r, fork=Fork(5.0, float(np.log(100)) + 1e-3)) for r in ordinary]
    assert all(same(c, first[t]) for t, c in generate(start_engine(folder), never).items())


@pytest.mark.parametrize("top_p", [0.5, 0.9])
def test_top_p_keeps_the_nucleus_and_its_proportions(folder, model, top_p):
    prompt = [9, 4]
    wanted = [request(i, prompt, 1, seed=sample_seed(2, i), top_p=top_p) for i in range(3000)]
    # rows with and without a nucleus side by side
    plain = [request(5000 + i, prompt, 1, seed=sample_seed(2, i)) for i in range(50)]
    found = generate(start_engine(folder, batch=4000), [*wanted, *plain])
    logp = logprob_table(model, prompt)[-1]
    order = logp.argsort(descending=True)
    size = int((logp[order].exp().cumsum(0) < top_p).sum()) + 1
    assert 1 < size < 100
    nucleus = torch.zeros(100, dtype=torch.float64)
    nucleus[order[:size]] = logp[order[:size]].exp()
    counts = np.bincount([int(found[r.ticket].tokens[0]) for r in wanted], minlength=100)
    assert not counts[(nucleus == 0).numpy()].any()
    assert chi_square_z(counts, (nucleus / nucleus.sum()).numpy()) < 4
    for r in wanted[:50]:  # log-probs are those before the cut
        completion = found[r.ticket]
        assert completion.logprobs[0] == pytest.approx(logp[completion.tokens[0]].item(), abs=2e-5)
    alone = generate(start_engine(folder, batch=4000), plain)
    assert all(same(found[r.ticket], alone[r.ticket]) for r in plain)


def test_the_smallest_nucleus_is_the_most_probable_token(folder):
    found = generate(start_engine(folder), [request(i, [3, 1, 4], 6, top_p=1e-6) for i in range(4)])
    greedy = generate(start_engine(folder), [request(9, [3, 1, 4], 6, temperature=0.0)])[9]
    assert all(c.tokens.tolist() == greedy.tokens.tolist() for c in found.values())


def test_reasons_to_finish(folder):
    stop = (3, 50, 77)
    wanted = requests(60, seed=5, temperature=1.5)
    found = generate(start_engine(folder, stop=stop, batch=16), wanted)
    reasons = {r.ticket: found[r.ticket].finish_reason for r in wanted}
    assert set(reasons.values()) == {"stop", "length"}
    for r in wanted:
        tokens = found[r.ticket].tokens.tolist()
        ends = tokens[-1] in stop
        assert reasons[r.ticket] == ("stop" if ends else "length")
        assert not set(tokens[:-1]) & set(stop)
        assert ends or len(tokens) == r.max_new_tokens


def test_a_stop_token_in_the_last_place_counts_as_stop(folder):
    free = generate(start_engine(folder), [request(0, [8, 9], 4, temperature=0.0)])[0].tokens.tolist()
    place = free.index(free[2])
    ended = generate(start_engine(folder, stop=(free[2],)), [request(0, [8, 9], place + 1, temperature=0.0)])[0]
    assert (ended.finish_reason, ended.tokens.tolist()) == ("stop", free[: place + 1])


def test_collect_until(folder):
    wanted = [request(i, [i + 2, 7], 3 + 2 * i) for i in range(6)]
    whole = generate(start_engine(folder, batch=4), wanted)
    engine = start_engine(folder, batch=4)
    engine.submit(wanted)
    assert engine.collect(0, time_limit_s=60) == []
    first = engine.collect(1, time_limit_s=60)
    assert [c.ticket for c in first] == [0]
    rest = engine.collect(time_limit_s=60)
    assert sorted(c.ticket for c in rest) == [1, 2, 3, 4, 5]
    assert all(same(c, whole[c.ticket]) for c in [*first, *rest])
    assert engine.collect(3, time_limit_s=60) == []  # nothing is left


def test_pause_between_two_tokens_changes_nothing(folder):
    wanted = [request(i, [i + 2, 7], 3 + 3 * i) for i in range(4)]
    whole = generate(start_engine(folder), wanted)
    engine = start_engine(folder)
    engine.submit(wanted)
    done = engine.collect(1, time_limit_s=60)
    engine.pause()
    assert engine.collect(time_limit_s=60) == []
    late = [request(9, [1, 2], 2)]
    engine.submit(late)
    assert engine.collect(time_limit_s=60) == []
    engine.resume()
    done += engine.collect(time_limit_s=60)
    assert sorted(c.ticket for c in done) == [0, 1, 2, 3, 9]
    assert all(same(c, whole[c.ticket]) for c in done if c.ticket != 9)


def test_abort_returns_what_is_there_and_leaves_the_others_alone(folder):
    wanted = [request(i, [i + 2, 7], 3 if i == 0 else 10) for i in range(5)]
    whole = generate(start_engine(folder, batch=4), wanted)
    engine = start_engine(folder, batch=4)
    engine.submit(wanted)
    assert [c.ticket for c in engine.collect(1, time_limit_s=60)] == [0]
    # 2 is in flight, 4 still in the queue, 0 is done and 77 was never there
    taken = {c.ticket: c for c in engine.abort({2, 4, 0, 77})}
    assert set(taken) == {2, 4} and {c.finish_reason for c in taken.values()} == {"abort"}
    assert taken[2].tokens.tolist() == whole[2].tokens[:3].tolist()
    assert len(taken[2].logprobs) == len(taken[2].policy_versions) == 3
    assert len(taken[4].tokens) == len(taken[4].logprobs) == len(taken[4].policy_versions) == 0
    rest = engine.collect(time_limit_s=60)
    assert sorted(c.ticket for c in rest) == [1, 3] and all(same(c, whole[c.ticket]) for c in rest)
    assert engine.abort({1}) == []


def test_after_an_abort_of_everything_the_engine_is_fresh(folder):
    engine = start_engine(folder)
    engine.submit([request(i, [4, 5], 9 if i else 2) for i in range(3)])
    engine.collect(1, time_limit_s=60)
    assert sorted(c.ticket for c in engine.abort([1, 2])) == [1, 2]
    assert engine.collect(time_limit_s=60) == []
    wanted = requests(5, seed=8)
    again, fresh = generate(engine, wanted), generate(start_engine(folder), wanted)
    assert all(same(again[t], fresh[t]) for t in fresh)


def test_weights_replaced_in_mid_generation(tmp_path, folder, model):
    other = load_model(write_model(tmp_path / "other", "qwen2", tied=False, seed=9))
    prompt = [5, 6, 7, 8]
    engine = start_engine(folder, version=4)
    engine.submit([request(0, [1, 2], 3), request(1, prompt, 10)])
    assert [c.policy_versions.tolist() for c in engine.collect(1, time_limit_s=60)] == [[4, 4, 4]]
    engine.pause()
    set_weights(engine, other)
    engine.update_weights(5)
    engine.resume()
    (completion,) = engine.collect(time_limit_s=60)
    assert completion.policy_versions.tolist() == [4] * 3 + [5] * 7
    tokens = completion.tokens.tolist()
    with torch.no_grad():
        old = model(torch.tensor([prompt + tokens[:2]]), use_cache=True)
        before = torch.log_softmax(old.logits[0, len(prompt) - 1 :], -1)
        # token 3 was drawn by the old weights and is the first that the new ones read, on top of the old cache
        new = other(torch.tensor([tokens[2:-1]]), past_key_values=old.past_key_values)
        after = torch.log_softmax(new.logits[0], -1)
    expected = torch.cat([before, after])[range(10), tokens]
    np.testing.assert_allclose(completion.logprobs, expected, atol=3e-5, rtol=0)
    # the next request knows the new weights alone
    fresh = generate(engine, [request(2, prompt, 4)])[2]
    assert same(fresh, generate(start_engine(tmp_path / "other", version=5), [request(2, prompt, 4)])[2])


def test_the_time_limit_counts_what_is_unfinished(folder):
    engine = start_engine(folder, batch=2)
    engine.submit([request(i, [1, 2], 5) for i in range(3)])
    with pytest.raises(RunError, match=r"3 requests unfinished after rollout\.time_limit_s=0"):
        engine.collect(time_limit_s=0)


def test_sample_seeds():
    keys = [(s, t, p, i) for s in range(3) for t in range(3) for p in range(3) for i in range(3)]
    assert len({sample_seed(*key) for key in keys}) == len(keys)
    assert sample_seed(1, 2, 3) == sample_seed(1, 2, 3) != sample_seed(3, 2, 1)
    assert all(0 <= sample_seed(*key) < 2**64 for key in keys)
