"""One update is the same update, however the model, the batch and the ranks are cut; and it is transformers' update."""

import numpy as np
import pytest
import torch
from dapo_kernels import clipped_policy_loss
from safetensors.torch import load_file, save_file

from dapo_megatron.data.records import repeated
from tests.learner.batches import normal, random_batch, save_batch
from tests.learner.update_cases import CLIP, VALUE_CLIP
from tests.ranks import run_ranks
from tests.tiny_models import load_critic, load_model, write_critic, write_model

pytestmark = pytest.mark.distributed

TEMPERATURE = 0.9
LAYOUTS = {
    1: ["tp1pp1"],
    2: ["tp2pp1", "tp2pp1sp", "tp1pp2", "tp1pp2vpp2", "tp1pp1", "tp1cp2pp1"],
    4: ["tp2pp2", "tp2pp2vpp2sp", "tp2pp1sp", "tp1pp2", "tp4pp1", "tp2cp2pp1sp", "tp1cp2pp2vpp2"],
}
SHAPES = [(5, 12), (9, 30), (3, 21), (11, 7), (6, 40), (4, 18), (8, 25), (7, 33), (5, 2), (10, 28)]
BUDGETS = [1000, 150, 82]  # tokens a micro-batch: 1, 2 and 4 micro-batches on one data-parallel rank
KL_TERMS = {
    "qwen2 untied": {},
    "qwen2 tied": {"kl_coefficient": 0.5, "kl_estimator": "k2"},
    "qwen3 untied": {"kl_coefficient": 0.3, "kl_estimator": "k3"},
}
CRITIC_OF = "qwen2 tied"
MODELS = {"qwen2 untied": ("qwen2", False), "qwen2 tied": ("qwen2", True), "qwen3 untied": ("qwen3", False)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        name: str(write_model(root / name.replace(" ", "-"), family, tied=tied))
        for name, (family, tied) in MODELS.items()
    }


def _on_rows(batch, values):
    """Numbers of response tokens on the rows that predict them, all sequences end to end; 0 elsewhere."""
    parts = [
        np.concatenate([np.zeros(len(p) - 1, np.float32), v, np.zeros(1, np.float32)])
        for p, v in zip(batch.prompts, values, strict=True)
    ]
    return torch.from_numpy(np.concatenate(parts))


def _of_responses(batch, values_T):
    """The reverse of `_on_rows`."""
    parts = zip(values_T.detach().split(batch.lengths), batch.prompts, strict=True)
    return [part[len(prompt) - 1 : -1].numpy() for part, prompt in parts]


def _reference(model, batch, kl):
    """(sums of terms, gradient by canonical name) from transformers' own forward pass, and the loss record."""
    tokens = [
        torch.from_numpy(np.concatenate(pair)).long() for pair in zip(batch.prompts, batch.responses, strict=True)
    ]
    logits = torch.cat([model(t[None]).logits[0] for t in tokens])
    targets = torch.cat([torch.cat([t[1:], torch.zeros(1, dtype=torch.long)]) for t in tokens])
    record = clipped_policy_loss(
        logits.clone().contiguous(),
        targets,
        _on_rows(batch, batch.old_logprobs),
        _on_rows(batch, batch.advantages),
        _on_rows(batch, batch.loss_weights),
        denominator=batch.weight_sum,
        temperature=TEMPERATURE,
        reference_logprobs=None if batch.reference_logprobs is None else _on_rows(batch, batch.reference_logprobs),
        **CLIP,
        **kl,
    )
    record.loss.backward()
    return record, {name: p.grad for name, p in model.named_parameters()}


def _kl_term(record, batch, kl_coefficient=0.0, kl_estimator="k3"):
    if not kl_coefficient:
        return 0.0
    weights_T, reference_T = _on_rows(batch, batch.loss_weights), _on_rows(batch, batch.reference_logprobs)
    delta = torch.where(weights_T > 0, record.logprobs - reference_T, 0.0).double()
    k = delta**2 / 2 if kl_estimator == "k2" else (-delta).exp() - 1 + delta
    return float(kl_coefficient * (weights_T * k).sum() / batch.weight_sum)


@pytest.fixture(scope="module")
def batches(models, tmp_path_factory):
    """One batch a model, its old log-probs moved away from the present ones so that every clip region occurs."""
    root = tmp_path_factory.mktemp("batches")
    references = {}
    for name, folder in models.items():
        batch = random_batch(SHAPES, seed=3)
        generator = np.random.default_rng(4)
        batch.loss_weights = [generator.random(r, dtype=np.float32) + np.float32(0.5) for _, r in SHAPES]
        batch.loss_weights[3] = repeated(0.0, SHAPES[3][1])  # a filtered response
        model = load_model(folder)
        record, _ = _reference(model, batch, {})
        if KL_TERMS[name]:
            batch.reference_logprobs = [v + normal(generator, v) for v in _of_responses(batch, record.logprobs)]
        batch.old_logprobs = [v + normal(generator, v) for v in _of_responses(batch, record.logprobs)]
        model.zero_grad()
        record, gradient = _reference(model, batch, KL_TERMS[name])
        assert record.clipped_low.any() and record.clipped_high.any() and record.clipped_dual.any()
        path = save_batch(batch, root / f"{name.replace(' ', '-')}.safetensors")
        weights_T, advantages_T = _on_rows(batch, batch.loss_weights), _on_rows(batch, batch.advantages)
        terms = (weights_T * (record.ratio * advantages_T).abs()).sum() / batch.weight_sum
        references[name] = (path, record, gradient, float(terms), _kl_term(record, batch, **KL_TERMS[name]))
    return references


@pytest.fixture(scope="module")
def critic(models, tmp_path_factory):
    """A critic of the tied model, a batch for it in which every region of the clip occurs, and what transformers and
    torch make of both: (folder, batch's file, batch, values, (loss, clipped, tokens), gradient)."""
    root = tmp_path_factory.mktemp("critic")
    folder = str(write_critic(root / "model", models["qwen2 tied"]))
    batch = random_batch(SHAPES, seed=5)
    generator = np.random.default_rng(6)
    batch.loss_weights[3] = repeated(0.0, SHAPES[3][1])  # a filtered response
    model = load_critic(folder)
    tokens = [
        torch.from_numpy(np.concatenate(pair)).long() for pair in zip(batch.prompts, batch.responses, strict=True)
    ]
    values_T = torch.cat([model(t[None]).logits[0, :, 0] for t in tokens])
    batch.old_values = [v + normal(generator, v) for v in _of_responses(batch, values_T)]
    batch.returns = [v + normal(generator, v) for v in _of_responses(batch, values_T)]
    weights_T, old_T, returns_T = (
        _on_rows(batch, column) for column in (batch.loss_weights, batch.old_values, batch.returns)
    )
    near_T = old_T + (values_T - old_T).clamp(-VALUE_CLIP, VALUE_CLIP)
    errors_T = torch.maximum((values_T - returns_T) ** 2, (near_T - returns_T) ** 2) / 2
    loss = (weights_T * errors_T).sum() / weights_T.sum()
    loss.backward()
    beyond = (values_T - old_T).abs() > VALUE_CLIP
    clipped = (weights_T > 0) & beyond & ((near_T - returns_T) ** 2 > (values_T - returns_T) ** 2)
    assert 0 < int(clipped.sum()) < int((beyond & (weights_T > 0)).sum())
    gradient = {name: p.grad for name, p in model.named_parameters()}
    sums = {"loss": float(loss.detach()), "clipped": float(clipped.sum()), "tokens": float((weights_T > 0).sum())}
    path = save_batch(batch, root / "batch.safetensors")
    return folder, path, batch, _of_responses(batch, values_T), sums, gradient


@pytest.mark.parametrize("world", LAYOUTS)
def test_one_update_agrees_with_transformers_for_every_split(models, batches, critic, world, tmp_path):
    critic_case = {"critic": critic[0], "critic_batch": critic[1], "copied": models[CRITIC_OF]}
    for name, folder in models.items():
        path, record, gradient, terms, kl_term = batches[name]
        payload = {
            "models": {name: folder}, "layouts": LAYOUTS[world], "budgets": BUDGETS, "batch": path,
            "kl": KL_TERMS[name], **(critic_case if name == CRITIC_OF else {}),
        }  # fmt: skip
        sums = run_ranks(world, "tests.learner.update_cases:gradients", {**payload, "out": str(tmp_path)})
        if name == CRITIC_OF:
            _check_critic(critic, sums.pop("critic"), tmp_path)
        assert len(sums) == len(LAYOUTS[world]) * len(BUDGETS)
        if world == 1:
            assert {int(values[-2]) for values in sums.values()} == {1, 2, 4}, "1, 2 and 4 micro-batches"
        if world > 1:
            assert max(values[-1] for values in sums.values()) > 1, "data parallelism takes part"
        for case, (loss, low, high, dual, ratio, tokens, kl_loss, *_) in sums.items():
            assert kl_loss == pytest.approx(kl_term, rel=1e-5) and (kl_loss > 0.01) == bool(KL_TERMS[name])
            assert abs(loss - float(record.loss.detach())) <= 1e-5 * terms, case
            assert (low, high, dual) == tuple(
                float(flags.sum()) for flags in (record.clipped_low, record.clipped_high, record.clipped_dual)
            ), case
            assert ratio == pytest.approx(float(record.ratio.sum()), rel=1e-5)
            assert tokens == float((record.ratio > 0).sum())
            found = load_file(tmp_path / f"{world}|{case}.safetensors")
            assert set(found) == set(gradient)
            for tensor, expected in gradient.items():
                gap = float((found[tensor] - expected).abs().max())
                assert gap <= 1e-5 * float(expected.abs().max()), (case, tensor, gap, float(expected.abs().max()))


def _check_critic(critic, found, folder):
    """Values, loss and gradients of a critic under every split are transformers' and torch's."""
    _, _, batch, values, expected, gradient = critic
    norm = float(torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt())
    for case, report in found.items():
        assert report["kept by copying"], case
        for seen, value, weights in zip(report["values"], values, batch.loss_weights, strict=True):
            np.testing.assert_allclose(seen, np.where(weights > 0, value, 0.0), rtol=1e-5, atol=1e-5, err_msg=case)
        assert report["sums"] == pytest.approx(expected, rel=1e-5), case
        assert report["norm"] == pytest.approx(norm, rel=1e-5), case
        gradients = load_file(folder / f"{case}.safetensors")
        assert set(gradients) == set(gradient) and "score.bias" in gradients
        for tensor, wanted in gradient.items():
            gap = float((gradients[tensor] - wanted).abs().max())
            assert gap <= 1e-5 * float(wanted.abs().max()), (case, tensor, gap, float(wanted.abs().max()))


@pytest.mark.slow
def test_three_updates_agree_for_layouts_and_optimizers(models, batches, tmp_path):
    name = "qwen2 untied"
    payload = {"model": models[name], "batch": batches[name][0], "budget": 150, "out": str(tmp_path)}
    norms = {}
    for world, layouts in {1: ["tp1pp1"], 2: ["tp1pp1"], 4: ["tp2pp1sp", "tp2pp2", "tp1pp2vpp2"]}.items():
        norms |= run_ranks(world, "tests.learner.update_cases:updated_weights", {**payload, "layouts": layouts})
    before = load_file(f"{models[name]}/model.safetensors")
    reference = load_file(tmp_path / "1|tp1pp1|False.safetensors")
    for case, values in norms.items():
        assert values[0] == pytest.approx(norms["1|tp1pp1|False"][0], rel=1e-6), case
        # Adam's first step turns a gradient of rounding noise into a full step: later norms feel it
        assert values == pytest.approx(norms["1|tp1pp1|False"], rel=1e-4), case
        found = load_file(tmp_path / f"{case}.safetensors")
        for tensor, expected in reference.items():
            moved = float((expected - before[tensor]).abs().max())
            assert moved > 0
            gap = (found[tensor] - expected).abs()
            assert float(gap.quantile(0.99)) <= 2e-3 * moved, (case, tensor)


def test_twenty_supervised_steps_follow_transformers(models, tmp_path):
    folder, sequences, rate = models["qwen2 untied"], 6, 2e-3
    generator = torch.Generator().manual_seed(5)
    tokens = {}
    for step in range(20):
        for i in range(sequences):
            for part, low, high in (("prompt", 2, 10), ("response", 3, 30)):
                length = int(torch.randint(low, high, (1,), generator=generator))
                tokens[f"{step}.{i}.{part}"] = torch.randint(0, 30, (length,), generator=generator, dtype=torch.int32)
    save_file(tokens, tmp_path / "tokens.safetensors")

    model = load_model(folder).train()
    vectors = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    expected = []
    for step in range(20):
        total, count = 0.0, 0
        for i in range(sequences):
            prompt, response = (tokens[f"{step}.{i}.{part}"].long() for part in ("prompt", "response"))
            logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, response, reduction="sum")
            count += len(response)
        optimizer.zero_grad()
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 5)
        optimizer.step()
        expected.append((float(total / count), float(norm)))
    assert expected[-1][0] < expected[0][0] - 0.1, "the reference itself learns"

    payload = {
        "model": folder,
        "sequences": sequences,
        "learning_rate": rate,
        "tokens": str(tmp_path / "tokens.safetensors"),
    }
    for world, layout, budget in ((1, "tp1pp1", 1000), (4, "tp2pp2", 80), (4, "tp2pp1sp", 80)):
        found = run_ranks(
            world, "tests.learner.update_cases:supervised_losses", {**payload, "layout": layout, "budget": budget}
        )
        for (loss, norm), (loss_expected, norm_expected) in zip(found, expected, strict=True):
            assert loss == pytest.approx(loss_expected, abs=1e-4), layout
            assert norm == pytest.approx(norm_expected, rel=1e-3), layout


def test_the_live_model_is_made_of_megatron_linears_of_their_share(models):
    """hidden 64, 4 heads and 2 kv heads of 16, ffn 96, 128 padded vocabulary rows, over 2 tensor-parallel ranks."""
    modules = run_ranks(
        2, "tests.learner.update_cases:module_shapes", {"model": models["qwen2 untied"], "layout": "tp2pp1"}
    )
    for layer in range(4):
        prefix = f"decoder.layers.{layer}."
        assert modules[prefix + "self_attention.linear_qkv"] == ["ColumnParallelLinear", [(4 + 2 * 2) * 16 // 2, 64]]
        assert modules[prefix + "self_attention.linear_proj"] == ["RowParallelLinear", [64, 64 // 2]]
        assert modules[prefix + "mlp.linear_fc1"] == ["ColumnParallelLinear", [2 * 96 // 2, 64]]
        assert modules[prefix + "mlp.linear_fc2"] == ["RowParallelLinear", [64, 96 // 2]]
    assert modules["output_layer"] == ["ColumnParallelLinear", [128 // 2, 64]]
    assert len(modules) == 4 * 4 + 1
