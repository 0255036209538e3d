"""AWM: "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models", 2025."""

import torch
from pydantic import Field
from torch import Tensor

from bench import Copy, Core, Needs, Noised, Strength, mean_square

from .forward_process import AdvantageConfig, AdvantageRegression


class AWMConfig(AdvantageConfig):
    """Options of AWM; symbols as in its docstring."""

    power: float = Field(0.25, gt=0, le=1, description="p of the log-likelihood")
    ratio_clip: float = Field(1.0, gt=0, description="half-width of the ratio's clip range")
    kl: float = Field(1e-3, ge=0, description="λ: weight of the distance to the prior")
    ema: float = Field(1.0, ge=0, description="λ_ema: weight of the distance to the policy's average")
    ema_decay: float = Field(0.3, ge=0, le=1, description="largest decay of the average; it grows by .001 an update")


class AWM(AdvantageRegression):
    """AWM: policy gradient with the denoising error as the log-likelihood.

    With `ℓ_o = −(s/p) (‖o − u‖² + 1e-10)^p` and `ρ = exp(ℓ_θ − ℓ_old)` the loss is

        max(−A ρ, −A clip(ρ, 1 ± ratio_clip)) + λ ‖o_θ − o_#‖² + λ_ema ‖o_θ − o_ema‖²

    where A is the advantage, clipped to ±c and divided by c, o_old the policy that sampled the round, and o_ema a
    moving average of the policy.

    "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models", 2025, with the defaults of the
    authors' code: https://arxiv.org/abs/2509.25050
    """

    Config = AWMConfig
    needs = Needs(rewards=True, current=True)
    config: AWMConfig
    references = ("old", "prior", "ema")
    strength = Strength("method.kl", (1e-3, 0.02, 0.1, 0.5))

    def copies(self) -> dict[str, Copy]:
        """The policy that sampled the round, and the average."""
        ema = Copy(lambda updates: min(0.001 * updates, self.config.ema_decay))
        return {"old": Copy(lambda updates: 0.0, rounds=1), "ema": ema}

    def loss(
        self, core: Core, part: Noised, policy: Tensor, reference: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class; the ratio ρ is logged."""
        config, advantage = self.config, part.advantages
        ratio = torch.exp(self.log_likelihood(core, part, policy) - self.log_likelihood(core, part, reference["old"]))
        clipped = ratio.clamp(1 - config.ratio_clip, 1 + config.ratio_clip)
        surrogate = torch.maximum(-advantage * ratio, -advantage * clipped)
        to_prior, to_ema = mean_square(policy - reference["prior"]), mean_square(policy - reference["ema"])
        return surrogate + config.kl * to_prior + config.ema * to_ema, {"ratio": ratio.detach()}

    def log_likelihood(self, core: Core, part: Noised, output: Tensor) -> Tensor:
        """`−(s/p) (‖o − u‖² + 1e-10)^p` [n]; the constant keeps the power's derivative finite."""
        p, s = self.config.power, core.kernel.noise_level(part.k, part.z).flatten()
        return -s / p * (mean_square(output - part.target) + 1e-10) ** p
