"""Methods that declare the tilted target reach it by training."""

from dataclasses import replace

import pytest
import torch
from bench.methods.adjoint_matching import AdjointMatching, AdjointMatchingConfig
from bench.methods.balance.db import ResDB, ResDBConfig
from bench.methods.balance.rtb import RTB, RTBConfig
from bench.methods.nabla.adjoint import NablaGFNAdjoint
from bench.methods.nabla.published import NablaGFNPublished
from bench.methods.nabla.residual import NablaGFN
from linear_gaussian import truth_of
from scaffold import sample, with_rewards

from bench.diagnose.selftest.scaffold import BETA, DIRECTION, gaussian_core, moments

SCORE = {"fraction": 1, "weighting": "score"}


# method, updates, and the rates of the policy and of the method's network, on the diffusion and on the flow path
CASES = {
    "nabla_gfn": (NablaGFN(NablaGFN.Config(**SCORE)), 500, (1e-2, 1e-2), (2e-2, 4e-2)),
    "nabla_gfn_published": (
        NablaGFNPublished(NablaGFNPublished.Config(**SCORE, trust=0.0)), 500, (1e-2, 1e-2), (2e-2, 4e-2)
    ),
    "nabla_gfn_adjoint": (NablaGFNAdjoint(NablaGFNAdjoint.Config(fraction=1)), 150, (1e-2, 1e-2), (4e-2, 2e-2)),
    "adjoint_matching": (AdjointMatching(AdjointMatchingConfig(fraction=1)), 200, (1e-2, None), (2e-2, None)),
    "res_db": (ResDB(ResDBConfig()), 900, (3e-3, 0.1), (6e-3, 0.1)),
    "rtb": (RTB(RTBConfig()), 750, (1e-2, 5e-2), (2e-2, 5e-2)),
}  # fmt: skip
FAST = {
    "diffusion": ("nabla_gfn", "nabla_gfn_adjoint", "adjoint_matching", "rtb"),
    "flow": ("nabla_gfn", "adjoint_matching"),
}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        pytest.param(name, path, marks=() if name in fast else pytest.mark.slow)
        for path, fast in FAST.items()
        for name in CASES
    ],
)
def test_training_reaches_the_target(name, path):
    """From the prior, a method's own losses reach the tilted mean (5 % of the shift) and leave the variance alone."""
    method, updates, rates, flow_rates = CASES[name]
    core = gaussian_core(6, path=path)
    core = replace(core, micro_batch=1024)
    core.networks.update(method.networks(core.model))
    # a velocity moves a step's mean by less than a noise does, so that its rates are higher
    rate, network_rate = flow_rates if path == "flow" else rates
    groups = [{"params": list(core.model.adapters().values()), "lr": rate}]
    groups += [{"params": list(net.parameters()), "lr": network_rate} for net in core.networks.values()]
    optimizer = torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1.0, 2 * (1 - update / updates)))
    for update in range(updates):
        data = sample(core, 32, first=32 * update)
        if method.needs.rewards:
            data = with_rewards(core, data)
        optimizer.zero_grad()
        for loss in method.losses(core, data):
            (loss.values.sum() / len(data)).backward()
        optimizer.step()
        decay.step()
    (mean, variance), (prior_mean, prior_variance) = moments(core)[:2], moments(core, prior=True)[:2]
    asked = BETA * DIRECTION * (prior_variance - truth_of(core).jacobian.prod() ** 2)
    assert torch.allclose(mean - prior_mean, asked, rtol=0.05)
    assert torch.allclose(variance, prior_variance, rtol=0.05)
