"""The one training loop: rounds of sampling, updates, checkpoints, accounting."""

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.core import Core
from bench.errors import BenchError, NonFiniteError
from bench.method import Copy, Method
from bench.runtime import processes
from bench.runtime.finite import nonfinite
from bench.runtime.stopping import STOP, Interrupted
from bench.sampling.noise import seeded
from bench.sampling.trajectory import Batch, Trajectory
from bench.settings import OptimizerConfig, TrainConfig
from bench.training import checkpoint
from bench.training.copies import move_copies
from bench.training.gradients import Parameters, clip_gradients, require_finite
from bench.training.nonfinite import REMEDY, nonfinite_advice
from bench.training.rounds import complete_groups, path_kl, sample_names, sample_paths, with_rewards
from bench.training.totals import LossTotals, averages

CHECKPOINT_SECONDS = 120
KL_SAMPLES = 16  # of the coming round, by which `train.max_path_kl` is watched
log = logging.getLogger(__name__)
Record = dict[str, Any]  # one line of the update log


class Trainer:
    """Train `core.model` with `method`. A run resumes after any update, on a CPU with as many threads bit for bit.

    Resumed with other settings of `bench.settings.EXECUTION`, such as another batch size, results agree to rounding.

    A round samples `prompts_per_round × samples_per_prompt` trajectories; each of its updates trains on one strided
    part of them. Several processes share the rollout's parts (`sample_batch` rows) and an update's shards
    (`micro_batch` rows); every process holds the whole round, sees the same losses, and makes the same step.
    """

    def __init__(
        self,
        core: Core,
        method: Method,
        prompts: list[str],
        train: TrainConfig,
        optimizer: OptimizerConfig,
        folder: Path,
    ):
        self.core, self.method, self.prompts, self.config, self.optimizer = core, method, prompts, train, optimizer
        self.checkpoints = folder / "checkpoints"
        self.loss_model = core.model if train.guidance is None else core.model.with_guidance(train.guidance)
        # mean reward of each prompt before training, for the log; may be empty
        self.prior_rewards: dict[str, float] = {}
        with seeded(core.seed, "networks"):
            networks = method.networks(core.model)
        core.networks.clear()
        core.networks.update({name: network.to(core.model.device) for name, network in networks.items()})
        optimizer.require_networks(core.networks)
        self.parameters: Parameters = {"policy": list(core.model.adapters().values())}
        self.parameters |= {name: list(network.parameters()) for name, network in core.networks.items()}
        self.optimizers = {name: self._make_optimizer(name) for name in self.parameters}
        self.copies = method.copies()
        if (decay := train.ema) is not None:
            self.copies = {"ema": Copy(lambda n: min((1 + n) / (10 + n), decay))} | self.copies
        for name in self.copies:
            core.copies[name] = {key: p.detach().clone() for key, p in core.model.adapters().items()}
        self.round, self.update, self.part = 0, 0, 0  # part: updates done in this round
        self.queue: list[Batch] = []
        self.ended_at_kl: float | None = None  # the path KL that ended training, nats
        self.missing_scores = 0  # of samples whose groups were left out

    def _make_optimizer(self, name: str) -> torch.optim.Optimizer:
        config = self.optimizer
        override = config.networks.get(name)
        lr = override.lr if override and override.lr is not None else config.lr
        decay = override.weight_decay if override and override.weight_decay is not None else config.weight_decay
        return torch.optim.AdamW(self.parameters[name], lr, config.betas, config.eps, decay)

    # The loop -----------------------------------------------------------------------------------------------------

    def run(
        self,
        on_update: Callable[[Record], None],
        after_update: Callable[[int], None] = lambda update: None,
        save_at: Collection[int] = (),
        after_save: Callable[[], None] = lambda: None,
    ) -> None:
        """Train until `done`; `on_update` gets the log record of each update, and `after_update` then its number.

        Between the two a checkpoint is written, and `after_save` called: after every `checkpoint_every` rounds, after
        the updates `save_at`, after the last, every two minutes, and when a signal asks to stop. Raises NonFiniteError,
        and Interrupted after the update and the checkpoint of such a signal.
        """
        saved = time.monotonic()
        while not self.done:
            with STOP.deferred():
                on_update(self.step())
                late = time.monotonic() - saved > CHECKPOINT_SECONDS
                everyone = processes.gather((STOP.number, late))  # all must agree, since all take part in a checkpoint
                signals = [number for number, _ in everyone if number is not None]
                due = not self.part and self.round % self.config.checkpoint_every == 0
                due = due or self.done or self.update in save_at or everyone[0][1]
                if due or signals:
                    self._save()
                    after_save()
                    saved = time.monotonic()
            if signals:
                raise Interrupted(signals[0])
            after_update(self.update)

    def step(self) -> Record:
        """Make the next update, and before it sample what it needs; returns its log record."""
        while len(self.queue) <= self.config.data_lag:
            self.queue.append(self.sample_round(self.round + len(self.queue)))
        parts = self.config.updates_per_round
        record = self.train_on(self.queue[0][self.part :: parts])
        self.part += 1
        if self.part == parts or self.update >= self.config.updates:
            self.queue.pop(0)
            self.round, self.part = self.round + 1, 0
            self._move_copies(rounds=self.round)
            record |= self._watch_kl()
        return record

    @property
    def done(self) -> bool:
        """Whether all updates are made, or the policy has left the bound `train.max_path_kl`."""
        return self.update >= self.config.updates or self.ended_at_kl is not None

    def _watch_kl(self) -> dict[str, float]:
        """The path KL for the log, where it is bounded; beyond the bound training ends.

        It is that of the present weights on some of the coming round's samples, whose noise they have not seen.
        """
        if (bound := self.config.max_path_kl) is None:
            return {}
        names = self.names(self.round)
        batch = self.core.batch(names[:: max(1, len(names) // KL_SAMPLES)][:KL_SAMPLES])
        kl = path_kl(self.core, self.method, batch)
        if kl > bound:
            self.ended_at_kl = kl
        return {"path_kl": kl}

    @property
    def beta(self) -> float:
        """β of the next update."""
        warmup = self.config.beta_warmup
        return self.core.beta * min(1.0, self.update / self.config.updates / warmup) if warmup else self.core.beta

    def sample_round(self, number: int) -> Batch:
        """The data of round `number`, sampled with the present weights and prepared by the method."""
        core, needs = replace(self.core, beta=self.beta), self.method.needs
        batch = core.batch(self.names(number))
        if not needs.trajectory:
            return batch
        data = sample_paths(core, self.method, batch, number)
        if needs.rewards:
            with self._explain_nonfinite(data.prompts):
                data = with_rewards(core, data)
            if core.reward_model.may_miss:
                data = self._complete(data, number)
        if self.loss_model is not core.model:  # guidance that is an input of the network is part of the conditioning
            data = replace(data, conditioning=self.loss_model.encode(data.prompts))
        return self.method.prepare(self._loss_core(), data)

    def _complete(self, data: Trajectory, number: int) -> Trajectory:
        """The round without the groups that lack a score. Raises BenchError if too little is left for its updates."""
        kept, missing = complete_groups(data)
        if len(kept) < self.config.updates_per_round:
            raise BenchError(
                f"the reward {self.core.reward_name!r} gave no score for {missing} of the {len(data)} samples of round "
                f"{number}, and of only {len(kept)} samples the whole group has scores: see the warnings above, and "
                "give the same command again when the service works."
            )
        self.missing_scores += missing
        return kept

    def names(self, number: int) -> list[tuple[str, int]]:
        """Names of the samples of round `number`."""
        return sample_names(number, self.prompts, self.config, self.core.seed)

    def _loss_core(self) -> Core:
        """The core that the method's losses compute with: β of the schedule, and the guidance of the losses."""
        return replace(self.core, model=self.loss_model, beta=self.beta)

    # One update ---------------------------------------------------------------------------------------------------

    def train_on(self, data: Batch) -> Record:
        """Make one update on the data of a round, or of a part of one; returns its log record."""
        core = self._loss_core()
        shards = [data] if self.method.needs.whole_update else list(data.split(core.micro_batch))
        totals = LossTotals()
        with self._explain_nonfinite(data.prompts):

            def backward(shard: Batch, counts: bool) -> None:
                with nullcontext() if counts else core.meter.uncounted():
                    self._backward(core, shard, len(data), totals, counts)

            processes.share(shards, backward, core.pace(self.method.needs.uneven))
            with core.meter.phase("optimizer"):
                scalars = clip_gradients(self.parameters, self.optimizer.clip)
                if isinstance(data, Trajectory) and data.rewards is not None:
                    scalars["reward"] = data.rewards.mean()
                with processes.together():
                    core.check()
                    sums, numbers = totals.read(scalars)
                require_finite(self.parameters, numbers)
                self._step_optimizers()
        self.update += 1
        self._move_copies()
        means = averages(sums, len(data))
        if self.core.reward_model.may_miss:
            means["missing_scores"] = self.missing_scores
        rewards = (means | numbers).get("reward")
        if rewards is not None and self.prior_rewards.keys() >= set(data.prompts):
            before = sum(self.prior_rewards[prompt] for prompt in data.prompts) / len(data)
            means["reward_over_prior"] = rewards - before
        counts = core.meter.total()
        seconds = {f"seconds/{phase}": value for phase, value in counts.pop("seconds").items()}
        return {"update": self.update, "round": self.round, **means, **numbers, **counts, **seconds}

    def _backward(self, core: Core, shard: Batch, trajectories: int, totals: LossTotals, counts: bool) -> None:
        """Backward through a shard's losses, each divided by the trajectories of the whole update.

        counts: False of a shard that counts in another process. Its gradient is zero here.
        """
        losses = self.method.losses(core, shard)
        while True:
            with core.meter.phase("losses"):
                loss = next(losses, None)
            if loss is None:
                return
            with core.meter.phase("backward"):
                (loss.values.sum() * counts / trajectories).backward()
            if counts:
                totals.add(loss, shard.prompts)

    def _step_optimizers(self) -> None:
        decay = self.optimizer.decay  # the share of the updates over which the learning rates fall to zero
        factor = min(1.0, (1 - self.update / self.config.updates) / decay) if decay else 1.0
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _move_copies(self, rounds: int | None = None) -> None:
        adapters = self.core.model.adapters()
        move_copies(self.core.copies, self.copies, adapters, updates=self.update, run=self.config.rounds, rounds=rounds)

    @contextmanager
    def _explain_nonfinite(self, prompts: list[str]) -> Iterator[None]:
        """Add to a NonFiniteError where training stopped, what is safe, and where to look; prompts: of the data."""
        try:
            yield
        except NonFiniteError as error:
            last = checkpoint.newest(self.checkpoints)
            raise NonFiniteError(
                f"update {self.update + 1} stopped: {error}. Last good checkpoint: {last or 'none'}; nothing was "
                f"overwritten. {nonfinite_advice(self.core, prompts)}"
            ) from error

    # State --------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        weights = [(f"{name} of the policy", p) for name, p in self.core.model.adapters().items()]
        for name, network in self.core.networks.items():
            weights += [(f"{key} of {name}", p) for key, p in network.named_parameters()]
        if found := nonfinite(weights):
            raise NonFiniteError(f"update {self.update} left weights that are not finite: {found}. {REMEDY}")
        with self.core.meter.phase("checkpoint"):
            state = self.state_dict()
            if processes.is_main():
                checkpoint.save(self.checkpoints, self.update, state)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on; noise and choices are named, so there is no RNG state."""
        return {
            "round": self.round,
            "update": self.update,
            "part": self.part,
            "ended_at_kl": self.ended_at_kl,
            "missing_scores": self.missing_scores,
            "parameters": {name: [p.detach() for p in group] for name, group in self.parameters.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "copies": self.core.copies,
            "method": self.method.state_dict(),
            # without the conditioning, which is encoded again from the prompts
            "queue": [
                {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "conditioning"}
                for batch in self.queue
            ],
            "meter": self.core.meter.total(),
            "threads": torch.get_num_threads(),
        }

    def resume(self) -> bool:
        """Go on from the newest intact checkpoint; False if there is none."""
        state = processes.from_main(lambda: checkpoint.load(self.checkpoints))
        if state is None:
            return False
        if state["threads"] != torch.get_num_threads():
            log.warning(
                "resuming with %d CPU threads what was begun with %d: results agree to rounding, not bit for bit",
                torch.get_num_threads(),
                state["threads"],
            )
        try:
            self._restore(state)
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise BenchError(
                f"the checkpoint in {self.checkpoints} is of another version or another run ({error}): choose another "
                "--out, or give --force to begin anew."
            ) from error
        return True

    def _restore(self, state: dict[str, Any]) -> None:
        device = self.core.model.device
        for name, group in self.parameters.items():
            for parameter, stored in zip(group, state["parameters"][name], strict=True):
                parameter.data.copy_(stored)
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        for name, stored in state["copies"].items():
            self.core.copies[name] = {key: value.to(device) for key, value in stored.items()}
        self.method.load_state_dict(state["method"])
        if processes.is_main():  # the stored counts are those of all processes
            self.core.meter.restore(state["meter"])
        self.round, self.update, self.part = state["round"], state["update"], state.get("part", 0)
        self.ended_at_kl, self.missing_scores = state.get("ended_at_kl"), state.get("missing_scores", 0)
        for stored in state["queue"]:
            moved: dict[str, Any] = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in stored.items()}
            moved["conditioning"] = self.loss_model.encode(stored["prompts"])
            self.queue.append((Trajectory if "latents" in moved else Batch)(**moved))
