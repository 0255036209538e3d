"""Every training method on the random pipeline: where gradients go, invariances, resuming, stopping."""

from dataclasses import replace

import pytest
import torch
from scaffold import PROMPTS, by_family, small_method, trainer_of

from bench import registry
from bench.diagnose.selftest.methods import calls_differ
from bench.diagnose.selftest.scaffold import perturb, perturb_networks, update
from bench.settings import OptimizerConfig, TrainConfig
from bench.training.trainer import Trainer

BUILT_IN = registry.BUILT_IN["methods"]
TRAINING = [name for name in BUILT_IN if registry.load("methods", name).needs.training]


@pytest.mark.parametrize("name", ["nft", "awm", "adjoint_matching", "rtb"])
def test_losses_may_have_their_own_guidance(name, core, tmp_path):
    """Paths of the sampler's guidance, and on them the loss of a core that has the other."""
    method, rows = small_method(name), []
    perturb(core.model)
    train = TrainConfig(updates=1, prompts_per_round=2, samples_per_prompt=2, updates_per_round=1, guidance=1.0)
    trainer = Trainer(core, method, PROMPTS, train, OptimizerConfig(), tmp_path)
    data = trainer.sample_round(0)
    guided = core.rollout(core.batch(data.samples), weights="old" if "old" in core.copies else None)
    assert torch.allclose(data.latents, guided.latents, atol=1e-5)
    expected, _ = update(replace(core, model=core.model.with_guidance(1.0)), method, data)
    guided_loss, _ = update(core, method, data)
    trainer.run(rows.append)
    assert rows[0]["loss"] == pytest.approx(expected, rel=2e-5)
    assert rows[0]["loss"] != pytest.approx(guided_loss, rel=2e-4)


@pytest.mark.parametrize("name", TRAINING)
def test_gradients_reach_what_trains_and_nothing_else(name, core, tmp_path):
    method = small_method(name)
    trainer = trainer_of(core, method, tmp_path)
    data = trainer.sample_round(0)
    _, start = update(core, method, data)
    adapters = core.model.adapters()
    trained = method.needs.adapters
    assert all(start[key].any() == trained for key in adapters if ".lora_B." in key)
    perturb(core.model)
    perturb_networks(core)
    _, later = update(core, method, data)
    assert all(later[key].any() == trained for key in adapters)
    for network, modules in core.networks.items():
        at_start = {key for key in start if key.startswith(f"{network}.") and start[key].any()}
        assert at_start == {f"{network}.unet.conv_out.weight", f"{network}.unet.conv_out.bias"}
        assert later[f"{network}.unet.conv_in.bias"].any()  # log Z sees no latent, so no weight of this layer
        assert all(parameter.grad is not None for parameter in modules.parameters())
    pipe = core.model.pipeline
    others = [p for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()]
    own = {id(p) for p in adapters.values()}
    others = [p for p in others if id(p) not in own]
    assert len(others) > 100
    assert all(p.grad is None and not p.requires_grad for p in others)


LONG_SUMS = {"tmpo", "res_db", "dmdr"}  # of large terms that nearly cancel, in float32


@pytest.mark.parametrize(
    "name",
    by_family(TRAINING, "nabla_gfn_adjoint", "rtb", "dag_kl"),
)
def test_losses_do_not_depend_on_the_micro_batch_or_the_call(name, core, tmp_path):
    method = small_method(name)
    data = trainer_of(core, method, tmp_path).sample_round(0)[:3]
    perturb(core.model)  # after sampling, so that ratios and the trust region are not trivial
    perturb_networks(core)
    found = {}
    for size in (2, 5, 64):
        found[size] = update(replace(core, micro_batch=size), method, data)
    reference = found[64]
    again, gradients = update(replace(core, micro_batch=64), method, data)
    assert again == reference[0]
    assert all(torch.equal(gradients[key], value) for key, value in reference[1].items())
    for size in (2, 5):
        loss, gradients = found[size]
        assert loss == pytest.approx(reference[0], rel=5e-3 if name in LONG_SUMS else 1e-4)
        for group in (*["policy"] * method.needs.adapters, *core.networks):
            keys = [k for k in gradients if k.startswith(f"{group}.") or (group == "policy" and ".lora_" in k)]
            ours, theirs = (torch.cat([g[k].flatten() for k in keys]) for g in (gradients, reference[1]))
            assert theirs.any()
            assert (ours - theirs).norm() < (5e-3 if name in LONG_SUMS else 1e-4) * theirs.norm(), (size, group)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if registry.load("methods", name).needs.uneven])
def test_what_is_declared_uneven_is(name):
    """Processes that share the network's weights compute it all alike, which takes longer."""
    assert calls_differ(name, seeds=8)
