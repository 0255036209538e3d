"""The trainer: schedules, resuming, stopping."""

from pathlib import Path

import pytest
import torch
from bench.methods.policy_gradient.ddpo import DDPO, DDPOConfig
from scaffold import PROMPTS, Brightness, pipeline_model, small_method, trainer_of
from torch import Tensor

from bench.core import Core
from bench.errors import NonFiniteError
from bench.options import Config
from bench.sampling.grids import ddim_kernel
from bench.settings import OptimizerConfig, TrainConfig
from bench.training import checkpoint
from bench.training.trainer import Record, Trainer


def test_schedules_of_beta_and_learning_rate(core, tmp_path):
    """β rises linearly over the first half of eight updates, the learning rate falls over the last half."""
    method = small_method("draft_1")
    train = TrainConfig(updates=8, prompts_per_round=2, samples_per_prompt=1, beta_warmup=0.5, checkpoint_every=1)
    seen = []

    def note(record: Record) -> None:
        rate = trainer.optimizers["policy"].param_groups[0]["lr"]
        seen.append((record["update"], trainer.beta / 10, rate / 1e-2))
        if record["update"] == 4 and not resumed:
            raise Interrupted

    for resumed in (False, True):
        trainer = Trainer(core, method, PROMPTS, train, OptimizerConfig(lr=1e-2, decay=0.5), tmp_path)
        assert trainer.resume() == resumed
        if resumed:
            trainer.run(note)
        else:
            with pytest.raises(Interrupted):
                trainer.run(note)
    assert [number for number, _, _ in seen] == [1, 2, 3, 4, 3, 4, 5, 6, 7, 8]
    for number, next_beta, rate in seen:
        assert next_beta == pytest.approx(min(1, number / 4))
        assert rate == pytest.approx(min(1, 2 * (1 - (number - 1) / 8)))


class Interrupted(Exception):
    """Stands for a kill at an arbitrary update."""


def fresh(name: str, pipeline: Path, folder: Path, reward: Brightness | None = None, updates: int = 6) -> Trainer:
    """New objects throughout, as in a new process."""
    model = pipeline_model(pipeline)
    kernel = ddim_kernel(model.spec.alphas_cumprod, 3, eta=1.0, steps_offset=1, final_alpha=model.spec.final_alpha)
    method = DDPO(DDPOConfig(buffer=6, minimum=2)) if name == "ddpo" else small_method(name)
    core = Core(model, kernel, reward or Brightness(Config()), beta=10.0, micro_batch=4, sample_batch=4)
    return trainer_of(core, method, folder, updates)


def comparable(record: Record) -> Record:
    return {key: v for key, v in record.items() if not key.startswith("seconds") and key != "peak_memory"}


def all_tensors(state: object) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for value in values for tensor in all_tensors(value)]


@pytest.mark.parametrize("name", ["nabla_gfn", "ddpo"])
def test_a_killed_run_resumes_bitwise(name, pipeline_folder, tmp_path):
    straight, records = fresh(name, pipeline_folder, tmp_path / "straight"), []
    straight.run(records.append)
    assert [record["update"] for record in records] == [1, 2, 3, 4, 5, 6]

    def killed(record: Record) -> None:
        if record["update"] == 3:  # in the middle of round 1
            raise Interrupted

    torch.rand(7)  # global random state is nothing to either run
    with pytest.raises(Interrupted):
        fresh(name, pipeline_folder, tmp_path / "killed").run(killed)
    resumed, later = fresh(name, pipeline_folder, tmp_path / "killed"), []
    assert resumed.resume()
    assert (resumed.update, resumed.round, len(resumed.queue)) == (2, 1, straight.config.data_lag)
    resumed.run(later.append)
    assert [comparable(record) for record in later] == [comparable(record) for record in records[2:]]
    ours, theirs = resumed.state_dict(), straight.state_dict()
    assert str(ours["method"]) == str(theirs["method"])  # names and counts; its tensors follow
    assert bool(ours["method"]) == (name == "ddpo")
    for part in ("parameters", "optimizers", "queue", "method"):
        pairs = list(zip(all_tensors(ours[part]), all_tensors(theirs[part]), strict=True))
        assert all(torch.equal(x, y) for x, y in pairs)
        assert pairs or (part == "queue" and not straight.config.data_lag) or (part, name) == ("method", "nabla_gfn")


def test_a_resumed_round_has_the_conditioning_of_the_losses(pipeline_folder, tmp_path):
    """Where guidance is an input of the network it is part of it, and losses may have one of their own."""

    def killed(record: Record) -> None:
        if record["update"] == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        fresh("ddpo", pipeline_folder, tmp_path).run(killed, save_at=[1])  # in the middle of a round
    resumed = fresh("ddpo", pipeline_folder, tmp_path)
    resumed.loss_model = resumed.core.model.with_guidance(1.0)
    asked = []
    resumed.loss_model.encode = lambda prompts: asked.append(prompts) or resumed.core.model.encode(prompts)
    assert resumed.resume()
    assert resumed.queue and asked == [batch.prompts for batch in resumed.queue]


def test_a_truncated_checkpoint_is_passed_over(pipeline_folder, tmp_path, caplog):
    fresh("draft_1", pipeline_folder, tmp_path, updates=4).run(lambda record: None)
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest.name.startswith("update-0000004")
    newest.write_bytes(newest.read_bytes()[:-1000])
    resumed = fresh("draft_1", pipeline_folder, tmp_path)
    assert resumed.resume()
    assert resumed.update == 2
    assert newest.name in caplog.text
    assert "damaged" in caplog.text


class Failing(Brightness):
    """Not a number for one prompt."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        bad = torch.tensor([prompt == "dog" for prompt in prompts])
        return super().__call__(images, prompts).masked_fill(bad, float("nan"))


@pytest.mark.parametrize("name", ["nabla_gfn", "ddpo"])
def test_a_reward_that_is_not_a_number_stops_the_run(name, pipeline_folder, tmp_path):
    fresh(name, pipeline_folder, tmp_path, updates=2).run(lambda record: None)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    trainer = fresh(name, pipeline_folder, tmp_path, reward=Failing(Config()))
    assert trainer.resume()
    with pytest.raises(NonFiniteError) as caught:
        trainer.run(lambda record: None)
    message = str(caught.value)
    assert "'dog'" in message
    assert f"update {trainer.update + 1} stopped" in message
    assert trainer.update >= 2
    assert str(checkpoint.newest(tmp_path / "checkpoints")) in message
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after.items() >= before.items()
    weights = all_tensors(checkpoint.load(tmp_path / "checkpoints")["parameters"])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights)
