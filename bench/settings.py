"""The settings of a run: frozen, validated, hashed. `bench.config` makes them from suites, recipes and `--set`."""

import os
from collections.abc import Collection
from functools import reduce
from operator import attrgetter, getitem
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializeAsAny, model_validator

from bench import registry
from bench.errors import BenchError, did_you_mean
from bench.options import Config, execution_keys
from bench.runtime import yaml_text
from bench.runtime.digests import digest

# How work is cut and stored, not what is computed: whatever these are, a trajectory is the same to rounding (1e-6 of a
# float32 network). So they are no part of the hash that names a run, and a run may resume with others. Rewards may have
# such options too (`Config.EXECUTION`).
EXECUTION = (
    "train.micro_batch",
    "train.sample_batch",
    "train.threads",
    "train.checkpoint_every",
    "model.checkpointing",
    "model.vae_slicing",
    "model.offload",
    "model.shard",
    "model.attention",
    "model.compile",
)
JUDGED = "judged"  # the method of a model that was trained elsewhere
# measured only if asked for: they need weights or further samples, or make a row for every step or prompt
HEAVY = ("diversity_dreamsim", "diversity_clip", "sampler_gap", "path_kl_steps", "reward_prompts")


Share = Annotated[float, Field(ge=0, lt=1)]
Rule = Literal["ddim", "sde", "cps", "euler", "dance"]
Spacing = Literal["auto", "leading", "trailing", "linspace", "logsnr", "sd3", "shifted", "flux", "flux2", "qwen"]
Location = Annotated[str, AfterValidator(os.path.expanduser)]  # a name, or a path
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # a column of the result rows
SplitRule = Literal["hash", "every_fifth"]
Quantized = Literal["int8", "nf4"]


class Named(Config):
    """A plugin's options with its name; the plugin's own class adds its fields."""

    name: str


class RewardSection(Config):
    """What every reward has, whatever its own options."""

    name: str
    beta: float = Field(1.0, gt=0, description="inverse temperature β of the target p_# exp(β r)")


class LoraConfig(Config):
    """The adapter of `model.finetune=lora`, in peft's terms."""

    rank: int = Field(8, ge=1)
    alpha: int | None = Field(None, ge=1, description="the adapter's scale times its rank; null: the rank")
    target_modules: list[str] | str | None = Field(
        None, description="layers that get one: ends of names, or a regular expression of whole names; null: attention"
    )
    use_dora: bool = Field(False, description="DoRA: the norms of the adapted weights are trained apart")
    init: Literal["gaussian", "kaiming"] = Field("gaussian", description="of A; B starts at zero")


class ModelConfig(Config):
    """The model and its finetuned part."""

    name: Location = Field("emoji", description="a named model, a local diffusers folder, or a hub id")
    dtype: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = Field(
        "auto", description="of the denoiser; tf32: float32 whose products a GPU rounds"
    )
    t5: bool = Field(True, description="false: without the T5 encoder of Stable Diffusion 3, its text states are zeros")
    finetune: Literal["lora", "full", "none"] = Field(
        "lora", description="an adapter, the whole denoiser, or nothing: what is judged comes from elsewhere"
    )
    quantize: Quantized | None = Field(
        None, description="the frozen denoiser's linear layers in 8 bits (a scale a row) or 4 (NF4); needs torchao"
    )
    lora: LoraConfig = LoraConfig()
    checkpointing: bool = Field(False, description="recompute the denoiser and the decoder in the backward pass")
    attention: Literal["sdpa", "eager", "sliced"] = Field("sdpa", description="fused, plain, or plain a head at a time")
    compile: bool = Field(False, description="torch.compile the denoiser; the first calls take minutes")
    vae_slicing: bool = Field(False, description="decode one image at a time")
    offload: bool = Field(
        False, description="decoder and text encoders wait on the CPU; the latter load for prompts not stored yet"
    )
    shard: bool = Field(
        False, description="every process keeps a part of the frozen denoiser, and gathers a block when it is called"
    )
    negative_prompt: str = Field("", description="what classifier-free guidance leads away from")
    size: tuple[int, int] | None = Field(
        None, description="height and width in pixels, where the pipeline's files say none; null: its own call's"
    )
    frames: int = Field(1, ge=1, description="of a pipeline that draws videos; 1: a picture")

    @model_validator(mode="after")
    def _what_is_quantized_is_frozen(self) -> "ModelConfig":
        if self.quantize and (self.finetune != "lora" or self.lora.use_dora):
            given = "model.lora.use_dora = true" if self.finetune == "lora" else f"model.finetune = {self.finetune}"
            raise ValueError(
                f"model.quantize = {self.quantize} is of frozen weights below plain LoRA: leave out {given}"
            )
        return self

    @model_validator(mode="after")
    def _what_is_sharded_is_frozen(self) -> "ModelConfig":
        if self.shard and self.finetune != "lora":
            raise ValueError(
                f"model.shard is of frozen weights below an adapter: leave out model.finetune = {self.finetune}"
            )
        for name in ("quantize", "compile"):
            if self.shard and (value := getattr(self, name)):
                given = f"model.{name} = {str(value).lower()}"
                raise ValueError(f"model.shard gathers weights in full, for blocks as they are: leave out {given}")
        return self


class SamplerConfig(Config):
    """The transition kernel (see bench.sampling.kernel) and guidance."""

    steps: int = Field(20, ge=1)
    rule: Rule = Field("ddim", description="how eta makes a step's noise")
    eta: float = Field(1.0, ge=0, le=2)
    guidance: float = Field(5.0, ge=1, description="classifier-free guidance; 1: none")
    spacing: Spacing = Field(
        "auto",
        description="the time grid: the model's own, one of a diffusion, or (logsnr and the last five) of a flow",
    )
    final_alpha: float | None = Field(None, gt=0, le=1, description="a diffusion's ᾱ_K; null: its scheduler's")
    final_noise: float | None = Field(None, ge=0, lt=1, description="a flow's s_K; null: 0.02, less on a finer grid")


class PromptsConfig(Config):
    """A named prompt set or a file."""

    name: Location = "emoji"
    limit: int | None = Field(None, ge=1, description="train on the first prompts of the training part only")
    split: SplitRule = Field("hash", description="how prompts come into parts; every_fifth: as earlier versions did")


class TrainConfig(Config):
    """Rounds of sampling and updates."""

    updates: int = Field(100, ge=1)
    prompts_per_round: int = Field(16, ge=1)
    samples_per_prompt: int = Field(4, ge=1)
    updates_per_round: int = Field(2, ge=1, description="each on its own part of the round's trajectories")
    data_lag: int = Field(0, ge=0, le=1, description="1: train on data sampled a round earlier")
    micro_batch: int | None = Field(
        None, ge=1, description="rows per micro-loss; null: 64, or as many as the memory estimate lets fit"
    )
    sample_batch: int | None = Field(
        None, ge=1, description="rows per rollout call, in training and evaluation; null: twice micro_batch, at most 64"
    )
    checkpoint_every: int = Field(10, ge=1, description="rounds between checkpoints")
    threads: int | None = Field(None, ge=1, description="CPU threads; null: all cores; one for a model of points")
    ema: float | None = Field(None, gt=0, lt=1, description="keep a copy 'ema': its decay, less in the first updates")
    guidance: float | None = Field(
        None, ge=1, description="classifier-free guidance of the losses; null: the sampler's"
    )
    max_path_kl: float | None = Field(
        None, gt=0, description="training ends after the round that takes the policy this far from the prior, in nats"
    )
    beta_warmup: float = Field(0.0, ge=0, le=1, description="share of the updates over which β rises linearly from 0")

    @property
    def rounds(self) -> int:
        """Rounds of the run."""
        return -(-self.updates // self.updates_per_round)

    @model_validator(mode="after")
    def _every_update_has_a_trajectory(self) -> "TrainConfig":
        if self.updates_per_round > (count := self.prompts_per_round * self.samples_per_prompt):
            raise ValueError(
                f"a round of {count} trajectories cannot feed updates_per_round = {self.updates_per_round}"
            )
        return self


class NetworkOptimizer(Config):
    """Overrides for one of the method's own networks; null: as for the policy."""

    lr: float | None = Field(None, gt=0)
    weight_decay: float | None = Field(None, ge=0)


class OptimizerConfig(Config):
    """AdamW, one per network, gradients clipped per network."""

    lr: float = Field(1e-3, gt=0)
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm per network; null: no clipping")
    decay: float = Field(0.0, ge=0, le=1, description="share of the updates, the last, over which lr falls to 0")
    networks: dict[str, NetworkOptimizer] = {}

    def require_networks(self, names: Collection[str]) -> None:
        """Raise BenchError if `networks` has an entry for none of the method's networks."""
        none = ": as it is set, the method has none. A recipe's are left out by --set 'optimizer.networks={}'."
        for name in sorted(self.networks.keys() - set(names)):
            hint = did_you_mean(name, names) if names else none
            raise BenchError(f"unknown setting 'optimizer.networks.{name}'{hint}")


class EvaluationSampler(Config):
    """What the evaluation's sampler has apart from the training's `sampler`; null: as there."""

    steps: int | None = Field(None, ge=1)
    rule: Rule | None = None
    eta: float | None = Field(None, ge=0, le=2)
    guidance: float | None = Field(None, ge=1)
    spacing: Spacing | None = None
    final_alpha: float | None = Field(None, gt=0, le=1)
    final_noise: float | None = Field(None, ge=0, lt=1)


class EvaluationConfig(Config):
    """Evaluation samples and what is measured on them."""

    train_prompts: int = Field(24, ge=1)
    validation_prompts: int = Field(12, ge=0, description="tuning chooses by these")
    test_prompts: int = Field(36, ge=0, description="tables compare by these")
    samples_per_prompt: int = Field(8, ge=2)
    seed: Seed | None = Field(
        None, description="of the samples' noise; null: the run's, so that a spread over seeds holds it too"
    )
    at: list[Annotated[int | float, Field(gt=0)]] = Field(
        [], description="updates, or shares of the run, after which to evaluate too; always after the last"
    )
    weights: str = Field("policy", description="whose samples: the policy's, or a copy's (train.ema keeps 'ema')")
    sampler: EvaluationSampler = EvaluationSampler()
    features: str = "efficientnet_lite0"
    metrics: list[str] = Field(default_factory=lambda: [n for n in registry.BUILT_IN["metrics"] if n not in HEAVY])
    rewards: list[str] = Field([], description="further rewards measured as a check")


class RunConfig(Config):
    """Everything that determines a run's numbers, and how they are computed."""

    suite: str
    seed: Seed = 0
    method: SerializeAsAny[Named]
    reward: SerializeAsAny[RewardSection]
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    sampler: SamplerConfig = SamplerConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def evaluation_sampler(self) -> SamplerConfig:
        """The sampler of every evaluation, the prior's sets included."""
        return SamplerConfig(**self.sampler.model_dump() | self.evaluation.sampler.model_dump(exclude_none=True))

    def adapter_name(self) -> str:
        """The folder, in a run's, of the weights that its evaluation draws with."""
        weights = self.evaluation.weights
        return "adapter" if weights == "policy" else f"adapter-{weights}"

    def loss_guidance(self) -> float:
        """The guidance of every prediction in the losses."""
        return self.sampler.guidance if self.train.guidance is None else self.train.guidance

    @model_validator(mode="after")
    def _negative_prompt_is_used(self) -> "RunConfig":
        scales = {self.sampler.guidance, self.evaluation_sampler().guidance, self.loss_guidance()}
        if self.model.negative_prompt and scales == {1}:
            raise ValueError("model.negative_prompt does nothing without guidance: set sampler.guidance above 1")
        return self

    @model_validator(mode="after")
    def _evaluations_lie_within_the_run(self) -> "RunConfig":
        if beyond := [update for update in self.evaluation.at if update > self.train.updates]:
            raise ValueError(f"evaluation.at = {beyond} lies beyond train.updates = {self.train.updates}")
        if broken := [place for place in self.evaluation.at if place > 1 and place != int(place)]:
            raise ValueError(f"evaluation.at = {broken} is neither an update nor a share of the run")
        return self

    def evaluated_at(self) -> list[int]:
        """The updates after which a run is evaluated, its last included; shares are rounded, never to zero."""
        updates = self.train.updates
        return sorted(
            {updates, *(at if isinstance(at, int) else max(1, round(at * updates)) for at in self.evaluation.at)}
        )

    def hash(self) -> str:
        """Canonical hash, 16 hex digits, of all but `EXECUTION`; equal settings hash equal whatever wrote them.

        It names a run's folder, so it also holds the suite and what is measured when. A setting that is added changes
        it: rows of several versions are compared by `bench.reporting.identity` instead.
        Runs of equal hash agree to rounding; to the bit, on a CPU, where the settings of `EXECUTION` agree too.
        """
        tree = self.model_dump(mode="json")
        for key in self.execution():
            section, _, name = key.rpartition(".")
            del reduce(getitem, section.split("."), tree)[name]
        return digest(tree, size=8)

    def execution(self) -> dict[str, Any]:
        """The settings of `EXECUTION`, the reward's own among them, by dotted key."""
        return {key: attrgetter(key)(self) for key in (*EXECUTION, *execution_keys(self.reward, "reward."))}

    def to_yaml(self) -> str:
        """The resolved configuration, every default written out."""
        return yaml_text.dump(self.model_dump(mode="json"))
