"""The core that every method computes with: sampling, guided predictions, kernel arithmetic, rewards and accounting."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from bench.errors import BenchError, NonFiniteError
from bench.model import Conditioning, DiffusionModel
from bench.reward import Reward, gradient, score
from bench.runtime import memory
from bench.runtime.meter import Meter
from bench.sampling.kernel import Kernel, Step
from bench.sampling.noise import Noise, Purpose, generator, upload
from bench.sampling.trajectory import Batch, Noised, Trajectory, Transitions, join, rollout

PRIOR_NOT_FINITE = (
    "The prior's own samples are not finite, so no training did this: check the model's weights, or use "
    "model.dtype=float32."
)


@dataclass
class Core:
    """One model, one kernel, one reward, and what is trained on them.

    beta: inverse temperature of the reward in `p* ∝ p_# exp(β r)`.
    seed: names the training noise and every random choice. micro_batch: rows per micro-loss;
    sample_batch: rows per rollout call. networks: the method's extra networks by name. copies: of the adapters, by
    name, then by the parameter's name. reward_name: for messages; empty: its class's name.
    """

    model: DiffusionModel
    kernel: Kernel
    reward_model: Reward
    beta: float
    seed: int = 0
    micro_batch: int = 64
    sample_batch: int = 64
    meter: Meter = field(default_factory=Meter)
    networks: dict[str, nn.Module] = field(default_factory=dict)
    copies: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    reward_name: str = ""

    def __post_init__(self) -> None:
        self.reward_name = self.reward_name or type(self.reward_model).__name__
        self.kernel = self.kernel.to(self.model.device)
        self._times = torch.cat([self.kernel.timesteps, torch.zeros_like(self.kernel.timesteps[:1])])
        self._unread: list[tuple[Tensor, list[str]]] = []

    # Sampling -----------------------------------------------------------------------------------------------------

    def batch(self, samples: Iterable[tuple[str, int]]) -> Batch:
        """A batch from sample names (prompt, index), prompts encoded."""
        samples = list(samples)
        prompts = [prompt for prompt, _ in samples]
        return Batch(prompts, samples, self.model.encode(prompts))

    def rollout(
        self,
        batch: Batch,
        *,
        purpose: Purpose = "train",
        seed: int | None = None,
        record: frozenset[str] = frozenset(),
        prior: bool = False,
        weights: str | None = None,
        grad_from: int | None = None,
        stop_at: int | None = None,
        noisy: tuple[int, int] | None = None,
        shared_start: int | None = None,
    ) -> Trajectory:
        """Sample trajectories in parts of `sample_batch` rows; see `bench.sampling.trajectory.rollout`.

        weights: the copy of the adapters that samples, instead of these themselves. noisy: the steps [first, end) with
        noise, the others having none. shared_start: one z_0 for all samples of a prompt, named by this number.
        """
        kernel = self.kernel if noisy is None else replace(self.kernel, noisy=noisy)
        seed = self.seed if seed is None else seed
        options = {"record": record, "prior": prior, "grad_from": grad_from, "stop_at": stop_at}
        # a density that will be replayed must be that of the network as it is, to the bit
        merge = grad_from is None and "log_prob" not in record and not prior
        with self._using(weights), self.model.merged() if merge else nullcontext():
            parts = []
            for part in batch.split(self.sample_batch):
                start = None
                if shared_start is not None:  # a name that no sample has
                    start = Noise(seed, purpose, [(prompt, -1 - shared_start) for prompt in part.prompts])
                noise = Noise(seed, purpose, part.samples)
                parts.append(rollout(self.model, kernel, part, noise, start=start, **options))
        return join(parts)

    def predict(
        self,
        z: Tensor,
        k: Step,
        conditioning: Conditioning,
        *,
        prior: bool = False,
        weights: str | None = None,
        guided: bool = True,
    ) -> Tensor:
        """The policy's own output `o_θ(z, k, c)`, or the prior's `o_#` with `prior`; k is one step or long [n].

        weights: a copy of the adapters (`Method.copies`), which then predicts instead of the policy.

        Noise, v or velocity as the model has it: only `kernel` knows what it means. Shaped like `z`, float32.
        """
        with self._using(weights):
            return self.model.predict(z, self.kernel.timesteps[k], conditioning, prior=prior, guided=guided)

    def _using(self, weights: str | None) -> AbstractContextManager[None]:
        return self.model.using(self.copies[weights]) if weights else nullcontext()

    def network(self, name: str, z: Tensor, k: Step, conditioning: Conditioning) -> Tensor:
        """The method's extra network at step k; the finished sample (k = K) has time 0."""
        return self.networks[name](z, self._times[k].expand(len(z)), conditioning)

    # Rewards ------------------------------------------------------------------------------------------------------

    def reward(self, z: Tensor, prompts: list[str]) -> Tensor:
        """`r(decode(z), c)`, float32 [n], differentiable in the clean latent `z` if the reward is.

        Whether they are finite is looked at by the next `check`, since a look makes the device wait. Raises BenchError
        for a reward that breaks its contract (see bench.reward.score).
        """
        if not (torch.is_grad_enabled() and z.requires_grad and self.reward_model.differentiable):
            return self._score(z, prompts)
        rewards, gradient = self.reward_gradient(z, prompts)  # at once, so that no graph of decoder and reward stays
        return rewards + (gradient * (z - z.detach())).flatten(1).sum(1)

    def _score(self, z: Tensor, prompts: list[str]) -> Tensor:
        return self._scored(z, prompts, partial(score, self.reward_model, self.reward_name))

    def rewards(self, z: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """`rewards` [n] as `reward` gives them; and `terms` [n, R] of a sum whose terms are normalised apart."""
        if getattr(self.reward_model.config, "combine", "rewards") == "rewards":
            return {"rewards": self.reward(z, prompts)}
        terms = self._scored(z, prompts, self.reward_model.terms)
        return {"rewards": self.reward_model.total(terms), "terms": terms}

    def _scored(self, z: Tensor, prompts: list[str], scores: Callable[[Tensor, list[str]], Tensor]) -> Tensor:
        self.meter.reward_calls += len(z)
        with memory.phase("reward"):
            with memory.phase("decode"):
                images = self.model.decode(z)
            rewards = scores(images, prompts)
        self._unread.append((torch.isfinite(rewards.detach()).view(len(z), -1).all(1), prompts))
        if rewards.requires_grad:
            rewards.register_hook(self._count_gradient)
        return rewards

    def check(self) -> None:
        """Raise NonFiniteError, with the prompts, if a reward since the last call was not finite; one look for all."""
        flags, prompts = [flags for flags, _ in self._unread], [p for _, own in self._unread for p in own]
        self._unread.clear()
        if flags and (bad := sorted({p for p, ok in zip(prompts, torch.cat(flags).tolist(), strict=True) if not ok})):
            told = ", ".join(map(repr, bad[:5]))
            raise NonFiniteError(f"the reward {self.reward_name!r} is not finite for {len(bad)} prompt(s): {told}")

    def cause(self, prompts: list[str]) -> str:
        """Where to look after a NonFiniteError: whether the prior's own samples of these prompts are finite already.

        A sentence for people. Draws and scores a few samples; says nothing of it if that fails.
        """
        remedy = "Lower optimizer.lr or reward.beta, or use model.dtype=float32."
        names = [(prompt, index) for prompt in dict.fromkeys(prompts[:4]) for index in range(2)]
        try:
            with torch.no_grad():
                z = self.rollout(self.batch(names), prior=True).latents[:, -1]
                found = score(self.reward_model, self.reward_name, self.model.decode(z), [p for p, _ in names])
        except BenchError:
            return remedy
        if not bool(torch.isfinite(z).all()):
            return PRIOR_NOT_FINITE
        if not bool(torch.isfinite(found).all()):
            return (
                f"The prior's own samples already give that: repair the reward {self.reward_name!r}; no setting will."
            )
        return f"The prior's own samples are finite. {remedy}"

    def _count_gradient(self, gradient: Tensor) -> None:
        self.meter.reward_gradients += len(gradient)

    def reward_gradient(self, clean: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Rewards [n] of the clean latents, and their gradients `∇ r(decode(·))`, shaped like `clean`; both detached.

        Where `clean` is a function of other states, `torch.autograd.grad(clean, z, gradient)` hands the gradient on;
        the graphs of decoder and reward, never of more than `model.decoder_batch` rows, are gone by then.
        """
        found, size = [], self.model.decoder_batch
        for start in range(0, len(clean), size):
            part = clean[start : start + size].detach().requires_grad_()
            with torch.enable_grad():
                rewards = self._score(part, prompts[start : start + size])
            with memory.phase("backward"):
                found.append((rewards.detach(), gradient(self.reward_name, rewards, part)))
        rewards, gradients = map(torch.cat, zip(*found, strict=True))
        return rewards, gradients

    def look_ahead(self, data: Trajectory, states: Tensor) -> Tensor:
        """Rewards `r(decode(ẑ_θ(z_k)))` [B, K+1] at the `states`, bool [B, K+1] on the CPU, and NaN elsewhere.

        Each is scored as by `predict_and_score`; at k = K the latent is the finished sample itself.
        """
        found = data.latents.new_full(states.shape, float("nan"))
        for part in states.nonzero().split(self.micro_batch):
            prompts = [data.prompts[i] for i in part[:, 0].tolist()]
            inner = upload((part[:, 1] < self.kernel.steps).nonzero().flatten(), found.device)
            row, k = upload(part, found.device).unbind(1)
            z = data.latents[row, k]
            with torch.no_grad():
                if len(inner):
                    output = self.predict(z[inner], k[inner], data.conditioning[row[inner]], guided=False)
                    z[inner] = self.kernel.clean(z[inner], output, k[inner])
                found[row, k] = self.reward(z, prompts)
        return found

    def predict_and_score(self, part: Transitions) -> tuple[Tensor, Tensor]:
        """The policy's output `o_θ(z_k)` [n, *latent], and rewards `r(decode(ẑ_θ(z_k)))` [n], in one pass.

        The rewards are those of the conditional prediction alone (no guidance), without gradient.
        """
        output, conditional = self.model.predict_both(part.z, self.kernel.timesteps[part.k], part.conditioning)
        with torch.no_grad():
            return output, self.reward(self.kernel.clean(part.z, conditional, part.k), part.prompts)

    def lean_adjoint(self, data: Trajectory, first: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`a_K = −β ∇ r(decode(z_K))`, `a_k = (∂μ_#/∂z_k)ᵀ a_{k+1}` at sampled states (Domingo-Enrich et al., 2025).

        first: long [B] on the CPU, the earliest step of each row that is asked for (None: 0); what lies before is NaN.
        Returns `a_0 … a_K` [B, K+1, *latent], the prior's means `μ_#(z_k)` [B, K, *latent] and the rewards [B], all
        detached; computed in parts of `micro_batch` rows.
        """
        first = torch.zeros(len(data), dtype=torch.long) if first is None else first
        pairs = zip(data.split(self.micro_batch), first.split(self.micro_batch), strict=True)
        adjoint, means, rewards = map(torch.cat, zip(*(self._lean_adjoint(*pair) for pair in pairs), strict=True))
        return adjoint, means, rewards

    def _lean_adjoint(self, data: Trajectory, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rewards, gradient = self.reward_gradient(data.latents[:, -1], data.prompts)
        adjoint = torch.full_like(data.latents, float("nan"))
        adjoint[:, -1] = -self.beta * gradient
        means = torch.full_like(data.latents[:, 1:], float("nan"))
        for k in reversed(range(int(first.min()), self.kernel.steps)):
            row = upload((first <= k).nonzero().flatten(), adjoint.device)
            z = data.latents[row, k].detach().requires_grad_()
            mean = self.kernel.mean(z, self.predict(z, k, data.conditioning[row], prior=True), k)
            adjoint[row, k] = torch.autograd.grad(mean, z, adjoint[row, k + 1])[0]
            means[row, k] = mean.detach()
        return adjoint, means, rewards

    def renoise(self, data: Batch, z: Tensor, k: int, copy: int) -> Tensor:
        """A draw of the noising kernel `p_B(z_k | z_{k+1} = z)`, named by the sample and the number of the copy."""
        mean, std = self.kernel.noising(z, k)
        return mean + std * upload(Noise(self.seed, "renoise", data.samples)(copy, z.shape[1:]), z.device).to(z.dtype)

    def diffused(self, data: Trajectory, steps: Tensor, size: int) -> Iterator[Noised]:
        """Finished samples with new noise, at the chosen steps [B, S], in micro-batches of at most `size` rows.

        A sample names its noise, one draw for each column of `steps`.
        """
        count, columns = len(data), steps.shape[1]
        noise = Noise(self.seed, "renoise", data.samples)
        drawn = torch.cat([noise(column, data.latents.shape[2:]) for column in range(columns)])
        for place in torch.arange(count * columns).split(size):
            rows = data[place % count]
            k = upload(steps.T.flatten()[place], data.latents.device)
            clean = rows.latents[:, -1]
            own = upload(drawn[place], clean.device).to(clean.dtype)
            yield Noised(
                rows.prompts,
                rows.samples,
                rows.conditioning,
                row=place,
                k=k,
                clean=clean,
                noise=own,
                z=self.kernel.noised(clean, own, k),
                target=self.kernel.target(clean, own, k),
                rewards=rows.rewards,
                advantages=rows.advantages,
            )

    # Choices ------------------------------------------------------------------------------------------------------

    def rng(self, *name: str | int) -> np.random.Generator:
        """A generator for a random choice, which depends on the run's seed and on `name` alone.

        Name it by the sample, `core.rng(*data.samples[i])`: then the choice is the same whatever the micro-batch.
        """
        return generator(self.seed, "select", *name)

    def choose_steps(
        self, data: Batch, fraction: float, *, last: Literal["always", "like any", "never"] = "always"
    ) -> Tensor:
        """Long [B, S]: for every row one random step of each of `⌊K·fraction⌋` equal bins, and always the last step.

        A fraction above zero means one bin at least, and 1 all K steps. Where the last step is "like any" the bins are
        of all steps, and there is one in any case; "never" leaves it out. The choice is named by the sample, like its
        noise. It is on the CPU, like every choice: what decides which work is done must not be asked from the device.
        """
        always = last == "always"
        others = self.kernel.steps - (last != "like any")
        bins = min(max(int(self.kernel.steps * fraction + 1e-9), fraction > 0 or not always), others)
        edges = np.linspace(0, others, bins + 1).round().astype(int)
        rows = [
            [*self.rng(prompt, index).integers(edges[:-1], edges[1:]), *[others] * always]
            for prompt, index in data.samples
        ]
        return torch.tensor(np.array(rows, dtype=np.int64))

    def choose_late_step(self, data: Batch, window: float) -> Tensor:
        """Long [B]: for every row one random step among the last `window` of all, named by the sample."""
        first = min(int(self.kernel.steps * (1 - window)), self.kernel.steps - 1)
        return torch.tensor([int(self.rng(*name).integers(first, self.kernel.steps)) for name in data.samples])

    def choose_pair(self, data: Batch) -> Tensor:
        """Long [B, 2]: for every row two different random steps, the earlier one first, named by the sample."""
        if self.kernel.steps < 2:
            raise BenchError("two different steps need sampler.steps ≥ 2.")
        pairs = [self.rng(*name).choice(self.kernel.steps, 2, False) for name in data.samples]
        return torch.tensor(np.sort(np.stack(pairs), 1))

    def choose_start(self, data: Batch, mean: float, deviation: float) -> Tensor:
        """Long [B]: for every row a step `int(N(mean·K, deviation·K))`, redrawn until it is one of 1 … K−1."""
        steps, chosen = self.kernel.steps, []
        if steps < 2:
            raise BenchError("a random first step of the gradient needs sampler.steps ≥ 2.")
        for name in data.samples:
            rng, step = self.rng(*name), 0
            while not 1 <= step < steps:
                step = int(rng.normal(mean * steps, deviation * steps))
            chosen.append(step)
        return torch.tensor(chosen)
