"""The one training loop: rounds of sampling, updates, clipping, checkpoints, accounting."""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.core import Core
from bench.errors import BenchError, NonFiniteError
from bench.method import Copy, Loss, Method
from bench.runtime import processes
from bench.runtime.stopping import STOP, Interrupted
from bench.sampling.noise import generator, seeded
from bench.sampling.trajectory import Batch, Trajectory
from bench.settings import OptimizerConfig, TrainConfig
from bench.training import checkpoint

CHECKPOINT_SECONDS = 120
log = logging.getLogger(__name__)
Record = dict[str, Any]  # one line of the update log


class Trainer:
    """Train `core.model` with `method`; resumable after any update, bitwise equal on a CPU with the same thread count.

    Resumed with other settings of `bench.settings.EXECUTION`, other batches for one, it is equal to rounding.

    A round samples `prompts_per_round × samples_per_prompt` trajectories; its updates train on one strided part each.
    Several processes share the rollout's parts (`sample_batch` rows) and an update's shards (`micro_batch` rows); every
    process holds the whole round, sees the same losses, and makes the same step.
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
        self.core, self.method, self.prompts, self.config = core, method, prompts, train
        self.clip, self.decay, self.checkpoints = optimizer.clip, optimizer.decay, folder / "checkpoints"
        self.learner = core.model if train.guidance is None else core.model.with_guidance(train.guidance)
        self.beta = core.beta
        self.prior_rewards: dict[str, float] = {}  # the mean of each prompt before training, where known; for the log
        with seeded(core.seed, "networks"):
            networks = method.networks(core.model)
        core.networks = {name: network.to(core.model.device) for name, network in networks.items()}
        optimizer.require_networks(core.networks)
        self.parameters = {"policy": list(core.model.adapters().values())}
        self.parameters |= {name: list(network.parameters()) for name, network in core.networks.items()}
        self.optimizers = {name: self._optimizer(name, optimizer) for name in self.parameters}
        ema = {} if train.ema is None else {"ema": Copy(lambda n: min((1 + n) / (10 + n), train.ema))}
        self.copies = ema | method.copies()
        start = {name: parameter.detach() for name, parameter in core.model.adapters().items()}
        core.copies |= {name: {key: value.clone() for key, value in start.items()} for name in self.copies}
        self.round, self.update, self.part = 0, 0, 0  # part: updates done in this round
        self.queue: list[Batch] = []

    def _optimizer(self, name: str, config: OptimizerConfig) -> torch.optim.Optimizer:
        own = config.networks.get(name)
        lr = own.lr if own and own.lr is not None else config.lr
        decay = own.weight_decay if own and own.weight_decay is not None else config.weight_decay
        return torch.optim.AdamW(self.parameters[name], lr, config.betas, config.eps, decay)

    # The loop -----------------------------------------------------------------------------------------------------

    def run(
        self,
        on_update: Callable[[Record], None],
        after_update: Callable[[int], None] = lambda update: None,
        save_at: Collection[int] = (),
    ) -> None:
        """Train until `updates`; `on_update` gets each update's log record, `after_update` then its number.

        Between the two a checkpoint is written: after every `checkpoint_every` rounds, after the updates `save_at`,
        after the last, every two minutes, and when a signal asks to stop. Raises NonFiniteError, and Interrupted after
        the update and the checkpoint of such a signal.
        """
        self._schedule()
        saved = time.monotonic()
        while self.update < self.config.updates:
            with STOP.deferred():
                record = self._next()
                on_update(record)
                late = time.monotonic() - saved > CHECKPOINT_SECONDS
                asked = processes.gather((STOP.number, late))  # all must agree, for a checkpoint is made by all
                signals = [number for number, _ in asked if number is not None]
                due = not self.part and self.round % self.config.checkpoint_every == 0
                due = due or self.update in {*save_at, self.config.updates} or asked[0][1]
                if due or signals:
                    self._save()
                    saved = time.monotonic()
            if signals:
                raise Interrupted(signals[0])
            after_update(self.update)

    def _next(self) -> Record:
        """The next update, after the round's sampling if it is the round's first."""
        while len(self.queue) <= self.config.data_lag:
            self.queue.append(self._sample(self.round + len(self.queue)))
        count = self.config.updates_per_round
        record = self._update(self.queue[0][self.part :: count])
        self.part += 1
        if self.part == count or self.update >= self.config.updates:
            self.queue.pop(0)
            self.round, self.part = self.round + 1, 0
            self._follow(self.round)
        self._schedule()
        return record

    def _save(self) -> None:
        with self.core.meter.phase("checkpoint"):
            state = self.state_dict()
            if processes.is_main():
                checkpoint.save(self.checkpoints, self.update, state)

    def _schedule(self) -> None:
        """Set β and the learning rates of the next update."""
        done = self.update / self.config.updates
        warmup = self.config.beta_warmup
        self.core.beta = self.beta * min(1.0, done / warmup) if warmup else self.beta
        factor = min(1.0, (1 - done) / self.decay) if self.decay else 1.0
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = factor * group.setdefault("initial_lr", group["lr"])

    def _follow(self, finished: int | None) -> None:
        """Move the copies whose time it is: after an update, or after a round, with the number of those finished."""
        adapters = self.core.model.adapters()
        for name, schedule in self.copies.items():
            if finished is None or schedule.rounds is None:
                due = finished is None and schedule.rounds is None
            else:
                due = finished % schedule.rounds == 0 and (schedule.until is None or finished <= schedule.until)
            if due:
                share = 1 - schedule.decay(self.update)
                for key, value in self.core.copies[name].items():
                    value.lerp_(adapters[key].detach(), share)

    def _sample(self, number: int) -> Batch:
        """The data of round `number`, sampled with the present weights."""
        batch = self.core.batch(self.names(number))
        needs = self.method.needs
        if not needs.trajectory:
            return batch

        def sample(part: Batch) -> dict[str, Tensor]:
            path = self.method.collect(self.core, part, number)
            kept = {name: getattr(path, name) for name in ("latents", "noisy", *needs.record)}
            return {name: value for name, value in kept.items() if value is not None}

        def score(part: Trajectory) -> dict[str, Tensor]:
            return self.core.rewards(part.latents[:, -1], part.prompts)

        with torch.no_grad(), self.core.meter.phase("rollout"):
            found = processes.map_parts(list(batch.split(self.core.sample_batch)), sample)
            data = Trajectory(batch.prompts, batch.samples, batch.conditioning, **found)
        if needs.rewards:
            with torch.no_grad(), self.core.meter.phase("reward"), self._stopping(data.prompts):
                data = replace(data, **processes.map_parts(list(data.split(self.core.micro_batch)), score))
                with processes.together():
                    self.core.check()
        if self.learner is not self.core.model:  # where guidance is an input of the network, the texts hold it
            data = replace(data, conditioning=self.learner.encode(data.prompts))
        with self._guided():
            return self.method.prepare(self.core, data)

    def names(self, number: int) -> list[tuple[str, int]]:
        """Sample names of a round: prompts go through a new permutation per pass, samples are numbered by round."""
        count, per = self.config.prompts_per_round, self.config.samples_per_prompt
        first = number * count
        places = [divmod(position, len(self.prompts)) for position in range(first, first + count)]
        orders = {
            epoch: generator(self.core.seed, "select", "prompts", step=epoch).permutation(len(self.prompts))
            for epoch in {epoch for epoch, _ in places}
        }
        chosen = [(self.prompts[orders[epoch][place]], epoch) for epoch, place in places]
        return [(prompt, epoch * per + i) for prompt, epoch in chosen for i in range(per)]

    def _update(self, data: Batch) -> Record:
        meter = self.core.meter
        shards = [data] if self.method.needs.whole_update else list(data.split(self.core.micro_batch))
        tally = _Tally()
        with self._stopping(data.prompts):
            with processes.together():
                for shard in processes.shared(shards):
                    self._backward(shard, len(data), tally)
            with meter.phase("optimizer"):
                scalars = self._gradient_norms()
                if isinstance(data, Trajectory) and data.rewards is not None:
                    scalars["reward"] = data.rewards.mean()
                with processes.together():
                    self.core.check()
                    sums, scalars = tally.read(scalars)
                self._step(scalars)
        self.update += 1
        self._follow(None)
        record: Record = {}
        everyone = processes.gather(sums)
        for name in dict.fromkeys(name for own in everyone for name in own):
            amounts, rows = zip(*(own.get(name, (0.0, 0)) for own in everyone), strict=True)
            if name == "loss":
                record[name] = sum(amounts) / len(data)
            elif sum(rows):
                record[name] = sum(amounts) / sum(rows)
        found = record | scalars
        if "reward" in found and self.prior_rewards.keys() >= set(data.prompts):
            before = sum(self.prior_rewards[prompt] for prompt in data.prompts) / len(data)
            record["reward_over_prior"] = found["reward"] - before
        counts = meter.total()
        seconds = {f"seconds/{phase}": value for phase, value in counts.pop("seconds").items()}
        return {"update": self.update, "round": self.round, **record, **scalars, **counts, **seconds}

    def _backward(self, shard: Batch, whole: int, tally: "_Tally") -> None:
        """Backward through a shard's losses over the size of the whole update."""
        meter = self.core.meter
        with self._guided():
            losses = self.method.losses(self.core, shard)
            while True:
                with meter.phase("losses"):
                    loss = next(losses, None)
                if loss is None:
                    return
                with meter.phase("backward"):
                    (loss.values.sum() / whole).backward()
                tally.add(loss, shard.prompts)

    @contextmanager
    def _guided(self) -> Iterator[None]:
        """Inside the block the core's model has the losses' guidance."""
        sampling, self.core.model = self.core.model, self.learner
        try:
            yield
        finally:
            self.core.model = sampling

    def _gradient_norms(self) -> dict[str, Tensor]:
        """Sum the gradients over the processes and clip them; their norms before that, still on the device."""
        largest, norms = math.inf if self.clip is None else self.clip, {}
        for name, parameters in self.parameters.items():
            _add_gradients(parameters)
            norms[f"gradient_norm/{name}"] = torch.nn.utils.clip_grad_norm_(parameters, largest)
        return norms

    def _step(self, scalars: dict[str, float]) -> None:
        for name in self.parameters:
            if not math.isfinite(scalars[f"gradient_norm/{name}"]):
                raise NonFiniteError(f"the gradient of {name!r} is not finite")
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _stopping(self, prompts: list[str]) -> Iterator[None]:
        """Add to a NonFiniteError where training stands, what is safe, and where to look; prompts: those in flight."""
        try:
            yield
        except NonFiniteError as error:
            last = checkpoint.newest(self.checkpoints)
            raise NonFiniteError(
                f"update {self.update + 1} stopped: {error}. Last good checkpoint: {last or 'none'}; nothing was "
                f"overwritten. {self.core.cause(prompts)}"
            ) from error

    # State --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on; noise and choices are named, so there is no RNG state."""
        return {
            "round": self.round,
            "update": self.update,
            "part": self.part,
            "parameters": {name: [p.detach() for p in group] for name, group in self.parameters.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "copies": self.core.copies,
            "method": self.method.state_dict(),
            # without the conditioning, which the prompts give again
            "queue": [
                {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "conditioning"}
                for batch in self.queue
            ],
            "meter": self.core.meter.total(),
            "threads": torch.get_num_threads(),
        }

    def resume(self) -> bool:
        """Go on from the newest intact checkpoint; False if there is none."""
        state = checkpoint.load(self.checkpoints)
        if state is None:
            return False
        if state["threads"] != torch.get_num_threads():
            log.warning(
                "resuming with %d CPU threads what was begun with %d: results agree, but not to the last bit",
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
        for name, group in self.parameters.items():
            for parameter, stored in zip(group, state["parameters"][name], strict=True):
                parameter.data.copy_(stored)
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        for name, stored in state["copies"].items():
            self.core.copies[name] = {key: value.to(self.core.model.device) for key, value in stored.items()}
        self.method.load_state_dict(state["method"])
        if processes.is_main():  # the stored counts are those of all processes
            self.core.meter.restore(state["meter"])
        self.round, self.update, self.part = state["round"], state["update"], state.get("part", 0)
        device = self.core.model.device
        for stored in state["queue"]:
            moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in stored.items()}
            moved["conditioning"] = self.core.model.encode(stored["prompts"])
            self.queue.append((Trajectory if "latents" in moved else Batch)(**moved))


class _Tally:
    """What is logged of an update: summed on the device, in float64, and read once."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.finite: list[tuple[Tensor, list[str]]] = []

    def add(self, loss: Loss, prompts: list[str]) -> None:
        """Count a micro-loss of trajectories with these prompts."""
        self.finite.append((torch.isfinite(loss.values).all(), prompts))
        for name, value in ({"loss": loss.values} | loss.metrics).items():
            amount = value.detach().sum().double()
            self.sums[name] = self.sums[name] + amount if name in self.sums else amount
            self.rows[name] = self.rows.get(name, 0) + value.numel()

    def read(self, scalars: dict[str, Tensor]) -> tuple[dict[str, tuple[float, int]], dict[str, float]]:
        """Sums and rows by name, and further scalars. Raises NonFiniteError, with its prompts, for a bad loss."""
        flags = [finite for finite, _ in self.finite]
        tensors = [*flags, *self.sums.values(), *scalars.values()]
        device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
        found = torch.stack([tensor.to(device, torch.float64) for tensor in tensors]).tolist()
        bad = {p for ok, (_, prompts) in zip(found, self.finite, strict=False) if not ok for p in prompts}
        if bad:
            raise NonFiniteError(f"the loss is not finite; its prompts: {sorted(bad)[:5]}")
        numbers = iter(found[len(flags) :])
        return {n: (next(numbers), self.rows[n]) for n in self.sums}, {n: next(numbers) for n in scalars}


def _add_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients over the processes as one flat vector, zeros where a process has none.

    A gradient that no process has stays None, for the optimiser treats that differently from zero.
    """
    if processes.count() == 1:
        return
    present = processes.add(torch.tensor([int(p.grad is not None) for p in parameters]))
    used = [p for p, number in zip(parameters, present.tolist(), strict=True) if number]
    if not used:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in used])
    for p, total in zip(used, processes.add(flat).split([p.numel() for p in used]), strict=True):
        p.grad = total.view_as(p).clone()
