"""DAG-DB and DAG-KL against numbers of the published code."""

import pytest
import torch
from bench.methods.balance.dag_kl import DAGKL
from bench.methods.balance.db import DB
from golden_numbers import TOLERANCE, Closed, Undulating, error, golden
from torch import Tensor

from bench.core import Core
from bench.options import Config
from bench.sampling.grids import ddim_kernel
from bench.sampling.kernel import gaussian_log_prob
from bench.sampling.trajectory import Transitions


class Guided(Closed):
    """`ε = uncond + w (cond − uncond)` of `a x + b sin x + e`; the conditioning holds both maps e."""

    def __init__(self, guidance: float):
        super().__init__()
        self.weights, self.guidance = torch.nn.Parameter(torch.tensor([0.3, 0.1])), guidance

    def predict(self, z, t, conditioning, *, prior=False, guided=True):
        base = self.weights[0] * z + self.weights[1] * torch.sin(z)
        conditional, unconditional = base + conditioning[:, 0], base + conditioning[:, 1]
        return unconditional + self.guidance * (conditional - unconditional) if guided else conditional


class StoredFlow(DB):
    """DAG-DB on given transitions, with stored flows: there a stub produced them, here they have tests of their own."""

    part: Transitions
    flows: tuple[Tensor, Tensor]

    def steps(self, core, data):
        return torch.zeros(len(data), 1)

    def terms(self, core, data, steps, size, rewards=None):
        output = core.predict(self.part.z, self.part.k, self.part.conditioning)
        yield self.balance(core, self.part, output, torch.zeros(0))

    def flow(self, core, part, z, k, rewards):
        return self.flows[int((k == part.k + 1).all())]


class StoredFlowDAGKL(StoredFlow, DAGKL):
    """The same of DAG-KL."""


@pytest.mark.parametrize("case", golden("item3_dag")["cases"], ids=lambda c: c["tag"])
def test_dag(case, sd_alphas_cumprod, record_property):
    params = case["params"]
    kernel = ddim_kernel(sd_alphas_cumprod, params["num_steps"], eta=1.0, steps_offset=1)
    k = torch.tensor([kernel.timesteps.tolist().index(time) for time in case["timestep"]])
    core = Core(Guided(params["guidance_scale"]), kernel, Undulating(Config()), beta=params["reward_exp"])
    field = {name: torch.tensor(value) for name, value in case.items() if isinstance(value, list)}
    names = [(str(i), 0) for i in range(3)]
    part = Transitions(
        [prompt for prompt, _ in names], names, torch.stack([field["text_add"], field["neg_add"]], 1),
        row=torch.arange(3), k=k, unfinished=torch.arange(3),
        finished=torch.arange(0), z=field["x_t"], z_next=field["x_prev"], model_output=field["unet_outputs_old"],
        log_prob=field["old_log_probs"] * field["x_t"][0].numel(),
    )  # fmt: skip
    kl = params["klpf"] > 0
    # their trust term is the plain mean of squares, as ours; β is in the stored flows
    method_class, options = StoredFlow, {"trust": params["unetreg"]}
    if kl:
        method_class = StoredFlowDAGKL
        options |= {"clip": params["clip_range"], "policy_weight": params["klpf"]}
        options |= {"advantage_clip": params["adv_clip_max"]}
    method = method_class(method_class.Config(**options))
    leaves = [field[name].clone().requires_grad_() for name in ("flow_model_out", "flow_model_out_next")]
    rewards, ends = [field["reward_hat"], field["reward_hat_next"]], field["end_mask"]
    now, after = (leaf + core.beta * reward for leaf, reward in zip(leaves, rewards, strict=True))
    after = torch.where(ends, core.beta * field["terminal_reward"], after)
    method.part, method.flows = part, (now, after)
    eps = core.predict(part.z, k, part.conditioning)
    std, (back_mean, back_std) = kernel.std(k, part.z), kernel.noising(part.z_next, k)
    count = part.z[0].numel()
    (terms,) = method.terms(core, part, None, 0)
    (loss,) = method.losses(core, part)
    gradients = torch.autograd.grad(loss.values.mean(), [core.model.weights, *leaves])
    clean = kernel.clean(part.z, core.predict(part.z, k, part.conditioning, guided=False), k)
    inner = ~ends  # the last transition's next state is finished
    following = k[inner] + 1
    clean_next = kernel.clean(
        part.z_next[inner],
        core.predict(part.z_next[inner], following, part.conditioning[inner], guided=False),
        following,
    )
    theirs = case["grad_loss"]
    errors = {
        "prediction": error(eps, field["noise_pred"]),
        "mean": error(kernel.mean(part.z, eps, k), field["pf_mean"]),
        "std": error(std.flatten(), field["pf_std"]),
        "noising mean": error(back_mean, field["pb_mean"]),
        "noising std": error(back_std.flatten(), field["pb_std"]),
        "log p_θ": error(terms.log_policy, field["log_pf"]),
        "log p_B": error(gaussian_log_prob(part.z, back_mean, back_std) / count, field["log_pb"]),
        "clean": error(clean, field["x0hat_for_reward"]),
        "next clean": error(clean_next, field["x0hat_next_for_reward"][inner]),
        "flows": max(error(now, field["flow_total"]), error(after, field["flow_next_total"])),
        "losses": error(loss.values, field["losses_before_mean"]),
        "gradient of ε": error(gradients[0], [theirs["a"], theirs["b"]]),
        "gradient of f_φ": error(torch.stack(gradients[1:]), [theirs["flow_model_out"], theirs["flow_model_out_next"]]),
    }
    if kl:
        stored = case["kl"]
        residual = terms.flow + terms.log_policy - terms.log_reference - terms.flow_next
        errors["advantages"] = error(method.advantages(residual.detach(), 3), stored["advantages"])
        errors["policy"] = error(loss.metrics["policy"] / params["klpf"], stored["losses_klpf"])
        ratio = torch.exp(terms.log_policy - part.log_prob / count)
        errors["ratio"] = error(ratio, stored["ratio"])
    record_property("relative_errors", errors)
    assert max(errors.values()) < TOLERANCE, errors
