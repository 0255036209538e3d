"""∇-GFlowNet: gradient-informed detailed balance (Liu et al., ICLR 2025)."""

from collections.abc import Callable, Iterator

import torch
from bench.methods.adjoint_matching import lean_adjoint
from bench.methods.nabla_config import NablaConfig
from torch import Tensor, nn

from bench import Core, DiffusionModel, Loss, Method, Needs, Trajectory, Transitions


class NablaGFN(Method):
    """(Residual) ∇-DB with the forward-looking parameterisation.

    `∇ log F̃(z_k) = β γ_k sg[∇_{z_k} r(decode(ẑ_θ(z_k)))] + g_φ(z_k)` and `∇ log F̃(z_K) = β ∇ r(decode(z_K))`.
    For a transition `z_k → z_{k+1}`, means over elements:

    - forward  `L_fwd = ‖(μ_θ − μ_#)/σ_k² − ∇ log F̃(z_{k+1})‖²`
    - reverse  `L_rev = ‖sg[∇_{z_k} log (p_θ/p_#)(z_{k+1}|z_k)] + ∇ log F̃(z_k)‖²`, trains g_φ only, every k. Its
      expectation over z_{k+1} depends on z_k alone, so that it may be taken one step later, where the policy's
      prediction and the reward's gradient are those of the forward loss (`reverse_at: end`)
    - terminal `L_term = ‖g_φ(z_K)‖²` on the last transition
    - trust    `λ ‖o_θ − o_old‖²`, o_old the output of the policy that sampled

    Plain ∇-DB replaces the prior's transition score by the noising kernel's (`residual: false`). `nabla_gfn_adjoint`,
    which goes beyond the paper, lets g_φ regress on the lean adjoint of Adjoint Matching, `∇ log F̃(z_k) = −a_k`, so
    that the reward's information need not walk back through the policy one step at a time.
    """

    Config = NablaConfig
    needs = Needs(reward_gradient=True, density=True, record=frozenset({"model_output"}))
    recipe = {
        "optimizer.lr": 1e-3,
        "optimizer.weight_decay": 1e-4,
        "optimizer.networks.flow.weight_decay": 1e-2,
    }
    config: NablaConfig

    def tilted(self) -> bool:
        """Residual ∇-DB with its flow network."""
        return self.config.residual and self.config.flow

    def networks(self, model: DiffusionModel) -> dict[str, nn.Module]:
        """The flow network `g_φ`, zero at the start."""
        return {"flow": model.latent_network(self.config.channels)} if self.config.flow else {}

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over a random subset of every trajectory's transitions, the last always among them."""
        steps = core.choose_steps(data, self.config.fraction)
        tables = lean_adjoint(core, data, steps.min(1).values)[:2] if self.config.flow_target == "adjoint" else ()
        for part in data.transitions(steps, core.micro_batch):
            values, metrics = self.transition_losses(core, part, tuple(table[part.row, part.k] for table in tables))
            yield Loss(values / steps.shape[1], metrics)

    def transition_losses(
        self, core: Core, part: Transitions, known: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each transition [n], and its parts; known: `a_k`, which then is g_φ's target, and `μ_#(z_k)`."""
        config = self.config
        variance = core.kernel.std(part.k, part.z) ** 2
        weight = self._weight(variance)
        at_start, inner = config.flow and config.reverse_at == "start", part.unfinished
        target, rewards, mean_next = self.reward_score(core, part)  # first, and freed before the policy's graph is made
        ahead = self.reverse_ahead(core, part, target[inner], mean_next) if config.flow and not at_start else None
        adjoint, prior = known or (None, None)
        prior_z = part.z.detach().requires_grad_(at_start)  # for the reverse score
        if config.residual and not known:
            with torch.set_grad_enabled(prior_z.requires_grad):
                prior = core.kernel.mean(prior_z, core.predict(prior_z, part.k, part.conditioning, prior=True), part.k)
        reverse = self.reverse_score(core, part, prior_z, prior, variance) if at_start and not known else None
        z = part.z.detach().requires_grad_(at_start)
        output = core.predict(z, part.k, part.conditioning)
        mean = core.kernel.mean(z, output, part.k)
        score = self.forward_score(core, part, mean, None if prior is None else prior.detach(), variance)
        losses = {}
        if at_start:
            back = reverse(mean.detach()) if reverse else (None, adjoint)
            back = self.reverse_target(core, part, z, output, mean, back)
            own, own_next, own_last = self.flows(core, part)
            losses["reverse"] = config.reverse_weight * weight * self.reverse_loss(part, own, back)
        elif config.flow:
            own = core.network("flow", part.z_next, part.k + 1, part.conditioning)
            own_next, own_last = own[inner], own[part.finished]
            missing = self._weight(core.kernel.std(part.k[inner] + 1, own_next) ** 2) * mean_square(ahead + own_next)
            losses["reverse"] = config.reverse_weight * missing.new_zeros(len(part)).index_copy(0, inner, missing)
            own_next = own_next.detach()
        if config.flow:
            target = target.index_add(0, inner, own_next)  # the finished sample's flow is the reward alone
            losses["terminal"] = self.terminal_loss(part, own_last)
        losses["forward"] = weight * mean_square(score - target)
        if config.trust:
            losses["trust"] = config.trust * mean_square(output - part.model_output)
        metrics = {name: value.detach() for name, value in losses.items()} | {"reward": rewards[part.finished]}
        return sum(losses.values()), metrics

    def reverse_ahead(self, core: Core, part: Transitions, ahead: Tensor, mean: Tensor | None) -> Tensor:
        """Minus what `g_φ` should be at `z_{k+1}` of the unfinished [m, *latent], detached.

        ahead, mean: the forward-looking term and the policy's mean there.
        """
        if mean is None:
            return ahead
        inner, k, z = part.unfinished, part.k[part.unfinished] + 1, part.z_next[part.unfinished].requires_grad_()
        prior = core.kernel.mean(z, core.predict(z, k, part.conditioning[inner], prior=True), k)
        drift = (mean - prior.detach()) / core.kernel.std(k, z) ** 2
        return ahead - torch.autograd.grad(prior, z, drift)[0]

    def _weight(self, variance: Tensor) -> Tensor:
        return variance.flatten() if self.config.weighting == "kl" else torch.ones_like(variance.flatten())

    def reward_score(self, core: Core, part: Transitions) -> tuple[Tensor, Tensor, Tensor | None]:
        """`β γ_{k+1} ∇ r(decode(ẑ_θ(z_{k+1})))` [n, *latent], the rewards [n] of these clean latents, and the policy's
        mean at `z_{k+1}` of the unfinished (None if there is none); all detached.
        """
        inner, k, clean, mean = part.unfinished, part.k + 1, part.z_next, None
        if len(inner):
            z = part.z_next[inner].requires_grad_()
            with core.model.merged():
                output = core.predict(z, k[inner], part.conditioning[inner])
            predicted, mean = core.kernel.clean(z, output, k[inner]), core.kernel.mean(z, output, k[inner]).detach()
            clean = clean.index_copy(0, inner, predicted.detach())
        rewards, gradient = core.reward_gradient(clean, part.prompts)
        if len(inner):
            gradient = gradient.index_copy(0, inner, torch.autograd.grad(predicted, z, gradient[inner])[0])
        return core.beta * self.gamma(core, k, gradient) * gradient, rewards, mean

    def reverse_score(
        self, core: Core, part: Transitions, z: Tensor, prior_mean: Tensor | None, variance: Tensor
    ) -> Callable[[Tensor], tuple[Tensor | None, Tensor]]:
        """`∇_{z_k} log p_θ/p_#(z_{k+1}|z_k)` (plain: `log p_θ/p_B`), `z_{k+1}` held fixed, of the detached `μ_θ(z_k)`.

        In two detached parts [n, *latent]: a cotangent of `μ_θ(z_k)`, to be taken back through the policy, or None; and
        the rest. The graph from `z` to `prior_mean` is freed at once, unless the expectation needs `μ_θ` too.
        """
        if self.config.reverse == "expected":
            return lambda mean: (None, -torch.autograd.grad(prior_mean, z, (mean - prior_mean.detach()) / variance)[0])
        if prior_mean is None:
            back_mean, back_std = core.kernel.noising(part.z_next, part.k)
            rest = (part.z - back_mean) / back_std**2
        else:
            rest = -torch.autograd.grad(prior_mean, z, (part.z_next - prior_mean.detach()) / variance)[0]
        return lambda mean: ((part.z_next - mean) / variance, rest)

    def reverse_target(
        self, core: Core, part: Transitions, z: Tensor, out: Tensor, mean: Tensor, score: tuple[Tensor | None, Tensor]
    ) -> Tensor:
        """Minus what `g_φ(z_k)` should be [n, *latent]: the reverse score plus the forward-looking term.

        score: the parts of `reverse_score`; `out` and `mean` carry the graph from `z`, one pass back through it.
        """
        clean = core.kernel.clean(z, out, part.k)
        _, gradient = core.reward_gradient(clean, part.prompts)
        taken_back = {clean: core.beta * self.gamma(core, part.k, z) * gradient}
        if score[0] is not None:
            taken_back[mean] = score[0]
        return score[1] + torch.autograd.grad([*taken_back], z, [*taken_back.values()], retain_graph=True)[0]

    def flows(self, core: Core, part: Transitions) -> tuple[Tensor, Tensor, Tensor]:
        """`g_φ` at every z_k [n, *latent], at z_{k+1} of the unfinished (no graph if detached), and at z_K."""
        inner, last = part.unfinished, part.finished
        taught = last if self.config.detach_target else torch.cat([inner, last])
        states = (part.z, part.z_next[taught]), (part.k, part.k[taught] + 1)
        conditioning = part.conditioning.join([part.conditioning, part.conditioning[taught]])
        own, rest = core.network("flow", *map(torch.cat, states), conditioning).split([len(part), len(taught)])
        ahead, rest = rest[: len(taught) - len(last)], rest[len(taught) - len(last) :]
        if self.config.detach_target and len(inner):
            with torch.no_grad():
                ahead = core.network("flow", part.z_next[inner], part.k[inner] + 1, part.conditioning[inner])
        return own, ahead, rest

    def reverse_loss(self, part: Transitions, own: Tensor, back: Tensor) -> Tensor:
        """`L_rev` [n], unweighted, of `own = g_φ(z_k)` and `reverse_target`."""
        return mean_square(back + own)

    def terminal_loss(self, part: Transitions, own: Tensor) -> Tensor:
        """`L_term` [n] of `own = g_φ(z_K)`, a row for each finished sample; zero elsewhere."""
        return own.new_zeros(len(part)).index_copy(0, part.finished, mean_square(own))

    def gamma(self, core: Core, k: Tensor, like: Tensor) -> Tensor:
        """`γ_k`, shaped to broadcast over `like`; 1 at k = K."""
        level = core.kernel.alpha_cumprod(k, like)
        powers = {"alpha": level, "sqrt_alpha": level**0.5, "one": torch.ones_like(level)}
        return powers[self.config.gamma].where((k < core.kernel.steps).view_as(level), 1)

    def forward_score(
        self, core: Core, part: Transitions, mean: Tensor, prior_mean: Tensor | None, variance: Tensor
    ) -> Tensor:
        """`∇_{z_{k+1}}` of `log p_θ/p_#`, or of `log p_θ/p_B` for plain ∇-DB; [n, *latent]."""
        if prior_mean is not None:
            return (mean - prior_mean) / variance
        back_mean, back_std = core.kernel.noising(part.z_next, part.k)
        root = core.kernel.noising(torch.ones_like(part.z_next), part.k)[0]
        return (mean - part.z_next) / variance - root * (part.z - back_mean) / back_std**2


def mean_square(x: Tensor) -> Tensor:
    """[n] of [n, *latent]."""
    return (x**2).flatten(1).mean(1)
