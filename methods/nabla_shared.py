"""Residual ∇-DB on runs of neighbouring transitions, which share the passes at the states between them."""

from collections.abc import Iterator

import torch
from bench.methods.nabla_config import NablaConfig
from bench.methods.nabla_gfn import NablaGFN, mean_square
from pydantic import Field, model_validator
from torch import Tensor

from bench import Batch, Core, Loss, Trajectory, Transitions


class NablaSharedConfig(NablaConfig):
    """Those of `nabla_gfn` whose losses can share passes."""

    fraction: float = Field(
        0.1, gt=0, le=1, description="neighbours besides the last transition (two at least), over K"
    )

    @model_validator(mode="after")
    def _sharing(self) -> "NablaSharedConfig":
        if not (self.flow and self.residual and self.reverse_at == "end"):
            raise ValueError("passes are shared with flow: true, residual: true and reverse_at: end; use nabla_gfn")
        return self


class NablaGFNShared(NablaGFN):
    """The losses of `NablaGFN` on one window of neighbouring transitions of every trajectory, and on the last one.

    Where a transition of the window ends and the next begins, one pass of the policy gives the look-ahead of the one
    and the mean of the other, and one of the prior the reverse score and the mean. Transitions are weighted so that the
    expected loss is that of transitions chosen apart; neighbours tell less than these, and cost less.
    """

    Config = NablaSharedConfig
    config: NablaSharedConfig

    def steps(self, core: Core, data: Batch) -> Tensor:
        """Long [B, W + 1]: for every row the steps of its window, and the last."""
        return core.choose_window(data, self.config.fraction)[0]

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over every trajectory's window and last transition, which a micro-batch does not part."""
        steps, weight = core.choose_window(data, self.config.fraction)
        size = max(1, core.micro_batch // steps.shape[1])
        for rows, own in zip(data.split(size), steps.split(size), strict=True):
            (part,) = rows.transitions(own, own.numel())
            values, metrics = self.window_losses(core, part, len(rows))
            yield Loss(values * weight[part.k] / steps.shape[1], metrics)

    def window_losses(self, core: Core, part: Transitions, n: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each of the transitions of n windows, then of the n last ones, unweighted; and its parts.

        part: (W + 1)·n transitions, those at the same place of all windows one after the other: the state where number
        i < (W − 1)·n ends is that where number i + n begins.
        """
        config, kernel, conditioning = self.config, core.kernel, part.conditioning
        ends, variance = slice(0, -n), kernel.std(part.k, part.z) ** 2
        z, k, inner = part.z_next[ends].requires_grad_(), part.k[ends] + 1, conditioning[ends]
        with core.model.merged():  # no transition of the window begins at its end
            outside = core.predict(z[-n:], k[-n:], inner[-n:])
        inside = core.predict(z[:-n], k[:-n], inner[:-n])
        clean = kernel.clean(z, torch.cat([inside, outside]), k)
        rewards, gradient = core.reward_gradient(torch.cat([clean, part.z_next[-n:]]), part.prompts)
        target = core.beta * self.gamma(core, part.k + 1, gradient) * gradient
        target = torch.cat([torch.autograd.grad(clean, z, target[ends], retain_graph=True)[0], target[-n:]])
        mean = kernel.mean(z.detach(), torch.cat([inside, outside.detach()]), k)  # no loss goes back outside
        del clean, outside  # and their graph

        prior = kernel.mean(z, core.predict(z, k, inner, prior=True), k)
        drift = (mean - prior).detach() / kernel.std(k, z) ** 2
        ahead = target[ends] - torch.autograd.grad(prior, z, drift)[0]
        own = core.network("flow", part.z_next, part.k + 1, conditioning)
        missing = self._weight(kernel.std(k, z) ** 2) * mean_square(ahead + own[ends])
        target[ends] += own[ends].detach()

        alone = torch.cat([part.z[:n], part.z[-n:]]), torch.cat([part.k[:n], part.k[-n:]])
        pair = conditioning.join([conditioning[:n], conditioning[-n:]])
        with torch.no_grad():
            prior_alone = kernel.mean(alone[0], core.predict(*alone, pair, prior=True), alone[1])
        output = core.predict(*alone, pair)
        mean_alone = kernel.mean(alone[0], output, alone[1])
        score = torch.cat([mean_alone[:n], mean[:-n], mean_alone[n:]])
        score = (score - torch.cat([prior_alone[:n], prior[:-n].detach(), prior_alone[n:]])) / variance
        losses = {
            "forward": self._weight(variance) * mean_square(score - target),
            "reverse": config.reverse_weight * torch.cat([missing, torch.zeros_like(missing[:n])]),
            "terminal": self.terminal_loss(part, own[-n:]),
        }
        if config.trust:
            output = torch.cat([output[:n], inside, output[n:]])
            losses["trust"] = config.trust * mean_square(output - part.model_output)
        metrics = {name: value.detach() for name, value in losses.items()} | {"reward": rewards[-n:]}
        return sum(losses.values()), metrics
