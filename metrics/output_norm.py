"""How much larger the network's output has become."""

from typing import Any

import torch

from bench import Evaluation, Measurement, Metric
from bench.evaluation.statistics import paired, per_prompt


class OutputNorm(Metric):
    """`‖o_θ‖ / ‖o_#‖` at the finetuned model's own states, guided outputs, mean over steps; the prior's own is 1.

    Methods that regress on noised samples are known to inflate it (arXiv 2606.27771).
    """

    direction = "none"
    support = "positive"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        samples = evaluation.finetuned
        rest: dict[str, Any] = {"n": len(samples.prompts), "direction": self.direction}
        if samples.output_norm is None:
            return [Measurement("output_norm", None, note="samples chosen among several have no path", **rest)]
        ratios = per_prompt(samples.output_norm.double().mean(1), samples.rows())
        return [paired("output_norm", ratios, torch.ones_like(ratios), **rest)]
