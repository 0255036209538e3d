"""Gradient checkpointing changes no gradient."""

import torch
from scaffold import pipeline_model

from bench.diagnose.selftest.scaffold import perturb
from bench.runtime.meter import Meter
from bench.sampling.noise import generator


def test_checkpointing_changes_no_gradient(pipeline_folder):
    """The prior's vjp must run through the prior again, also when both networks share one graph."""
    found = []
    for checkpointing in (False, True):
        model = pipeline_model(pipeline_folder, checkpointing=checkpointing)
        perturb(model)
        meter = Meter()
        meter.watch(model.network)
        rng = generator(0, "weights", "checkpointing")
        z, a, b = (torch.from_numpy(rng.standard_normal((2, 4, 8, 8), "float32")) for _ in range(3))
        t, text, weights = torch.tensor([100, 700]), model.encode(["cat", "dog"]), list(model.adapters().values())

        def outcome(policy: bool, prior: bool, model=model, z=z, a=a, b=b, t=t, text=text, weights=weights):
            z = z.clone().requires_grad_()
            outputs = [model.predict(z, t, text, prior=p) for p, used in ((False, policy), (True, prior)) if used]
            value = sum((x * y).sum() for x, y in zip(outputs, (a, b) if policy else (b,), strict=False))
            inputs = [z, *weights] if policy else [z]
            return [*outputs, *torch.autograd.grad(value, inputs)]

        both, policy, prior = outcome(True, True), outcome(True, False), outcome(False, True)
        assert meter.network_forwards == (4 * 4 * 2 if checkpointing else 4 * 4)  # it does run again
        assert torch.allclose(both[2], policy[1] + prior[1], rtol=1e-4, atol=1e-5)  # gradients in z add up
        assert all(torch.equal(x, y) for x, y in zip(both[3:], policy[2:], strict=True))  # the prior moves no weight
        assert not torch.allclose(policy[0], prior[0], rtol=1e-2)
        found.append([*both, *policy, *prior])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
