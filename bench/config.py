"""The run configuration: frozen, validated, layered, hashed.

Layers, later ones win: built-in defaults, the method's recipe, its variant's preset, the suite, the suite's settings
for this reward and for this method, the command line's `--set`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, create_model

from bench import registry
from bench.errors import BenchError, did_you_mean
from bench.models import ANALYTIC
from bench.plugin import Config

HEAVY = ("diversity_dreamsim", "diversity_clip")  # need weights that do not ship; full-size suites ask for them
SUITES = Path(__file__).parent / "suites"


class Named(Config):
    """A plugin's options with its name; the plugin's own class adds its fields."""

    name: str


class RewardSection(Config):
    """What every reward has, whatever its own options."""

    name: str
    beta: float = Field(1.0, gt=0, description="inverse temperature β of the target p_# exp(β r)")


class ModelConfig(Config):
    """The model and its finetuned part."""

    name: str = Field("emoji", description="a named model, a local diffusers folder, or a hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    finetune: Literal["lora", "full"] = "lora"
    lora_rank: int = Field(8, ge=1)
    checkpointing: bool = Field(False, description="recompute the denoiser and the decoder in the backward pass")
    attention: Literal["sdpa", "eager", "sliced"] = Field("sdpa", description="fused, plain, or plain a head at a time")
    compile: bool = Field(False, description="torch.compile the denoiser; the first calls take minutes")
    vae_slicing: bool = Field(False, description="decode one image at a time")


class SamplerConfig(Config):
    """The transition kernel (see bench.sampling.kernel) and guidance."""

    steps: int = Field(20, ge=1)
    eta: float = Field(1.0, ge=0, le=1)
    guidance: float = Field(5.0, ge=1)
    spacing: Literal["leading", "trailing", "linspace", "logsnr"] = "leading"
    final_alpha: float | None = Field(None, gt=0, le=1, description="ᾱ_K; null: the model's scheduler's")


class PromptsConfig(Config):
    """A named prompt set or a file."""

    name: str = "emoji"
    limit: int | None = Field(None, ge=1, description="train on the first prompts of the training part only")


class TrainConfig(Config):
    """Rounds of sampling and updates."""

    updates: int = Field(100, ge=1)
    prompts_per_round: int = Field(16, ge=1)
    samples_per_prompt: int = Field(4, ge=1)
    updates_per_round: int = Field(2, ge=1)
    data_lag: int = Field(0, ge=0, le=1, description="1: train on data sampled a round earlier")
    micro_batch: int = Field(64, ge=1, description="rows per micro-loss")
    sample_batch: int = Field(64, ge=1, description="rows per rollout call, in training and evaluation")
    checkpoint_every: int = Field(10, ge=1, description="rounds between checkpoints")
    threads: int | None = Field(None, ge=1, description="CPU threads; null: all")
    beta_warmup: float = Field(0.0, ge=0, le=1, description="share of the updates over which β rises linearly from 0")


class NetworkOptimizer(Config):
    """Overrides for one of the method's extra networks; null means as for the policy."""

    lr: float | None = Field(None, gt=0)
    weight_decay: float | None = Field(None, ge=0)


class OptimizerConfig(Config):
    """AdamW, one per network, gradients clipped per network."""

    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm per network; null: no clipping")
    decay: float = Field(0.0, ge=0, le=1, description="share of the updates, the last, over which lr falls to 0")
    networks: dict[str, NetworkOptimizer] = {}


class EvaluationConfig(Config):
    """Evaluation samples and what is measured on them; the seed is the evaluation's own, never the run's."""

    train_prompts: int = Field(24, ge=1)
    heldout_prompts: int = Field(24, ge=0)
    samples_per_prompt: int = Field(8, ge=2)
    seed: int = 0
    at: list[int] = Field([], description="updates after which to evaluate too; always after the last")
    features: str = "efficientnet_lite0"
    metrics: list[str] = Field(default_factory=lambda: [n for n in registry.BUILT_IN["metrics"] if n not in HEAVY])
    rewards: list[str] = Field([], description="further rewards measured as a check")


class RunConfig(Config):
    """Everything that determines a run's numbers."""

    suite: str
    seed: int = Field(0, ge=0)
    method: SerializeAsAny[Config]
    reward: SerializeAsAny[Config]
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    sampler: SamplerConfig = SamplerConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def hash(self) -> str:
        """Canonical hash, 16 hex digits; equal settings hash equal whatever wrote them."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def to_yaml(self) -> str:
        """The resolved configuration, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def suites() -> dict[str, str]:
    """Named settings and their one-line descriptions."""
    return {path.stem: load_suite(path.stem)["description"] for path in sorted(SUITES.glob("*.yaml"))}


def load_suite(name: str) -> dict[str, Any]:
    """A suite's settings, merged over those of its `base` if it names one. Raises BenchError for an unknown name."""
    path = SUITES / f"{name}.yaml"
    if not path.is_file():
        raise BenchError(f"unknown suite {name!r}{did_you_mean(name, (p.stem for p in SUITES.glob('*.yaml')))}")
    own = yaml.safe_load(path.read_text(encoding="utf8"))
    tree = load_suite(own.pop("base")) if "base" in own else {}
    _merge(tree, own)
    return tree


def resolve(
    method: str,
    *,
    reward: str | None = None,
    suite: str | None = None,
    overrides: dict[str, Any] | None = None,
    assignments: list[str] | None = None,
) -> RunConfig:
    """The configuration of a run.

    suite: None takes the model's own (analytic models have one of their name), else the reward's natural one, else
    `emoji`. overrides: dotted keys from options of the command line; assignments: `key=value` strings of `--set`.
    Raises BenchError listing every mistake at once.
    """
    method_class = registry.load("methods", method)
    model = (overrides or {}).get("model.name")
    reward = reward and reward.replace(" ", "")
    natural = registry.load("rewards", reward).suite if reward else "emoji"
    suite = suite or (model if model in ANALYTIC else natural)
    settings = load_suite(suite)
    reward = reward or settings["reward"]["name"]
    reward_class = registry.load("rewards", reward)

    tree: dict[str, Any] = {"suite": suite}
    _merge(tree, method_class.recipe)
    _merge(tree, registry.find("methods", method).preset)
    special = {"description", "methods", "rewards"}
    _merge(tree, {key: value for key, value in settings.items() if key not in special})
    _merge(tree, settings.get("rewards", {}).get(reward, {}))
    _merge(tree, settings.get("methods", {}).get(method, {}))
    _merge(tree, overrides or {})
    _merge(tree, dict(_parse(text) for text in assignments or []))
    _merge(tree, {"method.name": method, "reward.name": reward})
    return build(tree, method_class, reward_class)


def build(tree: dict[str, Any], method_class: type, reward_class: type) -> RunConfig:
    """Validate a settings tree against the plugins' options. Raises BenchError listing every mistake."""
    specific = create_model(
        "RunConfig",
        __base__=RunConfig,
        method=(create_model("MethodSection", __base__=(Named, method_class.Config)), ...),
        reward=(create_model("RewardOptions", __base__=(RewardSection, reward_class.Config)), ...),
    )
    try:
        return specific(**tree)
    except ValidationError as error:
        keys = list(_keys(specific))
        raise BenchError("\n".join(explain(mistake, keys) for mistake in error.errors())) from None


def read(path: Path, assignments: list[str] | None = None) -> RunConfig:
    """A run's stored configuration, changed by `key=value` assignments."""
    tree = yaml.safe_load(path.read_text(encoding="utf8"))
    _merge(tree, dict(_parse(text) for text in assignments or []))
    return build(
        tree, registry.load("methods", tree["method"]["name"]), registry.load("rewards", tree["reward"]["name"])
    )


def _parse(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise BenchError(f"--set takes key=value, got {text!r}: for example --set train.updates=50")
    return key.strip(), yaml.safe_load(value)


def _merge(tree: dict[str, Any], settings: dict[str, Any], prefix: str = "") -> None:
    """Merge nested or dotted settings into the tree; an empty mapping clears what is there."""
    for key, value in settings.items():
        node, *path = tree, *key.split(".")
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise BenchError(f"{key!r} sets a part of {part!r}, which is a single value.")
        if isinstance(value, dict) and value:
            _merge(node.setdefault(path[-1], {}), value)
        else:
            node[path[-1]] = value


def _keys(model: type[Config], prefix: str = "") -> Any:
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, Config):
            yield from _keys(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def explain(mistake: Any, keys: list[str]) -> str:
    """One sentence for a mistake that pydantic found; keys: what may be set."""
    where = ".".join(map(str, mistake["loc"]))
    if mistake["type"] == "extra_forbidden":
        section = where.rpartition(".")[0]
        siblings = [key for key in keys if key.startswith(section + ".")] or keys
        return f"unknown setting {where!r}{did_you_mean(where, siblings)}"
    return f"{where} = {mistake['input']!r}: {mistake['msg'][0].lower()}{mistake['msg'][1:]}."
