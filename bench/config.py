"""How a run's settings come about.

Layers, later ones win: built-in defaults, the method's recipe, the suite, the suite's settings
for this reward and for this method, the command line's `--set`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model

from bench import registry
from bench.errors import BenchError, did_you_mean
from bench.options import Config, explain, leaves
from bench.renames import current
from bench.runtime import yaml_text
from bench.settings import Named, RewardSection, RunConfig

SUITES = Path(__file__).parent / "suites"
OPTIONS = {  # settings that decide which other settings there are, and so are options of their own
    "method": "--method",
    "method.name": "--method",
    "reward": "--reward",
    "reward.name": "--reward",
    "suite": "--suite",
}
# What a suite says of its own prompts, and of no others.
OF_ITS_PROMPTS = {"prompts.limit", "prompts.split", "evaluation.validation_prompts", "evaluation.test_prompts"}
CHOICES = ("method.name", "reward.name", "suite")  # of these, the ones that hold a name alone


def suite_names() -> list[str]:
    """Names of the suites that ship."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suite(name: str) -> dict[str, Any]:
    """A suite's settings, merged over those of its `base` if it names one. Raises BenchError for an unknown name."""
    if name not in suite_names():
        raise BenchError(f"unknown suite {name!r}{did_you_mean(name, suite_names())}")
    settings = yaml_text.parse((SUITES / f"{name}.yaml").read_text(encoding="utf8"))
    tree = load_suite(settings.pop("base")) if "base" in settings else {}
    _merge(tree, settings)
    return tree


def resolve(
    method: str,
    *,
    reward: str | None = None,
    suite: str | None = None,
    overrides: dict[str, Any] | None = None,
    assignments: list[str] | None = None,
    metrics: Sequence[str] = (),
) -> RunConfig:
    """The configuration of a run.

    suite: None takes the model's own (of its name) if there is one, else the reward's natural one, else `emoji`.
    overrides: dotted keys from options of the command line; assignments: `key=value` strings of `--set`;
    metrics: further ones beside the setting's. Of a suite's own reward, other rewards take neither β nor options.
    Raises BenchError listing every mistake at once.
    """
    method_class = registry.load("methods", method)
    model = (overrides or {}).get("model.name")
    reward = reward and reward.replace(" ", "")
    natural = registry.load("rewards", reward).suite if reward else "emoji"
    suite = suite or str(model if model in suite_names() else natural)
    settings = load_suite(suite)
    reward = reward or settings["reward"]["name"]
    reward_class = registry.load("rewards", reward)

    tree: dict[str, Any] = {"suite": suite}
    _merge(tree, method_class.recipe)
    special = {"description", "methods", "rewards"} | ({"reward"} if reward != settings["reward"]["name"] else set())
    _merge(tree, {key: value for key, value in settings.items() if key not in special})
    _merge(tree, settings.get("rewards", {}).get(reward, {}))
    _merge(tree, settings.get("methods", {}).get(method, {}))
    own_prompts = tree["prompts"]["name"]
    chosen = _parsed(assignments)
    _merge(tree, overrides or {})
    _merge(tree, chosen)
    if isinstance(tree["prompts"], dict) and tree["prompts"]["name"] != own_prompts:
        for key in OF_ITS_PROMPTS - {*chosen, *(overrides or {})}:
            section, name = key.split(".")
            if section not in chosen:
                tree.get(section, {}).pop(name, None)
    _merge(tree, {"method.name": method, "reward.name": reward})
    return with_metrics(build(tree, method_class, reward_class), metrics)


def with_metrics(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """The configuration with these metrics measured too. Raises BenchError for an unknown one."""
    for name in names:
        registry.find("metrics", name)
    measured = config.evaluation.metrics
    changed = config.evaluation.model_copy(update={"metrics": list(dict.fromkeys([*measured, *names]))})
    return config.model_copy(update={"evaluation": changed})


def beta_origin(config: RunConfig) -> str:
    """Where the configuration's β comes from, in a few words."""
    name, suite = config.reward.name, load_suite(config.suite)
    section = suite["reward"] if suite["reward"]["name"] == name else {}
    suite_beta = (section | suite.get("rewards", {}).get(name, {}).get("reward", {})).get("beta")
    if config.reward.beta == suite_beta:
        return f"the suite {config.suite!r} has it for {name!r}"
    if suite_beta is None and config.reward.beta == RewardSection.model_fields["beta"].default:
        return f"a default that knows nothing of {name!r}; --dry-run --probe tells what it means there"
    return "as given"


def build(tree: dict[str, Any], method_class: Any, reward_class: Any) -> RunConfig:
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
    try:
        stored = yaml_text.parse(path.read_text(encoding="utf8"))
        if missing := [name for name in RunConfig.model_fields if name not in stored]:  # a run writes all of them
            raise ValueError(f"it lacks {', '.join(missing)}")
        method, reward = stored["method"]["name"], stored["reward"]["name"]
    except (KeyError, TypeError, ValueError) as error:
        reason = "it names no method and reward" if isinstance(error, KeyError | TypeError) else str(error)
        raise BenchError(
            f"{path} is not the configuration of a run of this version ({reason}): put it back, or begin anew in "
            "another folder."
        ) from None
    tree: dict[str, Any] = {}
    _merge(tree, current(dict(leaves(stored))))
    _merge(tree, _parsed(assignments))
    return build(tree, registry.load("methods", method), registry.load("rewards", reward))


def with_settings(config: RunConfig, settings: dict[str, Any], assignments: Sequence[str] = ()) -> RunConfig:
    """A configuration with other settings, by dotted key, and then `key=value` assignments.

    A "method" among the settings stands in the place of the whole section.
    """
    tree = config.model_dump(mode="json", exclude={"method"} & settings.keys())
    _merge(tree, settings)
    _merge(tree, _parsed(list(assignments)))
    return build(tree, *(registry.load(f"{kind}s", tree[kind]["name"]) for kind in ("method", "reward")))


def from_settings(settings: dict[str, Any], assignments: list[str]) -> RunConfig:
    """A run's configuration from its settings by dotted key; `EXECUTION` is as in its natural suite.

    Raises BenchError listing settings that this version does not know.
    """
    settings = current(settings)
    method, reward = settings["method.name"], settings["reward.name"]
    natural = resolve(method, reward=reward, overrides={"model.name": settings["model.name"]})
    tree: dict[str, Any] = {"suite": natural.suite}
    _merge(tree, natural.execution())
    _merge(tree, settings)
    _merge(tree, _parsed(assignments))
    return build(tree, registry.load("methods", method), registry.load("rewards", reward))


def _parsed(assignments: list[str] | None) -> dict[str, Any]:
    chosen = dict(parse_assignment(text) for text in assignments or [])
    for key, value in chosen.items():
        option = OPTIONS.get(key) or next((OPTIONS[choice] for choice in CHOICES if key.startswith(f"{choice}.")), None)
        if option:
            raise BenchError(f"--set {key}=… does not choose it: use {option} {value}.")
    return chosen


def parse_assignment(text: str) -> tuple[str, Any]:
    """`key=value` → (dotted key, value). Raises BenchError."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise BenchError(f"--set takes key=value, got {text!r}: for example --set train.updates=50")
    try:
        return key.strip(), yaml_text.parse(value)
    except ValueError as error:
        raise BenchError(f"--set {key.strip()}: cannot read {value!r}: {error}.") from None


def _merge(tree: dict[str, Any], settings: dict[str, Any], prefix: str = "") -> None:
    """Merge nested or dotted settings into the tree; an empty mapping clears what is there."""
    for key, value in settings.items():
        node, *path = tree, *str(key).split(".")
        nested = isinstance(value, dict) and value
        for part in path if nested else path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise BenchError(f"{key!r} sets a part of {part!r}, which is a single value.")
        if nested:
            _merge(node, value)
        else:
            node[path[-1]] = value


def _keys(model: type[Config], prefix: str = "") -> Any:
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, Config):
            yield from _keys(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name
