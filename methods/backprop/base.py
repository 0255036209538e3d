"""What all methods that backpropagate a reward share: the KL to the prior that each can add to its loss."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bench import Batch, Config, Core, Method, Needs, Strength, mean_square


class BackpropagationConfig(Config):
    """Options of every method that backpropagates the reward."""

    kl: float = Field(0.0, ge=0, description="w: weight of the KL to the prior, beside β times the reward; 0: none")
    penalty: Literal["path", "published"] = Field(
        "path", description="the KL in nats, or the squared distance of outputs, prior without gradient, as published"
    )


class RewardBackpropagation(Method):
    """Backpropagate the reward, less the KL to the prior at the steps that pass a gradient.

        L(θ) = −E[r]    or, with w > 0,    E[ −β r + w Σ_k KL_k ],   KL_k = |μ_θ(z_k) − μ_#(z_k)|² / 2σ_k²

    The gradient of KL_k also goes through the state z_k, where that depends on θ, and so through μ_#. With all steps
    and a memoryless sampler (η = 1) the least L is that of paths to p_# exp(βr/w). With w = 0 the reward is maximised,
    and β is not used.

    `method.penalty=published` is the form of UniRL: the mean over these steps of `‖o_θ − sg o_#‖² / 2s_k²`, a mean over
    elements, with the noise level s_k. The prior's output has no gradient, so its dependence on z_k is missing, and no
    target is known. https://github.com/Tencent-Hunyuan/UniRL
    """

    Config = BackpropagationConfig
    needs = Needs(trajectory=False, reward_gradient=True)
    strength = Strength("method.kl", (0.0, 0.25, 1.0, 4.0))
    config: BackpropagationConfig

    def __init__(self, config: BackpropagationConfig):
        super().__init__(config)
        if config.kl and config.penalty == "path":
            self.needs = replace(self.needs, density=True, memoryless=True)

    def with_kl(
        self, core: Core, part: Batch, loss: Tensor, visited: Iterable[tuple[Tensor, Tensor, int | Tensor]]
    ) -> Tensor:
        """`β loss + w Σ_k KL_k` [n], or the loss as it is if w = 0.

        visited: states z_k, the policy's outputs there, both [n, *latent], and the steps k.
        """
        if not self.config.kl:
            return loss
        kl = torch.stack([self.kl(core, part, *state) for state in visited])
        kl = kl.mean(0) if self.config.penalty == "published" else kl.sum(0)
        return core.beta * loss + self.config.kl * kl

    def kl(self, core: Core, part: Batch, z: Tensor, output: Tensor, k: int | Tensor) -> Tensor:
        """`KL_k` [n] in the form that is configured."""
        if self.config.penalty == "published":
            with torch.no_grad():
                prior_output = core.predict(z, k, part.conditioning, prior=True)
            return mean_square(output - prior_output) / (2 * core.kernel.noise_level(k, z).flatten() ** 2)
        return core.kernel.kl(z, output, core.predict(z, k, part.conditioning, prior=True), k)

    def prior_nfe(self, states: int, moving: int) -> tuple[int, int]:
        """Predictions of the prior for the KL at so many states, and passes back through it at the moving ones.

        A state moves if it depends on θ.
        """
        if not self.config.kl:
            return 0, 0
        return states, moving if self.config.penalty == "path" else 0
