"""TempFlow-GRPO: policy gradient in one step, with branches that share what comes before it."""

from pydantic import Field
from torch import Tensor

from bench import Batch, Core, Deviation

from .one_step import OneStep, OneStepConfig


class TempFlowGRPOConfig(OneStepConfig):
    """Options of TempFlow-GRPO."""

    deviation: Deviation = Deviation(over="group", epsilon=1e-4)
    branches: int = Field(6, ge=1, description="samples of a prompt that share the first noise")
    scale: float = Field(2.25, gt=0, description="a: the factor of σ_k in c_k")


class TempFlowGRPO(OneStep):
    """TempFlow-GRPO: policy gradient in one step, weighted by its noise; branches share what comes before it.

        ℓ = a σ_k max(−A ρ_k, −A clip(ρ_k, 1 ± c)),   A = (r − mean of its group) / std of its group
        log ρ_k = (‖z_{k+1} − μ_old‖² − ‖z_{k+1} − μ_θ‖²) / 2σ_k²,   z_0 … z_k the same for all branches of a noise

    ‖·‖² is a mean over latent elements. The other steps have no noise, so that branches of one first noise differ in
    the noise of step k alone. k is drawn for each prompt and round, and is never the last step; the published codes
    branch at several steps in every round. Branches are sampled as whole trajectories. Published sampler: rule `euler`,
    η = 0.7.

    He et al., "TempFlow-GRPO: When Timing Matters for GRPO in Flow Models", 2025, https://arxiv.org/abs/2508.04324
    """

    Config = TempFlowGRPOConfig
    config: TempFlowGRPOConfig

    def pool(self, core: Core) -> range:
        """All steps but the last."""
        return range(max(1, core.kernel.steps - 1))

    def start(self, batch: Batch) -> list[tuple[str, int]]:
        """Every `branches` samples of a prompt in the round have the first one's name."""
        names, seen = list[tuple[str, int]](), dict[str, list[tuple[str, int]]]()
        for name in batch.samples:
            own = seen.setdefault(name[0], [])
            own.append(name)
            names.append(own[(len(own) - 1) // self.config.branches * self.config.branches])
        return names

    def weight(self, core: Core, k: Tensor, like: Tensor) -> Tensor:
        """`a σ_k` [n]."""
        return self.config.scale * core.kernel.std(k, like).flatten()
