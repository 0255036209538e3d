"""The core that every method computes with: sampling, guided predictions, kernel arithmetic, rewards and accounting."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bench.errors import NonFiniteError
from bench.model import Conditioning, DiffusionModel
from bench.reward import Reward, gradient, score
from bench.runtime import memory
from bench.runtime.meter import Meter
from bench.runtime.processes import Pace
from bench.sampling.kernel import Kernel, Step
from bench.sampling.noise import Noise, Purpose, generator, upload
from bench.sampling.trajectory import Batch, Noised, Steer, Trajectory, join, rollout


@dataclass(frozen=True, eq=False)
class Core:
    """One model, one kernel, one reward, and what is trained on them.

    Immutable: `dataclasses.replace(core, beta=…)` is another view of the same weights, networks, copies and counts.

    beta: inverse temperature of the reward in `p* ∝ p_# exp(β r)`.
    seed: names the training noise and every random choice.
    micro_batch, sample_batch: rows of a micro-loss, and of one call of `rollout`.
    meter: counts what is computed.
    networks: the method's extra networks by name. copies: copies of the adapters by name, then by parameter.
    reward_name: for messages; empty means the name of the reward's class.
    teacher_model: the teacher of a few-step student and the kernel of its noise levels, for methods that need it.
    unchecked: for every call of the reward since the last `check`, its scores [n, …] and their prompts.
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
    teacher_model: tuple[DiffusionModel, Kernel] | None = None
    unchecked: list[tuple[Tensor, list[str]]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", self.kernel.to(self.model.device))
        object.__setattr__(self, "reward_name", self.reward_name or type(self.reward_model).__name__)

    # Sampling -----------------------------------------------------------------------------------------------------

    def batch(self, samples: Iterable[tuple[str, int]]) -> Batch:
        """The batch of these samples, each named (prompt, index), with their prompts encoded."""
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
        start: Sequence[tuple[str, int]] | None = None,
        steer: Steer | None = None,
        begin: tuple[int, Tensor] | None = None,
    ) -> Trajectory:
        """Sample trajectories in parts of `sample_batch` rows; see `bench.sampling.trajectory.rollout`.

        seed: of the noise; None means the run's. weights: the copy of the adapters that samples, in the place of the
        adapters. noisy: the steps [first, end) that add noise; None means all. start: the names of the rows' z_0, where
        it is not the samples' own: rows of one name share it, and a negative index is that of no sample. steer: what
        makes the policy's output of the prior's, in the place of the adapters. begin: a step k and z_k [B, *latent],
        from which to go on.
        """
        kernel = self.kernel if noisy is None else replace(self.kernel, noisy=noisy)
        seed = self.seed if seed is None else seed
        options: dict[str, Any] = {"record": record, "prior": prior, "grad_from": grad_from, "stop_at": stop_at}
        options["steer"] = steer
        # merged weights round differently, and recorded densities must equal those of a later replay bit for bit
        merge = grad_from is None and "log_prob" not in record and not prior and steer is None
        with self._using(weights), self.model.merged() if merge else nullcontext():
            parts = []
            for first in range(0, len(batch), self.sample_batch):
                rows = slice(first, first + self.sample_batch)
                part, names = batch[rows], start and start[rows]
                options["start"] = Noise(seed, purpose, names) if names else None
                options["begin"] = begin and (begin[0], begin[1][rows])
                parts.append(rollout(self.model, kernel, part, Noise(seed, purpose, part.samples), **options))
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
        """The policy's output `o_θ(z, k, c)`, or the prior's `o_#` with `prior`; shaped like `z`, float32.

        It is noise, v or velocity as the model has it; `kernel` knows what it means.
        k: one step, or long [n]. weights: the copy of the adapters (`Method.copies`) that predicts, in the place of the
        policy. guided: with classifier-free guidance.
        """
        with self._using(weights):
            return self.model.predict(z, self.kernel.timesteps[k], conditioning, prior=prior, guided=guided)

    def teacher(self) -> "Core":
        """This core with the student's teacher in the model's place: its predictions, noise levels and encoded prompts.

        Networks, reward and counts are shared. Needs `Needs.teacher`.
        """
        assert self.teacher_model, "the method declares no Needs.teacher"
        model, kernel = self.teacher_model
        return replace(self, model=model, kernel=kernel)

    def pace(self, uneven: bool = False) -> Pace:
        """How processes share work that calls the network; uneven: whether it has `Needs.uneven`."""
        if not self.model.sharded:
            return "free"
        return "alike" if uneven else "even"

    def _using(self, weights: str | None) -> AbstractContextManager[None]:
        return self.model.using(self.copies[weights]) if weights else nullcontext()

    def network(self, name: str, z: Tensor, k: Step, conditioning: Conditioning) -> Tensor:
        """The output of the method's extra network at step k; the finished sample (k = K) has time 0."""
        return self.networks[name](z, self.kernel.times[k].expand(len(z)), conditioning)

    # Rewards ------------------------------------------------------------------------------------------------------

    def reward(self, z: Tensor, prompts: list[str]) -> Tensor:
        """`r(decode(z), c)`, float32 [n]; differentiable in the clean latent `z` if the reward is.

        The next `check` looks whether they are finite, because each look makes the device wait. Raises BenchError for a
        reward that breaks its contract (see `bench.reward.score`).
        """
        if not (torch.is_grad_enabled() and z.requires_grad and self.reward_model.differentiable):
            return self._score(z, prompts)
        # the gradient is taken at once, so that the graphs of decoder and reward do not outlive this call
        rewards, gradient = self.reward_gradient(z, prompts)
        return rewards + (gradient * (z - z.detach())).flatten(1).sum(1)

    def _score(self, z: Tensor, prompts: list[str]) -> Tensor:
        return self._decode_and(partial(score, self.reward_model, self.reward_name), z, prompts)

    def rewards_and_terms(self, z: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """`rewards` [n] as `reward` gives them; of a sum that normalises its terms separately also `terms` [n, R]."""
        if getattr(self.reward_model.config, "combine", "rewards") == "rewards":
            return {"rewards": self.reward(z, prompts)}
        weighted: Any = self.reward_model  # see bench.weighted
        terms = self._decode_and(weighted.terms, z, prompts)
        return {"rewards": weighted.total(terms), "terms": terms}

    def _decode_and(self, scores: Callable[[Tensor, list[str]], Tensor], z: Tensor, prompts: list[str]) -> Tensor:
        """The scores [n, …] of the decoded latents, counted and noted for `check`."""
        self.meter.reward_calls += len(z)
        with memory.phase("reward"):
            with memory.phase("decode"):
                images = self.model.decode(z)
            rewards = scores(images, prompts)
        self.unchecked.append((rewards.detach(), prompts))
        if rewards.requires_grad:
            rewards.register_hook(self._count_gradient)
        return rewards

    def check(self, *, missing: bool = False) -> None:
        """Raise NonFiniteError, with the prompts, if a reward since the last call was not finite.

        missing: let NaN pass, as of a reward that may have no score. The device waits once for all of them.
        """
        if not self.unchecked:
            return
        flags = [scores.isfinite() | scores.isnan() if missing else scores.isfinite() for scores, _ in self.unchecked]
        finite = torch.cat([rows.view(len(rows), -1).all(1) for rows in flags]).tolist()
        prompts = [prompt for _, prompts in self.unchecked for prompt in prompts]
        self.unchecked.clear()
        if bad := sorted({prompt for prompt, ok in zip(prompts, finite, strict=True) if not ok}):
            examples = ", ".join(map(repr, bad[:5]))
            raise NonFiniteError(f"the reward {self.reward_name!r} is not finite for {len(bad)} prompt(s): {examples}")

    def _count_gradient(self, gradient: Tensor) -> None:
        self.meter.reward_gradients += len(gradient)

    def reward_gradient(self, clean: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Rewards [n] of the clean latents, and their gradients `∇ r(decode(·))`, shaped like `clean`; both detached.

        Where `clean` is a function of other states, `torch.autograd.grad(clean, z, gradient)` continues to them. The
        graphs of decoder and reward, of at most `model.decoder_batch` rows at a time, are freed before this returns.
        """
        parts, size = [], self.model.decoder_batch
        for start in range(0, len(clean), size):
            part = clean[start : start + size].detach().requires_grad_()
            with torch.enable_grad():
                rewards = self._score(part, prompts[start : start + size])
            with memory.phase("backward"):
                parts.append((rewards.detach(), gradient(self.reward_name, rewards, part)))
        rewards, gradients = map(torch.cat, zip(*parts, strict=True))
        return rewards, gradients

    def noise(self, data: Batch, draw: int, *, like: Tensor) -> Tensor:
        """Standard normal noise shaped like `like` [B, *latent], named by the sample and the number of the draw.

        It is apart from the noise of every rollout.
        """
        noise = Noise(self.seed, "renoise", data.samples)(draw, like.shape[1:])
        return upload(noise, like.device).to(like.dtype)

    def noised(self, data: Trajectory, steps: Tensor, size: int) -> Iterator[Noised]:
        """Finished samples `z_K` with new noise, `α_k z_K + s_k ε`, in micro-batches of at most `size` rows.

        steps: long [B, S] on the CPU, the steps k whose noise levels each sample gets (see `choose_steps`). A sample
        names its noise, one draw for each column of `steps`.
        """
        count, columns = len(data), steps.shape[1]
        draw = Noise(self.seed, "renoise", data.samples)
        noises = torch.cat([draw(column, data.latents.shape[2:]) for column in range(columns)])
        for place in torch.arange(count * columns).split(size):
            rows = data[place % count]
            k = upload(steps.T.flatten()[place], data.latents.device)
            clean = rows.latents[:, -1]
            noise = upload(noises[place], clean.device).to(clean.dtype)
            yield Noised(
                rows.prompts,
                rows.samples,
                rows.conditioning,
                row=place,
                k=k,
                clean=clean,
                noise=noise,
                z=self.kernel.noised(clean, noise, k),
                target=self.kernel.target(clean, noise, k),
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
        """Long [B, S]: for every row one random step of each of `⌊K·fraction⌋` equal bins, and the last step.

        A fraction above zero means at least one bin, and 1 means all K steps. last: "always" adds the last step to
        those of the bins, which cover the steps before it; "never" leaves it out; "like any" lets the bins cover all
        steps. Without the last step there is at least one bin.

        The choice is named by the sample, like its noise. It is on the CPU, like every choice of what to compute: to
        read it from the device would make the host wait.
        """
        always = last == "always"
        choosable = self.kernel.steps - (last != "like any")
        bins = min(max(int(self.kernel.steps * fraction + 1e-9), fraction > 0 or not always), choosable)
        edges = np.linspace(0, choosable, bins + 1).round().astype(int)
        rows = [
            [*self.rng(prompt, index).integers(edges[:-1], edges[1:]), *[choosable] * always]
            for prompt, index in data.samples
        ]
        return torch.tensor(np.array(rows, dtype=np.int64))
