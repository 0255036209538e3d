"""GARDO: Flow-GRPO with advantages by diversity, and a KL on suspect samples to a reference that moves."""

from dataclasses import replace
from typing import Annotated, Any, cast

import numpy as np
import torch
from pydantic import Field
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import normalize

from bench import Batch, Copy, Core, Needs, Strength, Trajectory, Transitions, group_mean
from bench.evaluation.features import sample_features

from .base import ONLY_STEP, Clip, KLWeight, PolicyGradient, PolicyGradientConfig, kl_by_rate, old_policy
from .surrogate import Surrogate, clipped, gaussian_log_ratio

Share = Annotated[float, Field(gt=0, lt=1)]


class GARDOConfig(PolicyGradientConfig):
    """Options of GARDO."""

    kl: KLWeight = 0.04
    clip: Clip = 1e-4
    fraction: float = Field(1.0, gt=0, le=1, description="transitions used, over K")
    reference_rounds: int = Field(16, ge=1, description="rounds after which the reference becomes the policy")
    gated: Share = Field(0.1, description="share of the suspect samples whose KL counts, at first")
    gated_range: tuple[Share, Share] = Field((0.02, 0.2), description="the least and the largest such share")
    memory: int = Field(20, ge=1, description="rounds that a round's doubt is compared with")


class GARDO(PolicyGradient):
    """GARDO: Flow-GRPO with advantages by diversity, and a KL on suspect samples to a reference that moves.

        ℓ_k = max(−A ρ_k, −A clip(ρ_k, 1 ± c)) + w KL_k where the gate is open,   A = (r − r̄) D
        log ρ_k = (‖z_{k+1} − μ_old‖² − ‖z_{k+1} − μ_θ‖²) / 2σ_k²,   KL_k = ‖μ_θ − μ_ref‖² / 2g_k²

    ‖·‖² is a mean over latent elements, r̄ the group's mean. D is 1 for samples below it; for the others it is the
    cosine distance of a sample's features to the nearest of its group, over the group's mean distance. The reference
    starts as the prior and becomes the policy every `reference_rounds` rounds; the published code also renews it after
    an update of a large KL.

    The doubt in a sample is its mean rank by auxiliary rewards less its rank by the reward, over the round, 1 the best.
    The gate is open for the given share of the samples in doubt (0 or more), those with the most. A round whose mean
    doubt is above (below) that of all in memory makes the share 1.1 (0.9) times as large. Auxiliary rewards are terms
    of weight 0: `--reward "hps+0*aesthetic+0*image_reward" --set reward.combine=advantages`. Without any the gate is
    open for all. (In the published code the doubt has the other sign, features are DINOv3's, and the KL is the mean
    over the samples behind the gate alone.) Evaluated are exponential averages of the adapters, over every update (in
    the published code over every eighth). Published sampler: rule `euler`, η = 0.7.

    "GARDO: Reinforcing Diffusion Models without Reward Hacking", 2025, https://arxiv.org/abs/2512.24138
    """

    Config = GARDOConfig
    needs = Needs(rewards=True, density=True, record=frozenset({"model_output"}))
    strength = Strength("method.kl", (0.04, 0.8, 4.0, 20.0))  # of the noise's rate, as in Flow-GRPO
    recipe = PolicyGradient.recipe | {"train.ema": 0.9, "evaluation.weights": "ema"}
    config: GARDOConfig

    def __init__(self, config: GARDOConfig):
        super().__init__(config)
        self.gated, self.doubts = config.gated, list[float]()

    def copies(self) -> dict[str, Copy]:
        """The reference."""
        return {"reference": Copy(lambda updates: 0.0, rounds=self.config.reference_rounds)}

    def combines(self) -> tuple[str, ...]:
        """Terms kept apart: a centred sum is the sum of centred terms, and the gate needs each."""
        return ("advantages",)

    def unfit(self, steps: int, group: int) -> str | None:
        """In a group of one every advantage is 0; the last step is left out."""
        if steps == 1:
            return ONLY_STEP
        return "advantages within a prompt's group need train.samples_per_prompt ≥ 2" if group < 2 else None

    def steps(self, core: Core, data: Batch) -> Tensor:
        """One random step of each of `⌊K · fraction⌋` equal bins, which leave out the last step."""
        return core.choose_steps(data, self.config.fraction, last="never")

    def advantages(self, core: Core, data: Trajectory) -> Tensor:
        """A [B]."""
        centred = data.rewards - group_mean(data.prompts, data.rewards)
        features, factors = sample_features(core, data.latents[:, -1]), torch.ones_like(centred)
        for prompt in dict.fromkeys(data.prompts):
            rows = torch.tensor([i for i, other in enumerate(data.prompts) if other == prompt])
            factors[rows] = diversity(features[rows])
        return centred * torch.where(centred < 0, 1, factors)

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """Add clipped advantages [B] to the round, and the gate, 0 or 1 [B], as its weights."""
        prepared = super().prepare(core, data)
        return replace(prepared, weights=self.gate(core, data).to(data.rewards))

    def gate(self, core: Core, data: Trajectory) -> Tensor:
        """For which samples the KL counts, 0 or 1 [B], on the CPU; the share follows the doubt."""
        weights = [] if data.terms is None else cast(Any, core.reward_model).weights
        auxiliary = [term for term, weight in enumerate(weights) if weight == 0]
        if not auxiliary:
            return torch.ones(len(data))
        others = cast(Tensor, data.terms)[:, auxiliary]
        scores = torch.cat([cast(Tensor, data.rewards)[:, None], others], 1).cpu().numpy()
        ranks = rankdata(-scores, axis=0)  # equal scores have one rank
        doubt = ranks[:, 1:].mean(1) - ranks[:, 0]
        positive = doubt[doubt >= 0]
        self.follow(float(positive.mean()))
        return torch.from_numpy(doubt > np.percentile(positive, 100 * (1 - self.gated)))

    def follow(self, doubt: float) -> None:
        """Make the share larger or smaller if a round's mean doubt is beyond those in memory, and remember it."""
        least, largest = self.config.gated_range
        if self.doubts and doubt > max(self.doubts):
            self.gated = min(1.1 * self.gated, largest)
        elif self.doubts and doubt < min(self.doubts):
            self.gated = max(0.9 * self.gated, least)
        self.doubts = [*self.doubts, doubt][-self.config.memory :]

    def anchor(self, core: Core, part: Transitions) -> Tensor:
        """The reference's output [n, *latent]."""
        return core.predict(part.z, part.k, part.conditioning, weights="reference")

    def surrogate(self, core: Core, part: Transitions, mean: Tensor) -> Surrogate:
        """ℓ_k [n] without its KL term."""
        old_mean, std = old_policy(core, part)
        return clipped(gaussian_log_ratio(part.z_next, mean, old_mean, std), part.advantages, self.config.clip)

    def kl(self, core: Core, part: Transitions, mean: Tensor, prior_mean: Tensor) -> Tensor:
        """KL_k where the gate is open, else 0; [n]."""
        return part.weights * kl_by_rate(core, part, mean, prior_mean)

    def state_dict(self) -> dict[str, Any]:
        """The share, and the doubts in memory."""
        return {"gated": self.gated, "doubts": self.doubts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.gated, self.doubts = state["gated"], state["doubts"]


def diversity(features: Tensor) -> Tensor:
    """The cosine distance of each row of features [n, d] to the nearest other, over their mean [n]; 1 if all agree."""
    unit = normalize(features, dim=1)
    distance = (1 - unit @ unit.T).clamp(0, 2).fill_diagonal_(float("inf")).min(1).values
    mean = distance.mean()
    return torch.where(mean > 0, distance / mean, 1)
