"""How unlikely the prior finds the finetuned model's samples."""

from torch import Tensor

from bench import Evaluation, Measurement, Metric
from bench.evaluation.target import Tilted, compare


class PriorNll(Metric):
    """`E_θ[−log p_#(x)] − E_*[−log p_#(x)]`, the fidelity of latents to a prior whose density is known; nats.

    Above zero, samples lie where the prior has hardly any; below, nearer to the centres of its components than the
    target, prior × exp(β r), does. Zero is right, so neither direction is better.
    """

    target = True
    direction = "none"
    unit = "nats"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        def excess(latents: Tensor, target: Tilted) -> float:
            wanted, _ = target.mean(-target.posteriors.log_density)
            return float(-target.posterior(latents).log_density.double().mean()) - wanted

        return compare("prior_nll", evaluation, excess, direction=self.direction, unit=self.unit)
