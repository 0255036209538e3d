"""On a GPU: the same numbers as on the CPU, and no waiting. And `bench doctor --gpu`, tried on the CPU."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console
from scaffold import pipeline_model

from bench import Batch, Core, Loss, Method, Needs, registry
from bench.diagnose.gpu_steps import EXACT, relative, two_processes
from bench.diagnose.profile import stand_ins
from bench.diagnose.selftest.scaffold import perturb
from bench.hub import Repository
from bench.models.precision import use_precision
from bench.models.random_weights import WRITERS
from bench.models.stable_diffusion import StableDiffusion
from bench.reporting.rows import read_rows
from bench.runs.log import read_log
from bench.sampling.grids import ddim_kernel
from bench.sampling.noise import Noise
from bench.sampling.trajectory import RECORDS, Trajectory, rollout
from bench.training import checkpoint

NAMES = [("cat", 0), ("dog", 1), ("red bird", 0)]


@pytest.fixture
def cuda() -> torch.device:
    """A GPU, or the test is skipped."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


def sampled(folder, device: torch.device | str, **options) -> tuple[StableDiffusion, Batch]:
    """The random pipeline on a device, its policy moved off the prior, and a batch."""
    model = pipeline_model(folder, device=device, **options)
    perturb(model)
    return model, Batch([p for p, _ in NAMES], NAMES, model.encode([p for p, _ in NAMES]))


def paths(model: StableDiffusion, batch: Batch) -> Trajectory:
    kernel = ddim_kernel(model.spec.alphas_cumprod, 5, final_alpha=model.spec.final_alpha).to(model.device)
    with torch.no_grad():
        return rollout(model, kernel, batch, Noise(0, "train", batch.samples), record=RECORDS)


@pytest.mark.gpu
def test_rollouts_are_those_of_the_cpu(cuda, pipeline_folder):
    use_precision(EXACT, cuda)
    ours, theirs = (paths(*sampled(pipeline_folder, device)) for device in (cuda, "cpu"))
    for name in ("latents", "model_output", "prior_output", "log_prob"):
        assert relative(getattr(ours, name), getattr(theirs, name)) < 1e-4, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rollout_does_not_wait_for_the_device(cuda, pipeline_folder, dtype):
    model, batch = sampled(pipeline_folder, cuda, dtype=dtype)
    kernel = ddim_kernel(model.spec.alphas_cumprod, 5, final_alpha=model.spec.final_alpha).to(cuda)
    with torch.no_grad():
        for mode in ("default", "error"):  # the first call loads kernels and encodes the empty prompt
            torch.cuda.set_sync_debug_mode(mode)
            try:
                rollout(model, kernel, batch, Noise(0, "train", batch.samples), record=RECORDS)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_a_rollout_asks_nothing_of_the_device(pipeline_folder):
    """A tensor of the meta device has no values, so whoever wants to see one is found."""
    model, batch = sampled(pipeline_folder, "cpu")
    model.unconditional()
    model.device = torch.device("meta")
    model.network.to(model.device)
    model._texts = {prompt: text.to(model.device) for prompt, text in model._texts.items()}
    found = paths(model, Batch(batch.prompts, batch.samples, batch.conditioning.to(model.device)))
    assert found.latents.is_meta
    assert found.log_prob.shape == (3, 5)


@contextmanager
def interrupted_after(monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[None]:
    """Ctrl-C when the so-manieth checkpoint has been written."""
    save, saved = checkpoint.save, []

    def saving(*arguments):
        saved.append(save(*arguments))
        if len(saved) == count:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", saving)
        with pytest.raises(AssertionError, match="assert 130 == 0"):
            yield


@pytest.mark.gpu
def test_a_run_is_resumed(cuda, tiny_run, monkeypatch):
    straight = read_log(tiny_run("nabla_gfn", updates=6, folder="straight"))
    with interrupted_after(monkeypatch, 2):
        tiny_run("nabla_gfn", updates=6, folder="cut")
    resumed = read_log(tiny_run("nabla_gfn", updates=6, folder="cut"))
    assert len(straight) == len(resumed) == 6
    for name in ("loss", "reward"):
        assert relative(torch.tensor(resumed[name]), torch.tensor(straight[name])) < 1e-2, name


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["nabla_gfn", "ddpo", "draft_1"])
def test_a_run_in_bfloat16(cuda, tiny_run, method):
    folder = tiny_run(method, "--set", "model.dtype=bfloat16")
    rows = read_rows(folder / "rows.parquet").set_index("metric")
    assert "failed" not in set(rows["status"])
    assert torch.isfinite(torch.tensor(read_log(folder)["loss"])).all()
    assert rows.loc["path_kl", "value"] >= 0


@pytest.mark.gpu
def test_doctor_on_the_gpu(cuda, bench, tmp_path):
    status, text = bench("doctor", "--gpu", "--out", tmp_path / "report.json")
    assert status == 0, text
    steps = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert {one["step"]: one["status"] for one in steps}["speed of an update"] == "ok"


class Broken(Method):
    """Fails in its loss."""

    needs = Needs()

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        raise RuntimeError("planted")


@pytest.fixture
def broken(monkeypatch) -> Iterator[None]:
    """A method of that name in the registry."""
    monkeypatch.setitem(registry.BUILT_IN["methods"], "broken", registry.Plugin(f"{__name__}:Broken"))
    registry.plugins.cache_clear()
    yield
    monkeypatch.undo()
    registry.plugins.cache_clear()


@pytest.mark.slow
def test_doctor_tries_a_whole_run(bench, tmp_path):
    status, text = bench("doctor", "--gpu", "--device", "cpu", "--only", "whole run", "--out", tmp_path / "report.json")
    assert status == 0, text
    assert "2 updates, evaluation, pictures" in text


@pytest.mark.slow
def test_two_processes_of_the_doctor(tmp_path):
    with stand_ins([Repository(name, ()) for name in WRITERS], "tiny", Console(quiet=True)):
        note, found = two_processes(tmp_path)
    assert len(found["one"]) == len(found["two"]) == 2, note


@pytest.mark.slow
def test_doctor_goes_on_after_a_failure(broken, bench, tmp_path):
    out = tmp_path / "report.json"
    wanted = ("broken", "draft_1", "prior", "aesthetic", "features", "two processes", "speed of")
    status, text = bench("doctor", "--gpu", "--device", "cpu", "--out", out,
                         *(word for name in wanted for word in ("--only", name)))  # fmt: skip
    assert status == 1, text
    report = json.loads(out.read_text())
    steps = {one["step"]: one for one in report["steps"]}
    assert [name for name, one in steps.items() if one["status"] == "failed"] == ["method broken"]
    assert steps["method broken"]["note"] == "RuntimeError: planted"
    assert "Traceback" in steps["method broken"]["error"]
    for name in ("method draft_1", "method draft_1 in bfloat16", "method prior", "reward aesthetic"):
        assert steps[name]["status"] == "ok", steps[name]
    assert steps["method draft_1"]["data"]["relative"] == {"loss": 0.0, "gradient_norm/policy": 0.0}
    assert steps["two processes"]["status"] == steps["speed of an update"]["status"] == "not tried"
    assert {"environment", "device", "steps"} <= report.keys()
    assert "1 of" in text


def test_doctor_without_a_gpu_says_what_it_needs(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, text = bench("doctor", "--gpu")
    assert status == 2
    assert "needs an NVIDIA GPU" in text
    status, text = bench("doctor", "--gpu", "--device", "cpu", "--only", "nothing like it")
    assert status == 2
    assert "no step" in text
