"""What result rows and stored configurations of earlier versions call settings, what these are now, and what they lack.

A published row carries the settings of the version that made it. `current` is the one place that translates them: for
reading rows, for `bench reproduce`, and for the configuration of an old run's folder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.errors import BenchError


@dataclass(frozen=True)
class Renamed:
    """The setting's key now, and what its value becomes."""

    key: str
    convert: Callable[[Any], Any] = lambda value: value


# The priors that ship have not changed, but their fingerprints have: configurations and tokenizers are in them since.
# former fingerprint → that of the same prior now, of those that published rows carry
FINGERPRINTS: Mapping[str, str] = {
    "bb1d55366112": "11245e131c06",  # emoji, guidance 3
    "8897e974af0b": "a40b441f5a16",  # emoji_flow, guidance 3
}

# former key → what it is now, of every method
GENERAL: Mapping[str, Renamed] = {
    "model.fingerprint": Renamed("model.fingerprint", lambda value: FINGERPRINTS.get(value, value)),
    "model.lora_rank": Renamed("model.lora.rank"),
    "model.lora_alpha": Renamed("model.lora.alpha"),
    "evaluation.heldout_prompts": Renamed("evaluation.validation_prompts"),
}
# Former name of a part of the prompts → its name now. Learning rates were chosen by the reward on it, so it is no test.
SPLITS: Mapping[str, str] = {"heldout": "validation"}

# Settings that came later → what held before they were there. A row that lacks one was made with this value, whatever
# the default is now. All rows have schema 2: a missing key is all that tells the versions of the settings apart.
ADDED: Mapping[str, Any] = {
    "train.guidance": None,
    "evaluation.sampler.guidance": None,
    "model.negative_prompt": "",
    "model.size": None,
    "model.frames": 1,
    "model.lora.target_modules": None,
    "model.lora.use_dora": False,
    "model.lora.init": "gaussian",
    "train.max_path_kl": None,
    "prompts.split": "every_fifth",
    "evaluation.test_prompts": 0,
    "model.quantize": None,
}

# The same of settings of one method.
_NO_KL = {"method.kl": 0.0, "method.penalty": "path"}
ADDED_TO: Mapping[str, Mapping[str, Any]] = dict.fromkeys(
    ("refl", "draft", "draft_1", "draft_full", "draft_lv", "alignprop", "leap_align"), _NO_KL
)

_NO_BUFFER = {"method.buffer": 32, "method.minimum": 16}  # options that had no effect, at their defaults
_NO_DEVIATION = {"method.deviation.over": "group", "method.deviation.correction": 0, "method.deviation.epsilon": 1e-6}
_CLIPPED = {"method.surrogate": "clip", "method.threshold": 1e-5}
_ALL_STEPS = {"method.window": None, "method.window_rounds": 25, "method.shared_start": False}
_PLAIN_STEP = {"method.density": "gaussian", "method.kl_unit": "step"}
# One class with options was nft, awm, ram, rvm and tilt_matching: what those that went were for the methods.
_REGRESSION = {
    "method.residual": "policy",
    "method.sampler": "policy",
    "method.weight": "none",
    "method.factor": 1.0,
}
_NO_STAGES = {"method.stages": 1, "method.stage_rounds": 20}
_NO_OLD_POLICY = {"method.old_decay": 0.0}
_NO_LIKELIHOOD = {"method.power": 0.25, "method.ratio_clip": 1.0}
_NO_AVERAGE = {"method.ema_decay": 0.3}
_NO_NORMALISATION = {
    "method.deviation.over": "group",
    "method.deviation.correction": 0,
    "method.deviation.epsilon": 1e-6,
    "method.advantage_clip": None,
    "method.scale": 1.0,
}
_NFT = {
    "method.advantage": "normalised",
    "method.scale": 0.2,
    "method.residual": "old",
    "method.sampler": "old",
    "method.weight": "clean",
    "method.factor": 5.0,
    "method.anchors.old": Renamed("method.mix"),
    "method.anchors.prior": Renamed("method.kl", lambda weight: 5 * weight),
}
_AWM = {
    "method.advantage": "normalised",
    "method.scale": 0.2,
    "method.weight": "likelihood",
    "method.anchors.prior": Renamed("method.kl"),
    "method.anchors.ema": Renamed("method.ema"),
}
_RAM = {"method.advantage": "reward", "method.anchors.prior": 1.0}
_RVM = {"method.advantage": "normalised", "method.factor": 0.5, "method.anchors.prior": Renamed("method.kl")}
_TILT = {"method.advantage": "tilt", "method.sampler": "old", "method.anchors.old": 1.0}
# One class with options was db, res_db and dag_kl; another rtb_softmax and tmpo; another vgg_flow and vgg_flow_pruned.
_NO_POLICY_GRADIENT = {"method.clip": None, "method.advantage_clip": 5.0, "method.policy_weight": 1.0}
_NO_VALUE_NETWORK = {
    "method.value_network": False,
    "method.gradient_at": "sample",
    "method.consistency": 1.0,
    "method.terminal": 1000.0,
    "method.channels": [64, 128, 256, 256],
}
UNUSED = object()  # a setting that did nothing in this method, whatever its value

# One class with options was all of the ∇-GFlowNet methods.
_NABLA = {"method.residual": True, "method.flow": True, "method.flow_target": "policy"}
_PATHWISE = {"method.reverse": "pathwise", "method.reverse_at": "start"}
_FLOW = ("flow_target", "detach_target", "reverse", "reverse_at", "reverse_weight", "channels")

# method → former key → what it is now, or the only value that a row of this method may have: its options were given by
# name to one class of many methods, and are now what the method's own class does.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "ddpo": {"method.advantage": "buffer", "method.reduction": "mean", **_NO_DEVIATION},
    "grpo": {"method.advantage": "group", "method.reduction": "mean", **_NO_BUFFER},
    "dpok": {"method.advantage": "reward", "method.reduction": "sum", **_NO_BUFFER, **_NO_DEVIATION},
    "flow_grpo": _CLIPPED | _ALL_STEPS | {"method.density": "gaussian", "method.kl_unit": "rate"},
    "flow_grpo_cps": _CLIPPED | _ALL_STEPS | {"method.density": "square", "method.kl_unit": "square"},
    "dance_grpo": _CLIPPED | _ALL_STEPS | _PLAIN_STEP | {"method.shared_start": True},
    "mix_grpo": _CLIPPED | _PLAIN_STEP | {"method.fraction": 1.0, "method.shared_start": False},
    "grpo_guard": _CLIPPED | _ALL_STEPS | _PLAIN_STEP | {"method.surrogate": "guard"},
    "flow_dppo": _ALL_STEPS | _PLAIN_STEP | {"method.surrogate": "mask", "method.clip": 1e-4},
    "nft": _REGRESSION | _NO_STAGES | _NO_LIKELIHOOD | _NO_AVERAGE | _NFT,
    "awm": _REGRESSION | _NO_STAGES | _NO_OLD_POLICY | _AWM,
    "ram": _REGRESSION | _NO_STAGES | _NO_OLD_POLICY | _NO_LIKELIHOOD | _NO_AVERAGE | _NO_NORMALISATION | _RAM,
    "rvm": _REGRESSION | _NO_STAGES | _NO_OLD_POLICY | _NO_LIKELIHOOD | _NO_AVERAGE | _RVM,
    "tilt_matching": _REGRESSION | _NO_OLD_POLICY | _NO_LIKELIHOOD | _NO_AVERAGE | _NO_NORMALISATION | _TILT,
    "rtb_softmax": {"method.prior": True},
    "tmpo": {"method.prior": False},
    "db": {"method.residual": False} | _NO_POLICY_GRADIENT,
    "res_db": {"method.residual": True} | _NO_POLICY_GRADIENT,
    "dag_kl": {"method.residual": False},
    "vgg_flow": {"method.value_network": True, "method.gradient_at": "prediction"},
    "vgg_flow_pruned": _NO_VALUE_NETWORK,
    "draft": {"method.leap": False, "method.renoise": 0, "method.start": None},
    "draft_1": {"method.depth": 1, "method.leap": False, "method.renoise": 0, "method.start": None},
    "draft_full": {"method.depth": 0, "method.leap": False, "method.renoise": 0, "method.start": None},
    "draft_lv": {"method.depth": 1, "method.leap": False, "method.start": None},
    "leap_align": {"method.depth": 5, "method.leap": True, "method.renoise": 0, "method.start": None},
    "alignprop": {"method.depth": 5, "method.leap": False, "method.renoise": 0},
    "nabla_gfn": _NABLA | {"method.detach_target": True, "method.reverse": "expected", "method.reverse_at": "end"},
    "nabla_gfn_noflow": _NABLA | {"method.flow": False} | {f"method.{name}": UNUSED for name in _FLOW},
    "nabla_gfn_published": _NABLA | _PATHWISE,
    "nabla_gfn_adjoint": _NABLA
    | {
        "method.flow_target": "adjoint",
        "method.detach_target": True,
        "method.reverse": UNUSED,
        "method.reverse_at": "start",
    },
    "nabla_db": _NABLA | _PATHWISE | {"method.residual": False},
}


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key in the names of this version, `method.name` among them, with those that came later.

    A former setting whose value is none of its method's any more stays as it was.
    """
    method = settings.get("method.name", "")
    former, translated = {**GENERAL, **METHODS.get(method, {})}, {**ADDED, **ADDED_TO.get(method, {})}
    for key, value in settings.items():
        now = former.get(key, Renamed(key))
        if isinstance(now, Renamed):
            translated[now.key] = now.convert(value)
        elif now is not UNUSED and now != value:
            translated[key] = value
    return translated


def current(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same. Raises BenchError for a setting that is now another method's or nobody's."""
    method, translated = settings["method.name"], renamed(settings)
    for key in METHODS.get(method, {}):
        if key in translated and not isinstance(METHODS[method][key], Renamed):
            raise BenchError(
                f"{key} = {translated[key]!r} was a setting of {method!r} and is none of this version's: "
                "use the version that made the row."
            )
    return translated


def first_names(section: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a section as they were first called, without later ones at the value that held before.

    A hash of these is the same in all versions.
    """
    first = {now.key: key for key, now in GENERAL.items()}
    named = {f"{section}.{name}": value for name, value in settings.items()}
    kept = {key: value for key, value in named.items() if key not in ADDED or ADDED[key] != value}
    return {first.get(key, key).removeprefix(f"{section}."): value for key, value in kept.items()}


def current_metric(name: str) -> str:
    """A row's metric in the names of this version: `reward/…/SPLIT` and `reward_prompts/SPLIT/PROMPT` have a split."""
    match name.split("/"):
        case ["reward", *of, split]:
            return "/".join(["reward", *of, SPLITS.get(split, split)])
        case ["reward_prompts", split, *prompt]:
            return "/".join(["reward_prompts", SPLITS.get(split, split), *prompt])
    return name
