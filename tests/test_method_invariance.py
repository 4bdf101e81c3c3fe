"""Every method's update, and the tokens it chooses, are the same however model, batch and ranks are cut."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dapo_megatron.algorithms.registry import TokenBatch, policy_losses
from tests.method_cases import METHODS, STANDS, groups, recipe
from tests.ranks import run_ranks
from tests.tiny_models import write_model

pytestmark = pytest.mark.distributed

INVARIANT = [name for name in METHODS if "micro_batch" not in name]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def model(out):
    return str(write_model(out / "model", "qwen2", tied=False))


@pytest.fixture(scope="module")
def alone(model, out):
    payload = {"model": model, "layouts": ["tp1pp1"], "budgets": [1000, 60], "methods": list(METHODS), "out": str(out)}
    return run_ranks(1, "tests.method_cases:every_method", payload)


@pytest.fixture(scope="module")
def spread(model, out):
    layouts = ["tp2pp2", "tp2pp1sp", "tp1pp1", "tp1cp2pp2"]
    payload = {"model": model, "layouts": layouts, "budgets": [60], "methods": INVARIANT, "out": str(out)}
    return run_ranks(4, "tests.method_cases:every_method", payload)


def _agree(found, expected, case):
    for column in ("weights", "penalties"):
        for ours, theirs in zip(found[column], expected[column], strict=True):
            assert [w > 0 for w in ours] == [w > 0 for w in theirs], (case, column)
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=case)
    for number in ("loss", "norm", "ratio", "kl"):
        assert found[number] == pytest.approx(expected[number], rel=2e-5, abs=2e-6), (case, number)
    for number in ("low", "high", "tokens", "kept", "bonus"):
        assert found[number] == expected[number], (case, number)
    assert found["pairs"] == pytest.approx(expected["pairs"], rel=2e-5, abs=2e-5), case


def test_every_method_agrees_over_micro_batches_and_ranks(alone, spread, out):
    for case, found in {**alone, **spread}.items():
        name = case.rpartition("|")[2]
        if case.count("|") == 2 and name in INVARIANT:
            _agree(found, alone[f"tp1pp1|1000|{name}"], case)
    for case in (case for case in spread if case.count("|") == 2):
        name = case.rpartition("|")[2]
        gradient, expected = (load_file(out / f"{p}.safetensors") for p in (f"4|{case}", f"1|tp1pp1|1000|{name}"))
        for tensor, values in expected.items():
            gap = float((gradient[tensor] - values).abs().max())
            assert gap <= 2e-5 * float(values.abs().max()), (case, tensor)


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_that_of_the_formula_over_its_denominator(alone, name):
    """The registered losses, held to their formulas elsewhere, on all tokens of a mini-batch at once in fp64."""
    facts, values, algorithm = alone[f"tp1pp1|1000|{name}"], alone["tp1pp1|1000"], recipe(name).algorithm
    coefficient = 0.0 if name.endswith("above") else STANDS.get(name, algorithm.entropy_coefficient)
    losses = []
    for update in range(2):
        groups = slice(2 * update, 2 * update + 2)
        sequences = {key: [s for group in column[groups] for s in group] for key, column in values.items()}
        new, old, reference, entropy = (
            np.array([t for s in sequences[key] for t in s])
            for key in ("present_logprobs", "old_logprobs", "reference_logprobs", "entropies")
        )
        lengths = [len(s) for s in sequences["entropies"]]
        numbers = np.repeat(np.arange(len(lengths)), lengths)
        weights = np.array(facts["weights"][update])
        penalties = np.array(facts["penalties"][update]) if facts["penalties"] else np.zeros(len(weights))
        rows = weights > 0
        columns = (new, entropy, old, np.array(facts["advantages"][update]), penalties, weights, numbers)
        found = policy_losses()[algorithm.policy_loss].compute(
            TokenBatch(
                *(torch.from_numpy(column[rows]) for column in columns), len(lengths), algorithm.eps_low,
                algorithm.eps_high, algorithm.eps_dual, algorithm.cispo.lower_clip,
            )
        )  # fmt: skip
        a_token = found.losses_N.numpy() - coefficient * entropy[rows]
        if algorithm.kl.coefficient:
            a_token += algorithm.kl.coefficient * (new - reference)[rows] ** 2 / 2  # k2
        trained = np.array(alone["tp1pp1|1000|clip"]["weights"][update]) > 0
        kept_alone = algorithm.token_selection.denominator == "kept" and "clip-cov" not in name
        divisor = (rows if kept_alone else trained).sum()
        if algorithm.loss_aggregation == "sequence-mean":
            divisor = len(set(numbers[trained]))
        if algorithm.loss_aggregation == "constant-length":
            divisor = len(lengths) * 24
        if algorithm.policy_loss == "dpo":
            divisor = facts["pairs"]["pairs"] / 2
        losses.append((weights[rows] * a_token).sum() / divisor)
    assert facts["loss"] == pytest.approx(np.mean(losses), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["dpo", "dpo, current"])
def test_the_gradient_of_pairs_is_that_of_dpos_loss(alone, name):
    """−A·log π over the number of pairs has the gradient of the loss by its definition, in fp64 by autograd."""
    facts, values, algorithm = alone[f"tp1pp1|1000|{name}"], alone["tp1pp1|1000"], recipe(name).algorithm
    settings, column = algorithm.dpo, "old_logprobs" if algorithm.statistics == "old" else "present_logprobs"
    beta, smooth = settings.beta, settings.label_smoothing
    losses, right, pairs = 0.0, 0, 0
    for update in range(2):
        logprobs, slopes = [], []
        for g, group in enumerate(groups(1)[2 * update : 2 * update + 2], start=2 * update):
            own = [torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in values[column][g]]
            gaps = [p.sum() - sum(r) for p, r in zip(own, values["reference_logprobs"][g], strict=True)]
            better = int(group.rewards[1] > group.rewards[0])  # the third response is truncated
            logit = beta * (gaps[better] - gaps[1 - better])
            loss = -(1 - smooth) * logit.sigmoid().log() - smooth * (1 - logit.sigmoid()).log()
            loss.backward()
            losses, right, pairs = losses + float(loss.detach()), right + int(logit > 0), pairs + 1
            logprobs += own
            slopes += [-p.grad if p.grad is not None else torch.zeros_like(p) for p in own]
        expected = torch.cat(slopes).numpy()
        np.testing.assert_allclose(facts["advantages"][update], expected, rtol=1e-4, atol=1e-6)
    found = facts["pairs"]
    assert (found["pairs"], found["right"], found["left_out"]) == (pairs, right, 0)
    assert found["loss"] == pytest.approx(losses, rel=1e-5)
    assert found["worse"] < 0 and found["better"] < 0


def test_every_method_is_another_update(alone):
    norms = {name: alone[f"tp1pp1|1000|{name}"]["norm"] for name in METHODS}
    assert min(norms.values()) > 1e-3
    assert norms.pop("adaptive entropy, above") == pytest.approx(norms["clip"])  # no bonus above the target
    assert len({f"{norm:.5g}" for norm in norms.values()}) >= len(norms) - 1, norms


def test_the_coefficient_of_the_bonus_moves_towards_the_target(alone):
    keys = ("entropy/coefficient", "entropy/coefficient_next")
    for name, expected in (("adaptive entropy", (0.05, 0.06)), ("adaptive entropy, above", (0.0, 0.04))):
        assert [alone[f"tp1pp1|1000|{name}"]["bonus"][key] for key in keys] == pytest.approx(expected)
    assert alone["tp1pp1|1000|clip"]["bonus"] == {}


def test_an_own_selection_keeps_its_share(alone):
    assert 0.5 < alone["tp1pp1|1000|own selection"]["kept"] < 0.75


def test_what_the_methods_do_to_weights(alone):
    facts = {name: alone[f"tp1pp1|1000|{name}"] for name in METHODS}
    clip = facts["clip"]
    trained = [np.array(w) > 0 for w in clip["weights"]]
    counts = [int(t.sum()) for t in trained]
    for name, share in (("high-entropy, kept", 0.2), ("high-entropy, all", 0.2), ("low-entropy", 0.8)):
        kept = [int((np.array(w) > 0).sum()) for w in facts[name]["weights"]]
        assert kept == [int(share * n) for n in counts], name
    # the same tokens, divided by the kept ones or by all
    sets = [[np.array(w) > 0 for w in facts[n]["weights"]] for n in ("high-entropy, kept", "high-entropy, all")]
    assert all((a == b).all() for a, b in zip(*sets, strict=True))
    for name in ("clip-cov", "clip-cov, current"):
        dropped = [int((t & (np.array(w) == 0)).sum()) for t, w in zip(trained, facts[name]["weights"], strict=True)]
        assert dropped == [int(0.05 * n) for n in counts], name
    penalised = [np.array(p) for p in facts["kl-cov"]["penalties"]]
    assert [int((p > 0).sum()) for p in penalised][1] == int(0.1 * counts[1])
    assert {float(p.max()) for p in penalised} == {2.0}
    assert facts["gspo"]["low"] > 0 and facts["gspo"]["high"] > 0 and facts["cispo"]["high"] > 0
    assert facts["cispo"]["low"] == 0 < facts["cispo, lower, sequence-mean"]["low"]
    assert facts["cispo"]["kl"] > 0.01


def test_statistics_of_micro_batches_change_with_the_split(alone):
    whole, split = (alone[f"tp1pp1|{budget}|high-entropy, micro_batch"] for budget in (1000, 60))
    # one micro-batch: the choice over the mini-batch, which that of `old` is while the policy stands still
    assert whole["weights"] == alone["tp1pp1|1000|high-entropy, kept"]["weights"]
    assert [w > 0 for w in whole["weights"][0]] != [w > 0 for w in split["weights"][0]]


def test_old_and_current_statistics_agree_before_the_first_update(model):
    same = run_ranks(2, "tests.method_cases:first_update", {"model": model, "layout": "tp2pp1"})
    assert len(same) >= 7 and all(all(pair) for pair in same.values()), same
