"""From measurements and accounting to result rows."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench import config as configs
from bench import environment, registry
from bench.errors import BenchError
from bench.hub import is_random
from bench.metric import Measurement, Metric
from bench.model import DiffusionModel
from bench.models.catalogue import draws_points
from bench.options import leaves
from bench.prompts import PromptSet
from bench.renames import first_names
from bench.reporting.rows import FINGERPRINT
from bench.runs.requirements import requirements
from bench.runtime.digests import digest
from bench.settings import JUDGED, RunConfig


def run_name(config: RunConfig) -> str:
    """`<method>-seed<n>-<hash>`: the name of a run and of its default folder."""
    return f"{config.method.name}-seed{config.seed}-{config.hash()[:8]}"


def default_folder(config: RunConfig) -> Path:
    """`runs/<suite>/<reward>/<method>-seed<n>-<hash>`: another configuration never shares a folder."""
    reward = config.reward.name.replace("*", "x")  # of a weighted sum; a shell would expand the star
    return run_folder(Path("runs") / config.suite / reward, config)


def run_folder(parent: Path, config: RunConfig) -> Path:
    """The folder of a run in `parent`: `run_name`, unless an earlier version, with another hash, has begun it there."""
    folder = parent / run_name(config)
    if folder.exists():
        return folder
    for other in sorted(parent.glob(f"{config.method.name}-seed{config.seed}-????????")):
        with suppress(BenchError, OSError, KeyError, TypeError):  # no run, or one that this version cannot read
            if configs.read(other / "config.yaml").hash() == config.hash():
                return other
    return folder


def comparable_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that make a table's row, by dotted key; runs that agree in them differ in the seed alone.

    They leave out the seed, the suite's name, how work is cut, and what else was measured and when.
    """
    left_out = {"seed", "suite", "evaluation.at", "evaluation.metrics", "evaluation.rewards", *config.execution()}
    tree = config.model_dump(mode="json")
    return {key: value for key, value in leaves(tree) if key not in left_out and value != {}}


def evaluation_id(config: RunConfig, prompts: PromptSet) -> str:
    """Hash of what an evaluation samples; rows of different hashes are never compared."""
    evaluation = config.evaluation.model_dump(exclude={"metrics", "rewards", "at", "weights", "sampler"})
    parts = [first_names("evaluation", evaluation), config.evaluation_sampler().model_dump(), prompts.digest]
    return digest(parts, size=8)


def label(config: RunConfig) -> str:
    """The row's method: its name and, in brackets, what else distinguishes it from rows of the same evaluation.

    That is the copy of the adapters that was evaluated, a bound on the path KL, the training's sampler and guidance
    where those of the evaluation differ, and the losses' guidance where that of the training's rollouts differs. A
    baseline without training has none of them. Of what was trained elsewhere it is a name, and whether its author
    states what the training cost.
    """
    if config.method.name == JUDGED:
        judged: Any = config.method
        known = any(value is not None for _, value in judged.cost)
        return f"{judged.label} (judged; training cost {'as stated' if known else 'unknown'})"
    if not registry.load("methods", config.method.name).needs.training:
        return config.method.name
    details = [] if config.evaluation.weights == "policy" else [config.evaluation.weights]
    if config.train.max_path_kl is not None:
        details.append(f"until {config.train.max_path_kl:g} nats")
    sampler, other = config.sampler, config.evaluation_sampler()
    if sampler.guidance != other.guidance:
        details.append(f"trained with guidance {sampler.guidance:g}")
    if config.loss_guidance() != sampler.guidance:
        details.append(f"losses with guidance {config.loss_guidance():g}")
    if sampler.model_copy(update={"guidance": other.guidance}) != other:
        details.append(f"trained on {sampler.steps} steps of {sampler.rule} {sampler.eta:g}")
    return f"{config.method.name} ({', '.join(details)})" if details else config.method.name


def judged_weights(config: RunConfig) -> str | None:
    """What identifies the weights that `bench judge` measures; None of a run's own."""
    judged: Any = config.method
    return digest([judged.digest, judged.scales]) if judged.name == JUDGED else None


def _spent(config: RunConfig, counts: dict) -> dict:
    """The counts; of what was trained elsewhere those that its author states, in the place of others zero."""
    if config.method.name != JUDGED:
        return counts
    cost: Any = config.method.cost  # type: ignore[attr-defined]
    seconds = counts["seconds"] | {"stated": 3600 * (cost.gpu_hours or 0.0)}
    return counts | {"network_forwards": cost.nfe or 0, "reward_calls": cost.reward_calls or 0, "seconds": seconds}


def provenance(config: RunConfig) -> dict[str, Any]:
    """Where a run's rows come from: what is known before the model loads."""
    return environment.describe() | {"random_weights": is_random(requirements(config))}


def prior_settings(config: RunConfig, model: DiffusionModel) -> dict[str, str]:
    """What a row's settings say of its prior: the fingerprint of its weights; nothing for a model of points."""
    return {} if draws_points(config.model.name) else {FINGERPRINT: model.fingerprint()[:12]}


def row(
    config: RunConfig, prompts: PromptSet, counts: dict, info: dict[str, Any], measurement: Measurement, updates: int
) -> dict[str, Any]:
    """One row of `bench.reporting.rows`, measured after `updates`.

    counts: `Meter.total()`; info: `provenance`, and `prior_settings` under "prior".
    """
    base, counts = measurement.name.partition("/")[0], _spent(config, counts)
    metric = registry.load("metrics", base) if base in registry.plugins("metrics") else Metric  # a run that failed
    return {
        "run": run_name(config),
        "config_hash": config.hash(),
        "settings": json.dumps(comparable_settings(config) | info["prior"], sort_keys=True),
        "method": label(config),
        "reward": config.reward.name,
        "model": config.model.name,
        "beta": config.reward.beta,
        "prompts": prompts.name,
        "evaluation": evaluation_id(config, prompts),
        "seed": config.seed,
        "budget": updates,
        "budget_unit": "updates",
        "metric": measurement.name,
        "metric_version": metric.version,
        "value": measurement.value,
        "prior": measurement.prior,
        "difference": measurement.difference,
        "standard_error": measurement.standard_error,
        "degrees": measurement.degrees,
        "n": measurement.n,
        "direction": measurement.direction,
        "support": metric.support,
        "prior_is_best": metric.prior_is_best,
        "unit": measurement.unit,
        "note": measurement.note,
        "status": "random weights" if info["random_weights"] else "ok" if measurement.value is not None else "refused",
        "revision": info["revision"],
        "dirty": info["dirty"],
        "packages": json.dumps(info["packages"]),
        "hardware": info["hardware"],
        "updates": updates,
        "reward_calls": counts["reward_calls"],
        "reward_gradients": counts["reward_gradients"],
        "network_forwards": counts["network_forwards"],
        "network_backwards": counts["network_backwards"],
        "wall_seconds": sum(counts["seconds"].values()),
        "train_seconds": sum(seconds for phase, seconds in counts["seconds"].items() if phase != "evaluation"),
        "peak_memory_bytes": counts["peak_memory"],
    }
