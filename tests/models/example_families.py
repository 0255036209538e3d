"""Families of pipelines on scaled-down random weights, for tests of several modules."""

import torch

from bench.diagnose.selftest import models
from bench.models.catalogue import load_model
from bench.models.pipeline import PipelineModel
from bench.sampling.noise import Noise
from bench.sampling.trajectory import Batch, rollout
from bench.settings import LoraConfig, ModelConfig, SamplerConfig

SAMPLES = [("tiger", 0), ("tiger", 1), ("noto fox", 0)]
METHODS = ["nabla_gfn", "ddpo", "draft_1", "adjoint_matching"]
VIDEO = "wan2.1-t2v-1.3b"
NEWER = ["z-image-turbo", "qwen-image", "sana-600m", VIDEO]
FAMILIES = ["sdxl", "sd35_medium", "flux_dev", "flux_schnell", "flux2_klein", *NEWER]
SMALL = {"qwen-image": {"size": [64, 96]}, VIDEO: {"size": [64, 96], "frames": 5}}  # where no file says a size
TINY = [
    "prompts.limit=2", "train.prompts_per_round=2", "train.samples_per_prompt=2", "train.updates_per_round=1",
    "sampler.steps=3", "evaluation.train_prompts=2", "evaluation.test_prompts=0", "evaluation.validation_prompts=0",
    "evaluation.samples_per_prompt=2",
    "evaluation.metrics=[reward,path_kl]", "evaluation.rewards=[]",
]  # fmt: skip


def guidance(name: str) -> float:
    return 1.0 if name == "flux_schnell" else 3.0


def loaded(name: str, alpha: int | None = None, **options) -> PipelineModel:
    lora = LoraConfig(rank=2, alpha=alpha)
    config = ModelConfig(name=name, lora=lora, **SMALL.get(name, {}) | options)
    return load_model(config, SamplerConfig(guidance=guidance(name)))


def agree_from_prompts(model: PipelineModel, **inputs: list[str]) -> None:
    """Our images are those of the pipeline's own call that reads the prompts."""
    kernel, noise = models._kernel(model, 3), Noise(0, "evaluate", SAMPLES)
    prompts = [prompt for prompt, _ in SAMPLES]
    ours = model.decode(rollout(model, kernel, Batch(prompts, SAMPLES, model.encode(prompts)), noise).latents[:, -1])
    guidance = model.call_guidance(model.guidance)
    model.pipeline_inputs = lambda conditioning: {"prompt": prompts, **guidance, **inputs}
    theirs = model.call_pipeline(model.open(), model.encode(prompts), noise(0, model.latent_shape), kernel, "pt")
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-3)
