"""∇-DB against numbers of the published code.

What that code does differently on purpose or by mistake lives in `Published` here and nowhere in the product.
"""

from pathlib import Path

import pytest
import torch
from bench.methods.nabla.base import NablaMethod
from bench.methods.nabla.published import NablaGFNPublished
from bench.methods.nabla.residual import NablaGFNNoFlow
from diffusers import AutoencoderKL, StableDiffusionPipeline
from golden_numbers import LAST_TOLERANCE, TOLERANCE, error, golden, kernel_of
from safetensors import safe_open
from safetensors.torch import load_file
from scaffold import GOLDEN, pipeline_model
from torch import Tensor

from bench.core import Core
from bench.model import Conditioning
from bench.models.stable_diffusion import StableDiffusion
from bench.options import Config
from bench.reward import Reward
from bench.sampling.grids import ddim_kernel
from bench.sampling.kernel import gaussian_log_prob
from bench.sampling.trajectory import Transitions

CANCELLING = ("trust", "loss")  # ε_θ − ε_old leaves two of seven digits, whatever the processor; the loss contains it


@pytest.mark.parametrize("case", golden("item1_nabla_step")["cases"], ids=lambda c: f"{c['num_steps']}-{c['position']}")
@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_kernel_and_scores(case, precision, sd_alphas_cumprod, record_property):
    data, dtype = golden("item1_nabla_step"), {"f32": torch.float32, "f64": torch.float64}[precision]
    (kernel, k), theirs = kernel_of(case, dtype, sd_alphas_cumprod), case[precision]
    z, eps, z_next = (torch.tensor(x).to(dtype) for x in (data["sample"], data["model_output"], case["prev_sample"]))
    std = kernel.std(k, z)
    after = kernel.alphas_cumprod[k + 1]

    def forward(eps: Tensor) -> Tensor:
        return case["strength"] * (kernel.mean(z, eps, k) - z_next) / std**2

    ours = {
        "std": std,
        "alpha_prod_t": kernel.alphas_cumprod[k],
        "alpha_prod_next": after,
        "mean_from_score": kernel.mean(z, eps, k),
        "predict_clean": kernel.clean(z, eps, k),
        "score": forward(eps),
        "score_fn_forward": forward(0.3 * z + 0.1 * torch.sin(z)),
    }
    inner = k < kernel.steps - 1  # the finished sample is its own clean prediction
    ours["predict_clean_next"] = z_next.index_put(
        (inner,), kernel.clean(z_next[inner], eps[inner], (k + 1)[inner]) if inner.any() else z_next[inner]
    )
    z.requires_grad_()
    mean = kernel.mean(z, 0.3 * z + 0.1 * torch.sin(z), k)
    log_prob = case["strength"] * gaussian_log_prob(z_next, mean, std)
    (ours["score_fn_reverse"],) = torch.autograd.grad(log_prob.sum(), z)

    last = not bool(inner.all())
    tolerance = {"f32": LAST_TOLERANCE if last else TOLERANCE, "f64": 1e-10}[precision]
    compared = set(theirs) & set(ours)
    assert len(compared) == len(theirs) - 2 * (precision == "f32")  # f32 has two records of how it was measured
    errors = {name: error(ours[name], theirs[name]) for name in compared}
    record_property("relative_errors", errors)
    assert max(errors.values()) < tolerance, errors


class GoldenReward(Reward):
    """The reward of the golden training step."""

    scale, source = "about 0 to 1", "tests/golden/README.md"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (
            images[:, 0].flatten(1).mean(1)
            - 0.5 * images[:, 2].flatten(1).mean(1)
            + 0.1 * torch.sin(4 * images).flatten(1).mean(1)
        )


class GoldenModel(StableDiffusion):
    """A pipeline whose text embeddings are given, by prompt."""

    embeddings: dict[str, Tensor]

    def encode(self, prompts: list[str]) -> Conditioning:
        return Conditioning({"text": torch.stack([self.embeddings[prompt] for prompt in prompts])})

    def unconditional(self) -> Conditioning:
        return self.encode([""])


class LastGamma(NablaMethod):
    """`γ_K = alphas_cumprod[0]` instead of 1."""

    def gamma(self, core: Core, k: Tensor, like: Tensor) -> Tensor:
        alpha = core.kernel.alpha_cumprod(k, like)
        return alpha if self.config.gamma == "alpha" else alpha**0.5


class PublishedNoFlow(LastGamma, NablaGFNNoFlow):
    """The forward loss alone with that peculiarity of the public code."""


class Published(LastGamma, NablaGFNPublished):
    """The published setting with the public code's peculiarities, none of which is an option of ours."""

    strength = 1.0  # of the prior's forward score and of both reverse scores

    def reference_scores(self, core, part, variance):
        return tuple(self.strength * score for score in super().reference_scores(core, part, variance))

    def policy_scores(self, core, part, z, output, mean, variance):
        cotangent = (part.z_next - mean.detach()) / variance
        (score,) = torch.autograd.grad(mean, z, cotangent, retain_graph=True)
        self.policy_score = self.strength * score
        return super().policy_scores(core, part, z, output, mean, variance) - score + self.policy_score

    def transition_losses(self, core, part):
        """Of the reverse loss the last transition has the constant `mean(score²)` of the policy's own score: nothing is
        learned from it. The terminal loss is the sum over last transitions over their number, added to every row."""
        losses, rewards = super().transition_losses(core, part)
        constant = self.config.reverse_weight * (self.policy_score[part.finished] ** 2).flatten(1).mean(1)
        losses["reverse"] = losses["reverse"].index_copy(0, part.finished, constant)
        losses["terminal"] = (losses["terminal"].sum() / (len(part.finished) + 1e-6)).expand(len(part))
        return losses, rewards


@pytest.fixture(scope="module")
def golden_pipeline(pipeline_folder, tmp_path_factory) -> Path:
    """The random pipeline with the golden autoencoder in it; the denoisers' shapes are the same."""
    step = golden("item4_main")
    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    assert all(pipe.unet.config[name] == value for name, value in step["unet_config"].items() if name != "down_blocks")
    pipe.vae = AutoencoderKL(**step["vae_config"])
    weights = load_file(GOLDEN / "item4_weights.safetensors")
    vae = {name.removeprefix("vae."): w.float() for name, w in weights.items() if name.startswith("vae.")}
    assert not pipe.vae.load_state_dict(vae, strict=False).unexpected_keys
    decoder = {name for name in pipe.vae.state_dict() if name.startswith(("decoder.", "post_quant_conv."))}
    assert decoder == set(vae)
    unet = {
        name.removeprefix("unet.").replace(".base_layer", ""): w.float()
        for name, w in weights.items()
        if name.startswith("unet.") and ".lora_" not in name
    }
    pipe.unet.load_state_dict(unet)
    folder = tmp_path_factory.mktemp("golden")
    pipe.save_pretrained(folder)
    return folder


def golden_step(
    name: str, folder: Path
) -> tuple[NablaMethod, Core, list[tuple[dict, str, Transitions]], dict[str, Tensor]]:
    """The method, its core, the micro-batches `(record, tensor prefix, transitions)` in order, and the tensors."""
    step, tensors = golden(f"item4_{name}"), load_file(GOLDEN / f"item4_{name}_tensors.safetensors")
    config = step["config"]["model"]
    model = pipeline_model(folder, GoldenModel, guidance=step["config"]["sampling"]["guidance_scale"])
    model.embeddings = {"": tensors["neg_prompt_embeds"].reshape(-1, 16, 16)[0]}
    for i in (0, 1):
        model.embeddings |= {f"{i} {row}": e for row, e in enumerate(tensors[f"i{i}.prompt_embeds"])}
    options = {
        "gamma": {"squared": "alpha", "sqrt": "sqrt_alpha"}[config["reward_adaptive_mode"]],
        "trust": config["unet_reg_scale"],
        "weighting": "score",
    }
    if config["no_flow"]:
        method = PublishedNoFlow(PublishedNoFlow.Config(**options))
    else:
        options |= {"reverse_weight": config["reverse_loss_scale"], "channels": config["flow_channel_width"]}
        method = Published(Published.Config(**options))
        method.strength = config["pretrained_strength"]
    kernel = ddim_kernel(model.spec.alphas_cumprod, 10, eta=1.0, steps_offset=1)
    core = Core(model, kernel, GoldenReward(Config()), beta=config["reward_scale"])
    core.networks.update(method.networks(model))
    with safe_open(GOLDEN / "item4_weights.safetensors", "pt") as file:
        scales, weights = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    adapters = model.adapters()
    for key, parameter in adapters.items():
        parameter.data.copy_(weights["unet." + key.replace(".default.", ".pf.")])
    for network in core.networks.values():
        for key, parameter in network.unet.named_parameters():
            parameter.data.copy_(weights[f"flow.{key}"] * float(scales[f"scale.flow.{key}"]))
    parts = []
    for record in step["transitions"]:
        i, prefix = record["micro_batch_i"], f"i{record['micro_batch_i']}_j{record['j']}."
        prompts = [f"{i} 0", f"{i} 1"]
        k = torch.tensor([step["timesteps"].index(t) for t in record["timesteps"]])
        part = Transitions(
            prompts,
            [(prompt, 0) for prompt in prompts],
            model.encode(prompts),
            row=torch.arange(2),
            k=k,
            unfinished=(k < 9).nonzero().flatten(),
            finished=(k == 9).nonzero().flatten(),
            z=tensors[prefix + "latents"],
            z_next=tensors[prefix + "next_latents"],
            model_output=tensors[prefix + "unet_outputs"],
        )
        parts.append((record, prefix, part))
    return method, core, parts, tensors


def gradient_norm(parameters) -> Tensor:
    return torch.stack([p.grad.double().norm() for p in parameters if p.grad is not None]).norm()


@pytest.mark.parametrize("name", ["main", "variant", "noflow"])
def test_training_step(name, golden_pipeline, record_property):
    method, core, parts, tensors = golden_step(name, golden_pipeline)
    step, adapters = golden(f"item4_{name}"), core.model.adapters()
    worst: dict[str, float] = {}

    def compare(what: str, ours: Tensor, theirs: Tensor | float, last: bool) -> None:
        found = error(ours, torch.as_tensor(theirs))
        key = f"{what}, t = 1" if last else what
        worst[key] = max(worst.get(key, 0.0), found)
        tolerance = LAST_TOLERANCE if last or what in CANCELLING else TOLERANCE
        assert found < tolerance, (what, part.k.tolist(), found)

    for record, prefix, part in parts:
        last = any(record["end_mask"])
        score, rewards, _ = method.reward_score(core, part)
        compare("reward score of z_{k+1}", score, tensors[prefix + "score_r_next"], last)
        compare("reward", rewards, record["logr_next"], last)
        losses, _ = method.transition_losses(core, part)
        values, found = sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}
        theirs = record["losses"]
        compare("forward loss", found["forward"].mean(), theirs["loss_forward_mean"], last)
        if core.networks:
            weight = method.config.reverse_weight
            compare("reverse loss", found["reverse"].mean() / weight, theirs["loss_backward_mean"], last)
            if last:
                compare("terminal loss", found["terminal"].mean(), theirs["loss_terminal"], last)
            assert found["terminal"].mean() == pytest.approx(theirs["loss_terminal"], rel=1e-5)
        compare("trust", found["trust"] / method.config.trust, record["unetreg_per_sample"], last)
        compare("loss", values.mean(), theirs["losses_total_before_accum"], last)
        (values.mean() / step["accumulation_steps"]).backward()
        # From here on gradients are sums that contain t = 1.
        compare(
            "norm of the policy's gradient",
            gradient_norm(adapters.values()),
            record["grad_cumulative"]["lora_l2"],
            True,
        )
        for network in core.networks.values():
            norm = gradient_norm(network.parameters())
            compare("norm of the flow's gradient", norm, record["grad_cumulative"]["flow_l2"], True)

    ours = torch.cat([p.grad.flatten() for p in adapters.values()])
    golden_gradient = [tensors["grad_lora_total." + key.replace(".default.", ".pf.")].flatten() for key in adapters]
    compare("policy's gradient", ours[None], torch.cat(golden_gradient)[None], True)
    if core.networks:
        named = dict(core.networks["flow"].unet.named_parameters())
        norms = torch.stack([named[key].grad.norm() for key in step["flow_grad_l2_per_param"]])
        compare(
            "flow's gradient by parameter",
            norms[None],
            torch.tensor([list(step["flow_grad_l2_per_param"].values())]),
            True,
        )
    record_property("relative_errors", worst)
