"""Names → plugins. A built-in plugin is one line here; any other package announces its own by an entry point.

Targets are imported only when asked for. A variant is a class plus option overrides, keyed like `--set`.
"""

import importlib
import logging
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from bench.errors import BenchError, did_you_mean

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plugin:
    """A name's target ("module:Class"), the options that make it a variant, and the package it comes from."""

    target: str
    preset: dict[str, Any] = field(default_factory=dict)
    package: str = "nabla-bench"


_NO_FLOW = {"method.flow": False, "optimizer.networks": {}}
_PUBLISHED = {  # the choices of the authors' code
    "method.weighting": "score",
    "method.detach_target": False,
    "method.reverse": "pathwise",
    "method.trust": 1e3,
    "train.data_lag": 1,
}
_PLAIN = {"method.residual": False, "method.reverse": "pathwise"}
_RESIDUAL_DB = {"method.residual": True, "method.reduction": "sum", "method.trust": 0.0, "train.beta_warmup": 0.0}
_GLOBAL = {"method.deviation": {"over": "round", "correction": 0, "epsilon": 1e-4}}  # Flow-GRPO's, NFT's, AWM's
_NFT = _GLOBAL | {
    "method.residual": "old",
    "method.sampler": "old",
    "method.anchors": {"old": 1.0, "prior": 2e-5},
    "method.weight": "clean",
    "method.factor": 5.0,
    "method.old_decay": 0.5,
    "method.fraction": 0.9,
}
_AWM = _GLOBAL | {"method.weight": "likelihood", "method.anchors": {"prior": 1e-3, "ema": 1.0}}
_RVM = _GLOBAL | {"method.scale": 0.1, "method.factor": 0.5, "method.anchors": {"prior": 0.1}}
_RAM = {"method.advantage": "reward", "method.advantage_clip": None, "method.scale": 1.0}
_TILT = {
    "method.advantage": "tilt",
    "method.advantage_clip": None,
    "method.scale": 1.0,
    "method.sampler": "old",
    "method.anchors": {"old": 1.0},
    "method.stages": 8,
}
_PRUNED = {"method.value_network": False, "method.gradient_at": "sample", "method.schedule": "linear"}
_GRPO = {"method.advantage": "group", "method.fraction": 0.5}
_FLOW_GRPO = _GLOBAL | {
    "method.kl": 0.04,
    "method.kl_unit": "rate",
    "train.ema": 0.9,
    "evaluation.weights": "ema",
}
_CPS = _GLOBAL | {"method.density": "square", "method.kl": 0.004, "method.kl_unit": "square"}
_UNBIASED = {"method.deviation": {"over": "group", "correction": 1, "epsilon": 1e-8}}
_GUARD = _GLOBAL | {"method.surrogate": "guard", "method.clip": 2e-6}
_DPPO = _GLOBAL | {"method.surrogate": "mask", "method.advantage_clip": None}
_DPOK = {  # a ratio of summed log-probabilities needs a clip range of PPO's size
    "method.advantage": "reward",
    "method.advantage_clip": None,
    "method.reduction": "sum",
    "method.clip": 0.2,
    "method.kl": 1.0,
}

BUILT_IN: dict[str, dict[str, Plugin]] = {
    "methods": {
        "nabla_gfn": Plugin("methods.nabla_gfn:NablaGFN"),
        "nabla_gfn_noflow": Plugin("methods.nabla_gfn:NablaGFN", _NO_FLOW),
        "nabla_gfn_published": Plugin("methods.nabla_gfn:NablaGFN", _PUBLISHED),
        "nabla_gfn_adjoint": Plugin("methods.nabla_gfn:NablaGFN", {"method.flow_target": "adjoint"}),
        "nabla_db": Plugin("methods.nabla_gfn:NablaGFN", _PLAIN),
        "db": Plugin("methods.db:DB"),
        "res_db": Plugin("methods.db:DB", _RESIDUAL_DB),
        "dag_kl": Plugin("methods.db:DB", {"method.clip": 1e-4}),
        "rtb": Plugin("methods.rtb:RTB"),
        "rtb_softmax": Plugin("methods.rtb:SoftmaxRTB"),
        "tmpo": Plugin("methods.rtb:SoftmaxRTB", {"method.prior": False}),
        "online_dpo": Plugin("methods.online_dpo:OnlineDPO"),
        "vgg_flow": Plugin("methods.vgg_flow:VGGFlow"),
        "vgg_flow_pruned": Plugin("methods.vgg_flow:VGGFlow", _PRUNED),
        "ddpo": Plugin("methods.ddpo:DDPO"),
        "grpo": Plugin("methods.ddpo:DDPO", _GRPO),
        "dpok": Plugin("methods.ddpo:DDPO", _DPOK),
        "flow_grpo": Plugin("methods.flow_grpo:FlowGRPO", _FLOW_GRPO),
        "flow_grpo_cps": Plugin("methods.flow_grpo:FlowGRPO", _CPS),
        "dance_grpo": Plugin("methods.flow_grpo:FlowGRPO", _UNBIASED | {"method.shared_start": True}),
        "mix_grpo": Plugin("methods.flow_grpo:FlowGRPO", _UNBIASED | {"method.window": 4}),
        "grpo_guard": Plugin("methods.flow_grpo:FlowGRPO", _GUARD),
        "flow_dppo": Plugin("methods.flow_grpo:FlowGRPO", _DPPO),
        "nft": Plugin("methods.velocity_matching:VelocityMatching", _NFT),
        "awm": Plugin("methods.velocity_matching:VelocityMatching", _AWM),
        "ram": Plugin("methods.velocity_matching:VelocityMatching", _RAM),
        "rvm": Plugin("methods.velocity_matching:VelocityMatching", _RVM),
        "tilt_matching": Plugin("methods.velocity_matching:VelocityMatching", _TILT),
        "draft": Plugin("methods.draft:DRaFT"),
        "draft_1": Plugin("methods.draft:DRaFT", {"method.depth": 1}),
        "draft_full": Plugin("methods.draft:DRaFT", {"method.depth": 0}),
        "draft_lv": Plugin("methods.draft:DRaFT", {"method.depth": 1, "method.renoise": 2}),
        "leap_align": Plugin("methods.draft:DRaFT", {"method.leap": True}),
        "alignprop": Plugin("methods.draft:DRaFT", {"method.start": (0.84, 0.1), "optimizer.lr": 1e-3}),
        "refl": Plugin("methods.refl:ReFL"),
        "adjoint_matching": Plugin("methods.adjoint_matching:AdjointMatching"),
        "best_of_n": Plugin("methods.best_of_n:BestOfN"),
        "prior": Plugin("methods.prior:Prior"),
    },
    "rewards": {
        "emoji_clip": Plugin("rewards.emoji_clip:EmojiClip"),
        "emoji_style": Plugin("rewards.emoji_style:EmojiStyle"),
        "linear": Plugin("rewards.linear:Linear"),
        "quadratic": Plugin("rewards.quadratic:Quadratic"),
        "colorfulness": Plugin("rewards.colorfulness:Colorfulness"),
        "aesthetic": Plugin("rewards.aesthetic:Aesthetic"),
        "hps": Plugin("rewards.hps:HPS"),
        "image_reward": Plugin("rewards.image_reward:ImageReward"),
        "pickscore": Plugin("rewards.pickscore:PickScore"),
        "clip_score": Plugin("rewards.clip_score:ClipScore"),
        "jpeg_compressibility": Plugin("rewards.jpeg_compressibility:JpegCompressibility"),
        "jpeg_incompressibility": Plugin("rewards.jpeg_compressibility:JpegIncompressibility"),
    },
    "metrics": {
        "reward": Plugin("metrics.reward:RewardGain"),
        "fid_prior": Plugin("metrics.fid_prior:FidPrior"),
        "fid_prior_per_prompt": Plugin("metrics.fid_prior:FidPriorPerPrompt"),
        "kid_prior": Plugin("metrics.kid_prior:KidPrior"),
        "diversity": Plugin("metrics.diversity:Diversity"),
        "diversity_dreamsim": Plugin("metrics.diversity:DiversityDreamSim"),
        "diversity_clip": Plugin("metrics.diversity:DiversityClip"),
        "vendi": Plugin("metrics.vendi:Vendi"),
        "path_kl": Plugin("metrics.path_kl:PathKl"),
        "path_kl_steps": Plugin("metrics.path_kl:PathKlSteps"),
        "sampler_gap": Plugin("metrics.sampler_gap:SamplerGap"),
        "output_norm": Plugin("metrics.output_norm:OutputNorm"),
        "tilt_gap": Plugin("metrics.tilt_gap:TiltGap"),
        "tilt_tv": Plugin("metrics.tilt_tv:TiltTv"),
        "tilt_sw2": Plugin("metrics.tilt_sw2:TiltSw2"),
        "fid_target": Plugin("metrics.fid_target:FidTarget"),
    },
    "models": {  # one that is code alone by its own name, a family of pipelines by its class's, ending in "Pipeline"
        "ring": Plugin("bench.models.analytic:RingModel"),
        "ring_flow": Plugin("bench.models.analytic:RingFlowModel"),
        "gaussian": Plugin("bench.models.analytic:GaussianModel"),
        "gaussian_flow": Plugin("bench.models.analytic:GaussianFlowModel"),
        "StableDiffusionPipeline": Plugin("bench.models.stable_diffusion:StableDiffusion"),
        "StableDiffusionXLPipeline": Plugin("bench.models.sdxl:StableDiffusionXL"),
        "StableDiffusion3Pipeline": Plugin("bench.models.sd3:StableDiffusion3"),
        "FluxPipeline": Plugin("bench.models.flux:Flux"),
        "Flux2KleinPipeline": Plugin("bench.models.flux2:Flux2Klein"),
    },
}


@cache
def plugins(kind: str) -> dict[str, Plugin]:
    """All plugins of a kind ("methods", "rewards", "metrics", "models"): built in, then those of installed packages.

    Of an installed package that claims a taken name, that plugin is left out, with a warning.
    """
    found = dict(BUILT_IN[kind])
    for entry in entry_points(group=f"bench.{kind}"):
        package = entry.dist.name if entry.dist else "?"
        if entry.name in found:
            log.warning(
                "the %s name %r of package %r is already taken by %r: it is left out until its entry point is renamed",
                kind[:-1],
                entry.name,
                package,
                found[entry.name].package,
            )
            continue
        found[entry.name] = Plugin(entry.value, package=package)
    return found


def find(kind: str, name: str) -> Plugin:
    """The plugin of that name, or a BenchError with the nearest names."""
    known = plugins(kind)
    if name not in known:
        raise BenchError(f"unknown {kind[:-1]} {name!r}{did_you_mean(name, known)}")
    return known[name]


def load(kind: str, name: str) -> type:
    """The plugin's class; a BenchError that names the package and the cause if it does not import.

    A reward may also be a weighted sum, "hps+0.1*aesthetic" (see bench.weighted).
    """
    if kind == "rewards" and set(name) & set("+*"):
        from bench.weighted import parse, weighted_sum  # pulls in torch, which a listing of names does not need

        return weighted_sum(name, {term: load(kind, term) for term in parse(name)})
    plugin = find(kind, name)
    module, _, attribute = plugin.target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
        if not isinstance(found, type):
            raise TypeError(f"{attribute} is no class")
        return found
    except (Exception, SystemExit) as error:  # a module that ends the program on import must end its own plugin only
        raise BenchError(
            f"the {kind[:-1]} {name!r} ({plugin.target}, package {plugin.package!r}) does not import: "
            f"{type(error).__name__}: {error}. Repair or uninstall that package."
        ) from error
