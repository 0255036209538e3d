"""Trajectories: how they are sampled, what they hold, and how they are cut into transitions.

`rollout` is the only sampler in the project: all methods train on its trajectories, and all evaluation images come from
it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from bench.model import Conditioning, DiffusionModel
from bench.sampling.kernel import Kernel, gaussian_log_prob
from bench.sampling.noise import Noise, upload

RECORDS = frozenset({"model_output", "prior_output", "log_prob"})
Steer = Callable[[Tensor, int, Conditioning, Tensor], Tensor]  # z_k, k, conditioning, the prior's output → the policy's


def _rows(value: Any, index: Tensor) -> Any:
    """Rows of a tensor, of a conditioning, of a list, or of nothing; index: long, on the CPU."""
    if value is None:
        return None
    if isinstance(value, list):
        return [value[i] for i in index.tolist()]
    if isinstance(value, Conditioning):
        return Conditioning({name: _rows(part, index) for name, part in value.parts.items()})
    return value[upload(index, value.device)]


@dataclass(frozen=True)
class Batch:
    """What to sample: one prompt and one sample name per row.

    prompts: B strings. samples: B pairs (prompt, index), the names of the rows' noise.
    conditioning: the encoded prompts, B rows.
    """

    prompts: list[str]
    samples: list[tuple[str, int]]
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice | Tensor) -> Any:
        """The rows that a slice, or an index or mask on the CPU, selects in every field."""
        if isinstance(rows, slice):
            values = {f.name: getattr(self, f.name) for f in fields(self)}
            chosen: dict[str, Any] = {name: None if value is None else value[rows] for name, value in values.items()}
        else:
            index = torch.arange(len(self))[rows]
            chosen = {f.name: _rows(getattr(self, f.name), index) for f in fields(self)}
        return replace(self, **chosen)

    def split(self, size: int) -> Iterator[Any]:
        """Consecutive parts of at most `size` rows."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


@dataclass(frozen=True)
class Trajectory(Batch):
    """A batch of sampled chains; float32 whatever the network's precision.

    latents: [B, K+1, *latent], noise first, clean latent last.
    model_output: [B, K, *latent], guided predictions of the policy that sampled, or None if not recorded.
    prior_output: [B, K, *latent], guided predictions of the prior at the same latents, or None.
    log_prob: [B, K], log-density of each transition (sum over elements), or None.
    rewards: [B], or None where the method does not ask for them beforehand.
    terms: [B, R], the unweighted terms of a reward that is a sum, where they are normalised separately, or None.
    advantages, weights: [B], set by a method's `prepare`, or None.
    noisy: long [B, S], the steps that had noise; None means all.
    """

    latents: Tensor
    model_output: Tensor | None = None
    prior_output: Tensor | None = None
    log_prob: Tensor | None = None
    rewards: Tensor | None = None
    terms: Tensor | None = None
    advantages: Tensor | None = None
    weights: Tensor | None = None
    noisy: Tensor | None = None

    def __post_init__(self) -> None:
        b, k = len(self.prompts), self.latents.shape[1] - 1
        for name, rows in (("latents", (b, k + 1)), ("model_output", (b, k)), ("prior_output", (b, k))):
            value = getattr(self, name)
            if value is not None and (value.shape[:2] != rows or value.shape[2:] != self.latents.shape[2:]):
                raise ValueError(f"Trajectory.{name} has shape {tuple(value.shape)}, expected {rows} + latent shape")

    @property
    def steps(self) -> int:
        """K, the number of transitions."""
        return self.latents.shape[1] - 1

    def transitions(self, steps: Tensor, size: int) -> Iterator["Transitions"]:
        """Micro-batches of at most `size` transitions.

        steps: long [B, S] on the CPU, S steps of each row, as `Core.choose_steps` gives them. The transitions at the
        first column of all rows come first.
        """
        if steps.shape[0] != len(self):
            raise ValueError(f"steps has {steps.shape[0]} rows for a trajectory of {len(self)}")
        rows = torch.arange(len(self)).repeat(steps.shape[1])
        for row, k in zip(rows.split(size), steps.T.flatten().split(size), strict=True):
            yield self.transitions_at(row, k)

    def transitions_at(self, row: Tensor, k: Tensor) -> "Transitions":
        """The n transitions of trajectory `row[i]` at step `k[i]`; both long [n], on the CPU."""
        prompts, samples, texts = (_rows(value, row) for value in (self.prompts, self.samples, self.conditioning))
        split = (k + 1 < self.steps).nonzero().flatten(), (k + 1 == self.steps).nonzero().flatten()
        row, k, unfinished, finished = (upload(index, self.latents.device) for index in (row, k, *split))

        def at(value: Tensor | None, *index: Tensor) -> Tensor | None:
            return None if value is None else value[index]

        return Transitions(
            prompts=prompts,
            samples=samples,
            conditioning=texts,
            row=row,
            k=k,
            unfinished=unfinished,
            finished=finished,
            z=self.latents[row, k],
            z_next=self.latents[row, k + 1],
            model_output=at(self.model_output, row, k),
            prior_output=at(self.prior_output, row, k),
            log_prob=at(self.log_prob, row, k),
            rewards=at(self.rewards, row),
            advantages=at(self.advantages, row),
            weights=at(self.weights, row),
        )


@dataclass(frozen=True)
class Transitions(Batch):
    """n transitions `z_k → z_{k+1}`, each with its own step; index tensors are on the latents' device.

    row: long [n], the row of the trajectory; k: long [n], the step.
    unfinished, finished: long, which of the n end before the finished sample (k + 1 < K), and which end with it.
    z, z_next, model_output, prior_output: [n, *latent]; log_prob, rewards, advantages, weights: [n].
    """

    row: Tensor
    k: Tensor
    unfinished: Tensor
    finished: Tensor
    z: Tensor
    z_next: Tensor
    model_output: Tensor | None = None
    prior_output: Tensor | None = None
    log_prob: Tensor | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class Noised(Batch):
    """n finished samples with new noise, each at the noise level of its own step; see `Core.noised`.

    row: long [n] on the CPU, places among S columns of B samples: that of sample i in column j is `j·B + i`.
    k: long [n], the step, on the latents' device. clean, noise: x and ε, [n, *latent]; z: `α_k x + s_k ε`;
    target: the network output that would give x back.
    rewards, advantages: of the samples, [n], or None.
    """

    row: Tensor
    k: Tensor
    clean: Tensor
    noise: Tensor
    z: Tensor
    target: Tensor
    rewards: Tensor | None = None
    advantages: Tensor | None = None


def join(parts: Sequence[Trajectory]) -> Trajectory:
    """One trajectory batch from several of equal length."""

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if values[0] is None:
            return None
        if isinstance(values[0], Conditioning):
            return Conditioning.join(values)
        return torch.cat(values) if isinstance(values[0], Tensor) else [x for value in values for x in value]

    return Trajectory(**{f.name: joined(f.name) for f in fields(Trajectory)})


def step_kl(kernel: Kernel, path: Trajectory) -> Tensor:
    """`‖μ_θ−μ_#‖²/2σ_k²`, float32 [B, K], the path KL step by step, of a trajectory with both predictions recorded.

    Needs `kernel.has_density`.
    """
    policy, prior = cast(Tensor, path.model_output), cast(Tensor, path.prior_output)
    steps = [kernel.kl(path.latents[:, k], policy[:, k], prior[:, k], k) for k in range(path.steps)]
    return torch.stack(steps, 1)


def rollout(
    model: DiffusionModel,
    kernel: Kernel,
    batch: Batch,
    noise: Noise,
    *,
    record: frozenset[str] = frozenset(),
    prior: bool = False,
    grad_from: int | None = None,
    stop_at: int | None = None,
    start: Noise | None = None,
    steer: Steer | None = None,
    begin: tuple[int, Tensor] | None = None,
) -> Trajectory:
    """Sample `z_0 … z_K` for every row of `batch` with named noise.

    record: what the trajectory holds besides latents, any of "model_output", "prior_output", "log_prob".
    prior: sample from the frozen prior.
    grad_from: build the autograd graph from this step on; None means no graph.
    stop_at: sample only `z_0 … z_{stop_at}`.
    start: the noise of z_0; None means that of `noise`.
    steer: what makes the policy's output of the prior's; None means that the adapters do.
    begin: a step k and z_k [B, *latent], from which to go on: `z_k … z_K`. None means from z_0.
    """
    if unknown := record - RECORDS:
        raise ValueError(f"cannot record {sorted(unknown)}: choose from {sorted(RECORDS)}")
    recorded: dict[str, list[Tensor]] = {name: [] for name in record}
    first, z = begin or (0, upload((start or noise)(0, model.latent_shape), model.device))
    latents = [z]
    for k in range(first, kernel.steps if stop_at is None else stop_at):
        with torch.set_grad_enabled(grad_from is not None and k >= grad_from):
            t = kernel.timesteps[k]
            output = unsteered = model.predict(z, t, batch.conditioning, prior=prior or steer is not None)
            if steer is not None:
                output = steer(z, k, batch.conditioning, unsteered)
            mean, std = kernel.mean(z, output, k), kernel.std(k, z)
            if "model_output" in record:
                recorded["model_output"].append(output)
            if "prior_output" in record:
                known = prior or steer is not None
                recorded["prior_output"].append(
                    unsteered if known else model.predict(z, t, batch.conditioning, prior=True)
                )
            z = mean + std * upload(noise(k + 1, model.latent_shape), z.device).to(z.dtype) if kernel.eta > 0 else mean
            if "log_prob" in record:
                recorded["log_prob"].append(gaussian_log_prob(z, mean, std))
            latents.append(z)
    records = {name: torch.stack(values, 1) for name, values in recorded.items()}
    return Trajectory(
        prompts=batch.prompts,
        samples=batch.samples,
        conditioning=batch.conditioning,
        latents=torch.stack(latents, 1),
        noisy=None if kernel.noisy is None else torch.arange(*kernel.noisy).expand(len(batch), -1),
        **records,
    )
