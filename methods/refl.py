"""ReFL: reward feedback learning on a late clean prediction (Xu et al., "ImageReward: Learning and Evaluating Human
Preferences for Text-to-Image Generation", NeurIPS 2023)."""

from collections.abc import Iterator

from pydantic import Field
from torch import relu

from bench import Batch, Config, Core, Loss, Method, Needs


class ReFLConfig(Config):
    """Options of ReFL."""

    window: float = Field(0.25, gt=0, le=1, description="share of the last steps among which m is drawn")
    margin: float | None = Field(None, description="loss relu(margin − r) instead of −r; published: 2, for ImageReward")
    scale: float = Field(1.0, gt=0, description="factor of the loss; published: 1e-3")


class ReFL(Method):
    """Maximise `r(decode(ẑ_θ(z_m)))` at a random late step m, reached without gradient; only that step learns.

    m is drawn for every sample. β is not used. The published code samples without guidance; here the guidance is the
    setting's, as for every method.
    """

    Config = ReFLConfig
    needs = Needs(trajectory=False, reward_gradient=True)
    recipe = {"optimizer.lr": 1e-5, "optimizer.weight_decay": 1e-2}
    config: ReFLConfig

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        """Micro-losses, samples of equal m together."""
        chosen = core.choose_late_step(data, self.config.window)
        for m in chosen.unique().tolist():
            for part in data[chosen == m].split(core.micro_batch):
                z = core.rollout(part, stop_at=m).latents[:, -1]
                clean = core.kernel.clean(z, core.predict(z, m, part.conditioning), m)
                rewards = core.reward(clean, part.prompts)
                margin = self.config.margin
                loss = -rewards if margin is None else relu(margin - rewards)
                yield Loss(self.config.scale * loss, {"reward": rewards.detach()})
