"""Total variation between the components' shares and those of the target, prior × exp(β r)."""

from torch import Tensor

from bench import Evaluation, Measurement, Metric
from bench.evaluation.target import Tilted, compare


class ShareTv(Metric):
    """`½ Σ_j |share_j − target_j|` over the components of a mixture, averaged over prompts: lost modes, counted.

    A sample counts with its posterior probabilities. `share_tv/floor` is what as many draws of the target score.
    """

    target = True
    direction = "lower"
    support = "share"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        def distance(latents: Tensor, target: Tilted) -> float:
            shares = target.posterior(latents).log_weights.double().exp().mean(0)
            return float((shares - target.shares).abs().sum() / 2)

        return compare("share_tv", evaluation, distance, direction=self.direction)
