"""Regressions on the forward process, and advantages, against numbers of the published code."""

from dataclasses import replace

import pytest
import torch
from bench.methods.regression.awm import AWM, AWMConfig
from bench.methods.regression.crd import CRD, CRDConfig
from bench.methods.regression.dgpo import DGPO, DGPOConfig
from bench.methods.regression.nft import NFT, NFTConfig, weighted_error
from bench.methods.regression.rvm import RVM, RVMConfig
from golden_numbers import TOLERANCE, double, error, given_core, golden, learned, noised
from torch import Tensor

from bench.core import Core
from bench.sampling.trajectory import Noised, Trajectory
from bench.training.advantages import Deviation, decoupled_advantages, group_normalised

NFT_NUMBERS = golden("item8_nft")


@pytest.mark.parametrize("case", [c for c in NFT_NUMBERS["loss_cases"] if c["adv_mode"] is None],
                         ids=lambda c: f"{c['beta']}-{c['kl_beta']}-{c['policy'][:5]}")  # fmt: skip
def test_nft(case, record_property):
    given = {name: double(value) for name, value in NFT_NUMBERS["loss_inputs"].items()}
    if case["policy"].startswith("on"):
        given["v_theta"] = given["v_old"]
    if case["policy"].startswith("floor"):
        given |= {name: torch.tensor(v, dtype=torch.float64) for name, v in NFT_NUMBERS["floor_inputs_f64"].items()}
    core = given_core(given["timesteps"] / 1000, policy=given["v_theta"], old=given["v_old"], prior=given["v_ref"])
    limit = case["adv_clip_max"]
    part = noised(core, given["x0"], given["noise"], given["advantages"].clamp(-limit, limit) / limit)
    method, theirs = NFT(NFTConfig(advantage_clip=limit, mix=case["beta"], kl=case["kl_beta"])), case["f64"]
    loss, gradient, metrics = learned(method, core, part)
    step = case["beta"] * (given["v_theta"] - given["v_old"])
    errors = {
        "noised": error(part.z, given["xt"]),
        "positive": error(weighted_error(core, part, given["v_old"] + step), theirs["positive_loss"]),
        "negative": error(weighted_error(core, part, given["v_old"] - step), theirs["negative_loss"]),
        "loss": error(loss, theirs["loss"]),
        "distance to the prior": error(metrics["distance/prior"].mean(), theirs["kl_div_loss"]),
        "distance to the old policy": error(metrics["distance/old"].mean(), theirs["old_deviate"]),
        "gradient": error(gradient, theirs["grad_loss_wrt_v_theta"]),
    }
    record_property("relative_errors", errors)
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("name", ["global_std", "prompt_std"])
def test_nft_advantages(name):
    """Those of Flow-GRPO too: population deviations with 1e-4 added."""
    for theirs, prefix in (
        (NFT_NUMBERS["advantage"], ""),
        (golden("item11_grpo_guard_dppo")["advantages"], "flow_grpo/grpo/"),
    ):
        over = {"global_std": "round", "prompt_std": "group"}[name]
        rewards = double(theirs["rewards"])
        ours = group_normalised(theirs["prompts"], rewards, Deviation(over=over, correction=0, epsilon=1e-4))
        assert error(ours[None], [theirs[prefix + name]]) < TOLERANCE


def test_unbiased_deviations():
    theirs = golden("item11_grpo_guard_dppo")["advantages"]
    rewards, prompts = double(theirs["rewards"]), theirs["prompts"]
    for over, name in (("round", "True"), ("group", "False")):
        ours = group_normalised(prompts, rewards, Deviation(over=over, correction=1, epsilon=1e-4))
        assert error(ours[None], [theirs[f"verl_omni/global_std={name}/norm=True"]]) < TOLERANCE
    order = torch.tensor(theirs["grouped_order"])
    ours = group_normalised(prompts, rewards, Deviation(over="group", correction=1, epsilon=1e-8))
    assert error(ours[order][None], [theirs["dancegrpo/use_group=True (grouped order)"]]) < TOLERANCE


def test_copies_follow_as_published():
    nft = NFT(NFTConfig()).copies()["old"]
    assert [nft.decay(n) for n in range(221)] == pytest.approx(NFT_NUMBERS["old_policy_decay"]["type1"])
    assert [nft.decay(n) for n in (499, 500, 600)] == pytest.approx(NFT_NUMBERS["old_policy_decay"]["type1_at_500_600"])
    ema = AWM(AWMConfig()).copies()["ema"]
    theirs = golden("item9_awm")["ema_adapter"]
    assert [ema.decay(n) for n in theirs["steps"]] == pytest.approx(theirs["decay"])


AWM_NUMBERS = golden("item9_awm")
POWERS = ("ghuber",)  # their other weightings are not options of ours


@pytest.mark.parametrize(
    "case",
    [
        c for c in AWM_NUMBERS["cases"]
        if c["config"]["weighting"] in POWERS and c["config"]["loss_type"] == "exp_first"
        and c["config"]["kl_weight"] == "Uniform"
    ],
    ids=lambda c: "-".join(str(c["config"][key]) for key in ("ghuber_power", "clip_range", "advantage_max", "beta"))
    + c["policy"],
)  # fmt: skip
def test_awm(case, record_property):
    given = {name: double(value) for name, value in AWM_NUMBERS["inputs"].items()}
    config, theirs = case["config"], case["f64"]
    old = given["v_theta"] if case["policy"] == "on" else given["v_old"]
    core = given_core(given["timesteps"], policy=given["v_theta"], old=old, prior=given["v_ref"], ema=given["v_ema"])
    scale = 0.2 if config["advantage_max"] else 1.0
    used = (scale * given["advantages"].clamp(-5, 5)).repeat(3)
    part = noised(core, given["x0"], given["noise"], used)
    method = AWM(
        AWMConfig(
            power=config["ghuber_power"], ratio_clip=config["clip_range"], kl=config["beta"], ema=config["ema_beta"]
        )
    )
    loss, gradient, metrics = learned(method, core, part)
    errors = {
        "advantages": error(used[None], [theirs["advantages_used"]]),
        "ratio": error(metrics["ratio"], theirs["ratio"]),
        "loss": error(loss, theirs["loss"]),
        "distance to the prior": error(metrics["distance/prior"].mean(), theirs["kl_loss"]),
        "distance to the average": error(metrics["distance/ema"].mean(), theirs["ema_kl_loss"]),
    }
    if "grad_loss_wrt_v_theta" in theirs:
        errors["gradient"] = error(gradient, theirs["grad_loss_wrt_v_theta"])
    else:
        errors["gradient"] = error(gradient.flatten(1).norm(dim=1), theirs["grad_loss_wrt_v_theta_l2"])
    record_property("relative_errors", errors)
    assert max(errors.values()) < TOLERANCE, errors


RVM_NUMBERS = golden("item14_rvm")


@pytest.mark.parametrize("case", RVM_NUMBERS["cases"], ids=lambda c: str(c["anchor_beta"]))
def test_rvm(case):
    given = {name: double(value) for name, value in RVM_NUMBERS["inputs"].items()}
    core = given_core(given["t"], policy=given["v_theta"], prior=given["v_ref"])
    part = noised(core, given["x0"], given["noise"], given["advantage"])
    loss, gradient, _ = learned(RVM(RVMConfig(kl=case["anchor_beta"])), core, part)
    assert error(gradient, case["f64"]["grad_loss_wrt_v_theta"]) < TOLERANCE
    assert error(loss, case["f64"]["loss"]) < TOLERANCE


@pytest.mark.parametrize("case", [c for c in RVM_NUMBERS["advantage"]["cases"] if "positive_only" not in c["kwargs"]],
                         ids=lambda c: c["name"])  # fmt: skip
def test_rvm_advantages(case):
    """Theirs is given the global deviation; ours computes it."""
    groups = RVM_NUMBERS["advantage"]["groups"]
    over = "round" if "normalization_std" in case["kwargs"] else "group"
    prompts = [str(i) for i, group in enumerate(groups) for _ in group]
    rewards = double([reward for group in groups for reward in group])
    core = given_core(double([0.5]), policy=torch.zeros(1, 2), prior=torch.zeros(1, 2))
    options = {"advantage_clip": case["kwargs"].get("clip", 5.0), "scale": case["kwargs"].get("scale", 0.1)}
    method = RVM(RVMConfig(deviation=Deviation(over=over, correction=0, epsilon=1e-4), **options))
    data = Trajectory(prompts, [(p, i) for i, p in enumerate(prompts)], core.model.encode(prompts),
                      latents=torch.zeros(len(prompts), 2, 2), rewards=rewards)  # fmt: skip
    ours = method.prepare(core, data).advantages
    theirs = [advantage for group in case["advantages"] for advantage in group]
    assert error(ours[None], [theirs]) < TOLERANCE


FACTORY = golden("item15_flow_factory")


def factory_core(case: dict) -> tuple[dict, Core]:
    """Inputs, and a core whose networks say them."""
    given = {name: double(value) for name, value in FACTORY["inputs"].items() if name != "group"}
    old = given["v_theta"] if case["policy"] == "on" else given["v_old"]
    return given, given_core(given["t"], policy=given["v_theta"], old=old, prior=given["v_ref"])


def factory_part(core: Core, given: dict, advantages: Tensor) -> Noised:
    prompts = list(map(str, FACTORY["inputs"]["group"]))
    return replace(noised(core, given["x0"], given["noise"], advantages), prompts=prompts)


@pytest.mark.parametrize("case", FACTORY["dgpo"], ids=lambda c: f"{c['dpo_beta']}-{c['clip_range']}-{c['policy']}")
def test_dgpo(case):
    given, core = factory_core(case)
    part = factory_part(core, given, given["advantages"].clamp(-5, 5))
    method = DGPO(DGPOConfig(strength=case["dpo_beta"], clip=case["clip_range"], kl=case["kl_beta"]))
    loss, gradient, metrics = learned(method, core, part)
    theirs = case["f64"]
    assert metrics["clipped"].bool().tolist() == theirs["clipped"]
    preference = double(theirs["preference"]).view(2, 4).sum(1).repeat_interleave(4)
    assert error(metrics["weight"], torch.sigmoid(preference)) < TOLERANCE
    assert error(loss, theirs["loss"]) < TOLERANCE
    assert error(gradient, theirs["grad_loss_wrt_v_theta"]) < TOLERANCE


@pytest.mark.parametrize("case", FACTORY["crd"], ids=lambda c: f"{c['crd_beta']}-{c['policy']}")
def test_crd(case):
    """Theirs saw one group at a time, so that its centre is ours."""
    given, core = factory_core(case)
    part = factory_part(core, given, double(case["f64"]["r"]))
    loss, gradient, _ = learned(CRD(CRDConfig(scale=case["crd_beta"], kl=case["kl_beta"])), core, part)
    assert error(loss, sum(case["f64"]["loss"]) / 2) < TOLERANCE
    assert error(2 * gradient, case["f64"]["grad_loss_wrt_v_theta"]) < TOLERANCE
    assert error((1 + given["advantages"].clamp(-5, 5) / 5) / 2, case["f64"]["r"]) < TOLERANCE


def test_copies_of_crd_follow_as_published():
    copies, theirs = CRD(CRDConfig()).copies(), FACTORY["crd_decay"]
    for name in ("old", "sampler"):
        assert [copies[name].decay(n) for n in theirs["steps"]] == pytest.approx(theirs[name])


@pytest.mark.parametrize("case", FACTORY["gdpo"], ids=lambda c: str(c["weights"]))
def test_gdpo_advantages(case):
    given = FACTORY["gdpo_inputs"]
    terms = torch.stack([double(values) for values in given["rewards"].values()], 1)
    ours = decoupled_advantages(list(map(str, given["groups"])), terms, list(case["weights"].values()))
    assert error(ours[None], [case["advantages"]]) < TOLERANCE
