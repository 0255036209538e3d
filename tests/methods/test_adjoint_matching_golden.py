"""Adjoint matching against numbers of the published code."""

import pytest
import torch
from bench.methods.adjoint_matching import AdjointMatching, AdjointMatchingConfig, lean_adjoint
from golden_numbers import TOLERANCE, Closed, Undulating, error, golden
from torch import Tensor

from bench.core import Core
from bench.options import Config
from bench.sampling.grids import ddim_kernel
from bench.sampling.trajectory import Trajectory


@pytest.mark.parametrize("case", golden("item5_adjoint_matching")["cases"], ids=lambda c: c["tag"])
def test_adjoint_matching(case, monkeypatch, record_property):
    params, latents = case["params"], torch.tensor(case["trajectory"])
    betas = torch.linspace(params["beta_start"] ** 0.5, params["beta_end"] ** 0.5, 1000) ** 2
    table = torch.cumprod(1 - betas, 0)
    kernel = ddim_kernel(
        table, params["T"], eta=params["eta"], spacing="trailing", final_alpha=float(case["final_alpha_cumprod"][0])
    )
    assert kernel.timesteps.tolist() == case["timesteps"]
    core = Core(Closed(), kernel, Undulating(Config()), beta=params["reward_multiplier"])
    names = [(str(i), 0) for i in range(len(latents))]
    data = Trajectory([prompt for prompt, _ in names], names, torch.zeros(len(latents), 1), latents=latents)
    adjoint, means, rewards = lean_adjoint(core, data)
    std = kernel.std(torch.arange(kernel.steps), latents[0, 1:])
    with torch.no_grad():
        finetuned = [
            kernel.mean(z, core.predict(z, k, data.conditioning), k) for k, z in enumerate(latents.unbind(1)[:-1])
        ]
    errors = {
        "final alpha": error(kernel.alphas_cumprod[-1:], case["final_alpha_cumprod"]),
        "std": error(std.flatten(), case["std_dev_t"]),
        "rewards": error(rewards, case["reward_values"]),
        "adjoint states": error(adjoint.flatten(0, 1), torch.tensor(case["adjoint_states"]).flatten(0, 1)),
        "controls": error(
            ((torch.stack(finetuned, 1) - means) / std).flatten(0, 1),
            torch.tensor(case["control_times_sqrt_dt"]).flatten(0, 1),
        ),
    }

    # Their code pairs step k with a_k, ours with a_{k+1}: hand ours the states one place later.
    def one_later(core: Core, data: Trajectory, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat([adjoint[:, :1], adjoint[:, :-1]], 1), means, rewards

    monkeypatch.setattr("bench.methods.adjoint_matching.lean_adjoint", one_later)
    method, theirs = AdjointMatching(AdjointMatchingConfig(fraction=1)), case["loss_all_timesteps"]
    loss = sum(part.values.sum() for part in method.losses(core, data)) / len(data)
    (gradient,) = torch.autograd.grad(loss, core.model.weights)
    errors["loss"] = error(loss[None], [theirs["loss"]])
    errors["gradient"] = error(gradient, [theirs["grad"][name] for name in "abc"])
    record_property("relative_errors", errors)
    assert max(errors.values()) < TOLERANCE, errors
