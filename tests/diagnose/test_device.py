"""Everything that touches tensors, on a device that keeps CUDA's rules (see bench/diagnose/selftest/device.py)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scaffold import Brightness, by_family, pipeline_model

from bench import config as configs
from bench import registry
from bench.core import Core
from bench.diagnose.selftest.device import device, recording
from bench.diagnose.selftest.scaffold import perturb
from bench.evaluation.evaluator import Evaluator
from bench.evaluation.features import find_space
from bench.evaluation.scores import load_reward
from bench.options import Config
from bench.prompts import split
from bench.runs.build import build_method
from bench.sampling.grids import ddim_kernel
from bench.training.trainer import Trainer

PROMPTS = ["cat", "dog"]
STEPS = 3
TRAINED = [name for name in registry.BUILT_IN["methods"] if registry.load("methods", name).needs.training]
TWO_ROLLOUTS = {"tempflow_grpo", "flash_grpo"}  # a path, and the paths that branch from it


def core_on_device(folder: Path, **options: object) -> Core:
    options = {"device": device()} | options
    model = pipeline_model(folder, **options)
    kernel = ddim_kernel(model.spec.alphas_cumprod, STEPS, eta=1.0, steps_offset=1, final_alpha=model.spec.final_alpha)
    reward, sizes = Brightness(Config(), options["device"]), {"micro_batch": 8, "sample_batch": 8}
    return Core(model, kernel, reward, beta=10.0, teacher_model=(model, kernel.to(options["device"])), **sizes)


def trainer_of(name: str, core: Core, folder: Path, updates: int = 2) -> Trainer:
    small = ["train.prompts_per_round=2", "train.samples_per_prompt=2", "train.updates_per_round=1", "train.data_lag=0"]
    if "channels" in registry.load("methods", name).Config.model_fields:
        small.append("method.channels=[32,32]")
    settings = [*small, f"train.updates={updates}", "train.checkpoint_every=1"]
    config = configs.resolve(name, reward="colorfulness", suite="emoji", assignments=settings)
    return Trainer(core, build_method(config), PROMPTS, config.train, config.optimizer, folder)


def test_the_device_keeps_the_rules():
    x, mask = torch.zeros(3, device=device()), torch.tensor([True, False, True])
    with recording() as ledger:
        assert (x + torch.tensor(2.0)).device == x.device  # a number of the host may enter arithmetic
        for illegal in (
            lambda: x + torch.ones(3),
            lambda: x.masked_fill(mask, 0.0),
            lambda: torch.where(mask, x, x),
            lambda: torch.cat([x, torch.zeros(1)]),
            lambda: torch.ones(3)[torch.zeros(2, dtype=torch.long, device=device())],
            lambda: torch.nn.Linear(3, 3)(x),
            lambda: torch.randn(3, device=device(), generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError, match=r"same device|device type for generator"):
                illegal()
        with pytest.raises((TypeError, RuntimeError)):
            x.numpy()
        assert not ledger.synchronisations
        for reads in (lambda: float(x[0]), lambda: bool(x.any()), x.tolist, x.cpu, lambda: x[x > 0], x.nonzero):
            before = ledger.synchronisations.total()
            reads()
            assert ledger.synchronisations.total() == before + 1
        x[mask.nonzero().flatten()]
        torch.zeros(2).to(device())
        torch.tensor([1.0], device=device())
        assert ledger.waits.total() == ledger.uploads.total() == 3
        torch.zeros(2).to(device(), non_blocking=True)
        assert (ledger.waits.total(), ledger.uploads.total()) == (3, 4)
        y, z = x.new_zeros(2, 3), torch.arange(6.0).view(2, 3)
        for key in ([1, 0], (slice(None), [0, 2]), range(2), ([[0], [1]], [0, 2]), []):  # a list goes there too
            y[key] = 1.0
            assert torch.equal(z.to(device())[key].cpu(), z[key])
        assert y.cpu().all()
        assert ledger.waits.total() == 3 + 5 + 12
    assert all(place.startswith("tests/diagnose/test_device.py:") for place in ledger.uploads)


@pytest.mark.parametrize(
    "name",
    by_family(TRAINED, "nabla_gfn_adjoint", "rtb_softmax", "refl"),
)
def test_methods_wait_once_an_update_and_never_in_a_rollout(name, pipeline_folder, tmp_path):
    with recording():
        core = core_on_device(pipeline_folder)
        trainer = trainer_of(name, core, tmp_path)
        trainer.train_on(trainer.sample_round(0))  # the first round encodes the prompts
        yielded = 0
        losses = trainer.method.losses

        def counted(*arguments):
            nonlocal yielded
            for loss in losses(*arguments):
                yielded += 1
                yield loss

        trainer.method.losses = counted
        with recording() as sampling:
            data = trainer.sample_round(1)
        with recording() as updating:
            trainer.train_on(data)
    needs = trainer.method.needs
    assert yielded
    assert updating.synchronisations.total() <= yielded + 1, updating.describe()
    assert sampling.synchronisations.total() <= 2 * needs.rewards, sampling.describe()  # once a round, for the rewards
    if name == "gardo":  # its features of the samples copy and wait as an evaluation does
        return
    if needs.trajectory:
        noise = (STEPS + 1) * (2 if name in TWO_ROLLOUTS else 1)
        normalised = sampling.uploads.total() - noise  # prompts to group by, or their means
        assert normalised in (0, 1), dict(sampling.uploads)
    assert not sampling.waits, sampling.describe()


def test_a_rollout_step_copies_its_noise_and_waits_for_nothing(pipeline_folder):
    with recording():
        core = core_on_device(pipeline_folder)
        batch = core.batch([(prompt, i) for prompt in PROMPTS for i in range(2)])
        core.rollout(batch)
        with recording() as ledger:
            core.rollout(batch, record=frozenset({"model_output", "prior_output", "log_prob"}))
    assert (ledger.synchronisations.total(), ledger.waits.total()) == (0, 0), ledger.describe()
    assert ledger.uploads.total() == STEPS + 1


def test_a_planted_mask_of_the_host_is_found(pipeline_folder, tmp_path):
    with recording():
        core = core_on_device(pipeline_folder)
        trainer = trainer_of("ddpo", core, tmp_path)
        honest = trainer.method.losses

        def planted(core, data):
            for loss in honest(core, data):
                mask = torch.arange(len(loss.values)) % 2 == 0  # forgot the device
                yield replace(loss, values=loss.values.masked_fill(mask, 0))

        data = trainer.sample_round(0)
        trainer.method.losses = planted
        with pytest.raises(RuntimeError, match=r"same device.*tests/diagnose/test_device.py"):
            trainer.train_on(data)


@pytest.mark.parametrize(
    "options", [{"checkpointing": True, "vae_slicing": True}, {"dtype": "bfloat16", "offload": True}], ids=" and ".join
)
def test_options_of_the_model(options, pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with recording():
        core = core_on_device(pipeline_folder, **options)
        trainer = trainer_of("nabla_gfn", core, tmp_path)
        trainer.run(lambda record: None)
    assert trainer.update == 2
    assert all(p.dtype == torch.float32 and p.device == device() for p in core.model.adapters().values())


def test_v_prediction(pipeline_folder, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    with recording():
        core = core_on_device(folder)
        batch = core.batch([("cat", 0), ("dog", 0)])
        core.rollout(batch)
        with recording() as ledger:
            core.rollout(batch)
        trainer_of("nabla_gfn", core, tmp_path).run(lambda record: None)
    assert (ledger.synchronisations.total(), ledger.waits.total()) == (0, 0), ledger.describe()


def test_training_saves_and_resumes(pipeline_folder, tmp_path):
    found = []
    for stops in ((2,), (1, 2)):
        for stop in stops:
            with recording():
                core = core_on_device(pipeline_folder)
                trainer = trainer_of("nabla_gfn", core, tmp_path / str(len(stops)), stop)
                trainer.resume()
                trainer.run(lambda record: None)
        core.model.save(tmp_path / "adapter")
        core.model.load(tmp_path / "adapter")
        found.append([p.detach().cpu() for p in core.model.adapters().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("space", ["efficientnet_lite0", "clip_vitl14"])
def test_feature_spaces(space, hub):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = find_space(space)()(images)
    with recording():
        found = find_space(space)(device())(images.to(device()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_evaluation_equals_that_of_the_cpu(pipeline_folder, tmp_path):
    measured = []
    for place in ("cpu", device()):
        settings = ["evaluation.samples_per_prompt=3", "evaluation.train_prompts=2", "evaluation.test_prompts=1"]
        config = configs.resolve(
            "nabla_gfn",
            reward="colorfulness",
            overrides={"model.name": str(pipeline_folder), "evaluation.rewards": ["jpeg_compressibility"]},
            assignments=settings,
        )
        with recording():
            core = core_on_device(pipeline_folder, device=place)
            core = replace(core, reward_model=load_reward("colorfulness", device=place))
            perturb(core.model)
            prompts = split("test", ["cat", "dog", "red bird", "fish", "bear", "apple"])
            _, found = Evaluator(core, config, prompts, tmp_path / str(place)).evaluate()
        measured.append({one.name: one.value for one in found if one.value is not None})
    assert measured[0].keys() == measured[1].keys()
    for name, value in measured[0].items():
        assert measured[1][name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
