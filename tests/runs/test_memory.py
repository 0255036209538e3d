"""Memory: what a loss holds, and when it runs out one sentence with the way out, and the run that goes on with less."""

import re
import weakref
from dataclasses import replace

import pytest
import torch
import yaml
from bench.methods.nabla.published import NablaGFNPublished
from bench.methods.nabla.residual import NablaGFN
from bench.rewards.colorfulness import Colorfulness
from safetensors.torch import load_file
from scaffold import trainer_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.config import resolve
from bench.diagnose.selftest.scaffold import perturb
from bench.errors import OutOfMemoryError
from bench.evaluation import evaluator, features
from bench.models.lora import LORA_FILE
from bench.models.stable_diffusion import StableDiffusion
from bench.runs import estimate
from bench.runs.out_of_memory import remedies
from bench.runtime import memory
from bench.training import checkpoint

pytestmark = pytest.mark.usefixtures("undrawn")

CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB"


class Alive(TorchDispatchMode):
    """Bytes of the tensors made under it that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return found


def fail(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError(CUDA)


class Backward(torch.autograd.Function):
    """The identity; memory runs out in its backward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    backward = staticmethod(fail)


class Cut:
    """`place(…)` runs as ever `after` times, then fails."""

    def __init__(self, whole, after, failing=fail):
        self.whole, self.left, self.failing = whole, after, failing

    def __get__(self, owner, kind):
        return self if owner is None else lambda *args, **options: self(owner, *args, **options)

    def __call__(self, *args, **options):
        self.left -= 1
        return (self.whole if self.left >= 0 else self.failing)(*args, **options)


@pytest.fixture
def attempt(bench, pipeline_folder, tmp_path, monkeypatch):
    """`attempt(method, *options)`: a run of two rounds on the random pipeline → (exit status, text, folder)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("cat\ndog\nred bird\nfish\nbear\napple\n")

    def call(method: str, *options: str, folder: str = "run"):
        settings = [
            "train.prompts_per_round=2", "train.samples_per_prompt=2", "train.updates_per_round=1", "sampler.steps=3",
            "train.checkpoint_every=1", "train.micro_batch=4", "train.sample_batch=4",
            "evaluation.samples_per_prompt=2", "evaluation.train_prompts=2", "evaluation.test_prompts=1",
            "evaluation.metrics=[reward]", "evaluation.at=[]", *options,
        ]  # fmt: skip
        out = tmp_path / folder
        status, text = bench(
            "run", "--method", method, "--reward", "colorfulness", "--model", pipeline_folder, "--updates", 2, "--out",
            out, "--prompts", tmp_path / "prompts.txt", *(word for one in settings for word in ("--set", one)),
        )  # fmt: skip
        return status, text, out

    return call


def backwards(self, images, prompts):
    return Backward.apply(images).flatten(1).mean(1)


def learns(self, z, *_, **__):
    return Backward.apply(z + sum(parameter.sum() for parameter in self.adapters().values()))


PLACES = {  # phase: method, what fails, how many calls of it go well, how it fails, what is to be lowered
    # before training, 6 samples of the prior in two parts: 3 steps, a decode and a reward each
    # a round of ddpo: 3 steps of a rollout, one decode and one reward, then 8 transitions in two micro-batches
    "rollout": ("ddpo", (StableDiffusion, "predict"), 6 + 6, fail, "sample_batch=2"),
    "losses": ("ddpo", (StableDiffusion, "predict"), 6 + 5 + 3, fail, "micro_batch=2"),
    "reward/decode": ("ddpo", (StableDiffusion, "decode"), 2 + 1, fail, "micro_batch=2"),
    "reward": ("ddpo", (Colorfulness, "__call__"), 2 + 1, fail, "micro_batch=2"),
    "backward": ("draft_1", (StableDiffusion, "predict"), 6 + 3 + 2, learns, "micro_batch=2"),
    "losses/reward/decode": ("draft_1", (StableDiffusion, "decode"), 2 + 1, fail, "micro_batch=2"),
    "losses/backward": ("nabla_gfn", (Colorfulness, "__call__"), 2 + 3, backwards, "micro_batch=2"),
    "optimizer": ("ddpo", (torch.optim.AdamW, "step"), 1, fail, None),
    "evaluation/rollout": ("prior", (StableDiffusion, "predict"), 0, fail, "sample_batch=2"),
    "evaluation/decode": ("prior", (StableDiffusion, "decode"), 0, fail, "sample_batch=2"),
    "evaluation/reward": ("prior", (Colorfulness, "__call__"), 0, fail, "micro_batch=2"),
    "evaluation/features": ("prior", (features, "as_seen"), 0, fail, "micro_batch=2"),
    "loading": ("prior", (evaluator, "load_reward"), 0, fail, None),
}


SHORT = ("rollout", "losses", "backward", "losses/reward/decode", "optimizer", "evaluation/rollout", "loading")


@pytest.mark.parametrize("phase", [pytest.param(p, marks=() if p in SHORT else pytest.mark.slow) for p in PLACES])
def test_one_sentence_says_the_phase_and_what_to_lower(attempt, monkeypatch, phase):
    method, (owner, name), after, failing, lower = PLACES[phase]
    cut = Cut(getattr(owner, name), after, failing)
    monkeypatch.setattr(owner, name, cut)
    options = ["evaluation.metrics=[fid_prior]", "evaluation.rewards=[]"] if phase == "evaluation/features" else []
    options += ["evaluation.rewards=[jpeg_compressibility]"] if phase == "loading" else []
    options += ["method.channels=[32,32]", "method.fraction=1"] if method == "nabla_gfn" else []
    options += [] if lower else ["model.offload=true"]
    status, text, folder = attempt(method, *options)
    assert status == 2
    assert "Traceback" not in text
    assert f"out of memory (2.50 GiB asked for) in {phase};" in text
    for fact in ("train.micro_batch = 4, train.sample_batch = 4", "model.checkpointing = false", "latents 4×8×8",
                 "estimated 0.0 GiB (weights"):  # fmt: skip
        assert fact in text
    assert re.search(r"[\d.]+ of [\d.]+ GiB free on cpu", text)
    last = checkpoint.newest(folder / "checkpoints")
    assert (last is not None) == (method != "prior")
    if lower:
        assert f"--set train.{lower}" in text
        assert (f"resumes from the last checkpoint, {last}," if last else "no checkpoint yet") in text
    else:
        assert "No setting is left" in text
        assert f"Last good checkpoint: {last or 'none'}" in text
    assert CUDA in (folder / "error.log").read_text()


def test_a_failing_estimate_does_not_hide_the_error(attempt, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "decode", Cut(StableDiffusion.decode, 2))
    monkeypatch.setattr(estimate, "blueprint", fail)
    monkeypatch.setattr("bench.runs.out_of_memory.blueprint", fail)
    status, text, _ = attempt("ddpo")
    assert status == 2
    assert "in reward/decode; train.micro_batch = 4" in text
    assert "estimated" not in text


def test_which_errors_say_that_memory_ran_out():
    told = pytest.raises(OutOfMemoryError, match=r"out of memory \(931322\.57 GiB asked for\)")
    with told as caught, memory.phase("evaluation"), memory.phase("decode"), memory.phase("decode"):
        torch.empty(10**15, dtype=torch.uint8)
    assert caught.value.phases == ("evaluation", "decode")
    for words in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"):
        with pytest.raises(OutOfMemoryError), memory.phase("losses"):
            raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="shape"), memory.phase("losses"):
        raise RuntimeError("a wrong shape")


@pytest.mark.parametrize(
    ("phases", "settings", "expected"),
    [
        (("backward",), ["train.micro_batch=6"], ["train.micro_batch=3", "model.checkpointing=true"]),
        (("backward",), ["train.micro_batch=1"], ["model.checkpointing=true"]),
        (("losses", "reward", "decode"), ["train.micro_batch=1", "model.checkpointing=true"], []),
        (("evaluation", "decode"), ["train.sample_batch=8"], ["train.sample_batch=4", "model.vae_slicing=true"]),
        (("evaluation", "decode"), ["train.sample_batch=8", "model.vae_slicing=true"], ["train.sample_batch=4"]),
        (("evaluation", "rollout", "reward", "decode"), ["train.micro_batch=1"], []),
        (("optimizer",), [], []),
    ],
)
def test_what_is_left_to_lower(phases, settings, expected):
    assert remedies(phases, resolve("ddpo", assignments=settings)) == expected


@pytest.mark.parametrize("phases", [("loading",), ("evaluation", "rollout"), ("optimizer",)])
def test_a_model_that_does_not_ship_can_do_without_its_text_encoders(phases):
    settings = ["train.micro_batch=1", "train.sample_batch=1"]
    assert remedies(phases, resolve("ddpo", reward="hps", assignments=settings)) == ["model.offload=true"]


def test_an_analytic_model_has_batches_alone():
    assert remedies(("losses",), resolve("rtb", overrides={"model.name": "ring"})) == ["train.micro_batch=2048"]


def test_the_smaller_setting_resumes_the_same_run(bench, tiny_run, pipeline_folder, tmp_path, monkeypatch):
    """Memory runs out in the third update; with half the micro-batch the run ends where it would have ended."""
    options = ("--set", "train.updates_per_round=1", "--set", "train.micro_batch=4")
    straight = load_file(tiny_run("draft_1", *options, updates=4, folder="straight") / "adapter" / LORA_FILE)
    whole, calls = Colorfulness.__call__, []

    def short_of_memory(self, images, prompts):
        calls.append(len(images))
        if len(images) > 2 and len(calls) > 4:  # two are of the prior's samples, before training
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, images, prompts)

    monkeypatch.setattr(Colorfulness, "__call__", short_of_memory)
    with pytest.raises(AssertionError, match=r"reward.*--set train.micro_batch=2.*resumes.*update-0000002"):
        tiny_run("draft_1", *options, updates=4)
    folder = tiny_run("draft_1", *options, "--set", "train.micro_batch=2", updates=4)
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["micro_batch"] == 2
    resumed = load_file(folder / "adapter" / LORA_FILE)
    assert max(calls[5:]) == 2
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method_class", [NablaGFN, NablaGFNPublished])
def test_a_loss_of_nabla_holds_no_other_graph_than_the_policys(method_class, core, tmp_path, monkeypatch):
    method = method_class(method_class.Config(channels=[16, 16], fraction=1, trust=0.0))
    trainer = trainer_of(core, method, tmp_path)
    perturb(core.model)
    data, core.model.decoder_batch = trainer.sample_round(0), 1
    core = replace(core, micro_batch=64)
    (part,) = data.transitions(core.choose_steps(data, 1), 64)
    weight = torch.zeros(1, requires_grad=True)
    monkeypatch.setitem(
        vars(core), "network", lambda name, z, k, conditioning: weight * z
    )  # the real one is as large here
    z, peaks = part.z.detach().requires_grad_(method_class is NablaGFNPublished), []
    for work in (lambda: core.predict(z, part.k, part.conditioning), lambda: method.transition_losses(core, part)):
        with Alive() as alive:
            work()
        peaks.append(alive.peak)
    assert peaks[1] < 1.3 * peaks[0]
