"""Diffusion-DPO against numbers of the published code."""

import pytest
import torch
from bench.methods.online_dpo import OnlineDPO, OnlineDPOConfig
from golden_numbers import TOLERANCE, Given, Nothing, double, error, given_core, golden, noised
from torch import Tensor

from bench.core import Core
from bench.options import Config
from bench.sampling.grids import ddim_kernel
from bench.training.advantages import best_and_worst

DPO = golden("item12_diffusion_dpo")


def preferred(core: Core, winners: Tensor, losers: Tensor, noise: Tensor, k: Tensor, strength: float) -> tuple:
    """Loss, accuracy, gradient in the outputs (winners first), and the noised samples, of pairs that differ."""
    vars(core)["steps"] = k
    part = noised(core, winners, noise, torch.ones(len(k), dtype=torch.float64))
    core.model.outputs["policy"].requires_grad_()
    values, metrics = OnlineDPO(OnlineDPOConfig(strength=strength)).pair_losses(core, part, losers)
    values.mean().backward()
    accuracy = metrics["accuracy"].mean()
    return values.mean(), accuracy, core.model.outputs["policy"].grad, part.z, core.kernel.noised(losers, noise, k)


@pytest.mark.parametrize("case", DPO["epsilon"]["cases"], ids=lambda c: str(c["beta_dpo"]))
def test_preferences_of_noise(case):
    given, theirs = {name: torch.tensor(value) for name, value in DPO["epsilon"]["inputs"].items()}, case["f64"]
    table = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    kernel = ddim_kernel(table, 1000, steps_offset=0).to(dtype=torch.float64)
    model = Given(dtype=torch.float64)
    model.outputs = {"policy": given["model_pred"].double(), "prior": given["ref_pred"].double()}
    core = Core(model, kernel, Nothing(Config()), 1.0)
    winners, losers = given["latents"].double().chunk(2)
    k = 999 - given["timesteps"][:3].long()
    loss, accuracy, gradient, *states = preferred(
        core, winners, losers, given["noise"][:3].double(), k, float(case["beta_dpo"])
    )
    errors = [error(loss, theirs["loss"]), error(accuracy, theirs["implicit_acc"])]
    if "grad_loss_wrt_model_pred" in theirs:
        errors += [error(gradient, theirs["grad_loss_wrt_model_pred"])]
    else:
        errors += [error(gradient.flatten(1).norm(dim=1), theirs["grad_loss_wrt_model_pred_l2"])]
    errors += [error(torch.cat(states), given["noisy_latents"])]
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize("code", ["flow_factory", "verl_omni"])
@pytest.mark.parametrize("place", [0, 1])
def test_preferences_of_velocities(code, place):
    given, case = {name: double(value) for name, value in DPO["flow"]["inputs"].items()}, DPO["flow"][code][place]
    outputs = {name: torch.cat([given[f"{own}_w"], given[f"{own}_l"]]) for name, own in
               (("policy", "theta"), ("prior", "ref"))}  # fmt: skip
    core = given_core(given["sigma"], **outputs)
    loss, accuracy, gradient, *states = preferred(
        core, given["chosen"], given["rejected"], given["noise"], core.steps, float(case["beta"])
    )
    theirs = case["f64"]
    errors = [error(loss, theirs["loss"])]
    errors += [error(accuracy, theirs.get("implicit_accuracy", theirs.get("implicit_acc")))]
    for ours, name in zip(gradient.chunk(2), ("grad_loss_wrt_theta_w", "grad_loss_wrt_theta_l"), strict=True):
        if name in theirs:
            errors.append(error(ours, theirs[name]))
        else:
            errors.append(error(ours.flatten(1).norm(dim=1), theirs[f"{name}_l2"]))
    for ours, name in zip(states, ("noised_chosen", "noised_rejected"), strict=True):
        errors.append(error(ours, DPO["flow"][name]))
    assert max(errors) < TOLERANCE, errors


def test_pairs():
    """Best and worst by group; a group without two different scores is marked."""
    pairing = DPO["pairing"]
    scores, groups = double(pairing["scores"]), [str(uid) for uid in pairing["uid"]]
    best, worst = best_and_worst(groups, scores)
    ours = {groups[i]: (int(best[i]), int(worst[i])) for i in range(len(groups))}
    theirs = {groups[w]: (w, other) for w, other in pairing["flow_factory_pairs"] if scores[w] != scores[other]}
    assert {uid: pair for uid, pair in ours.items() if scores[pair[0]] != scores[pair[1]]} == theirs
    assert len(theirs) == len(set(groups)) - 2  # one has a single sample, one two equal ones
