"""Names → plugins. A built-in plugin is one line here; any other package announces its own by an entry point.

Targets are imported only when asked for. A variant is a class plus option overrides, keyed like `--set`.
"""

import ast
import contextlib
import importlib.util
import logging
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from bench.errors import BenchError, did_you_mean

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plugin:
    """A name's target ("module:Class"), the options that make it a variant, and the package it comes from.

    text: what it is, in a line; empty: the first of its class's docstring.
    """

    target: str
    preset: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    package: str = "nabla-bench"


_NO_FLOW = {"method.flow": False, "optimizer.networks": {}}
_PUBLISHED = {  # the choices of the authors' code
    "method.weighting": "score",
    "method.detach_target": False,
    "method.reverse": "pathwise",
    "method.reverse_at": "start",
    "method.trust": 1e3,
    "train.data_lag": 1,
}
_PLAIN = {"method.residual": False, "method.reverse": "pathwise", "method.reverse_at": "start"}
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
        "nabla_gfn": Plugin(
            "bench.methods.nabla_gfn:NablaGFN", text="residual ∇-DB (∇-GFlowNet): samples from p_# exp(βr)"
        ),
        "nabla_gfn_noflow": Plugin(
            "bench.methods.nabla_gfn:NablaGFN", _NO_FLOW, "residual ∇-DB's forward loss alone, without the flow network"
        ),
        "nabla_gfn_published": Plugin(
            "bench.methods.nabla_gfn:NablaGFN", _PUBLISHED, "residual ∇-DB with the choices of the authors' code"
        ),
        "nabla_gfn_adjoint": Plugin(
            "bench.methods.nabla_gfn:NablaGFN",
            {"method.flow_target": "adjoint", "method.reverse_at": "start"},
            "residual ∇-DB whose flow network regresses on the lean adjoint; a variant of ours",
        ),
        "nabla_gfn_shared": Plugin(
            "bench.methods.nabla_shared:NablaGFNShared",
            text="residual ∇-DB on neighbouring transitions, which share passes; a variant of ours",
        ),
        "nabla_db": Plugin(
            "bench.methods.nabla_gfn:NablaGFN", _PLAIN, "plain ∇-DB: the prior is the starting point only"
        ),
        "db": Plugin(
            "bench.methods.db:DB", text="DAG-DB: detailed balance against the noising process; β tilts no prior"
        ),
        "res_db": Plugin(
            "bench.methods.db:DB",
            _RESIDUAL_DB,
            "detailed balance against the prior, with a scalar flow: samples from p_# exp(βr)",
        ),
        "dag_kl": Plugin(
            "bench.methods.db:DB",
            {"method.clip": 1e-4},
            "DAG-KL: policy gradient on the flow's advantages against the noising process",
        ),
        "rtb": Plugin(
            "bench.methods.rtb:RTB", text="relative trajectory balance, with a learned log Z: samples from p_# exp(βr)"
        ),
        "rtb_softmax": Plugin(
            "bench.methods.rtb:SoftmaxRTB",
            text="trajectory balance within a prompt's group, without log Z: samples from p_# exp(βr)",
        ),
        "tmpo": Plugin(
            "bench.methods.rtb:SoftmaxRTB",
            {"method.prior": False},
            "TMPO: trajectory balance within a prompt's group, without log Z and without the prior",
        ),
        "online_dpo": Plugin(
            "bench.methods.online_dpo:OnlineDPO", text="Diffusion-DPO on the best and the worst of each group"
        ),
        "vgg_flow": Plugin(
            "bench.methods.vgg_flow:VGGFlow",
            text="VGG-Flow: the velocity is matched to the prior's plus the gradient of a learned value",
        ),
        "vgg_flow_pruned": Plugin(
            "bench.methods.vgg_flow:VGGFlow",
            _PRUNED,
            "VGG-Flow without the value network: the reward's gradient at the finished sample",
        ),
        "ddpo": Plugin(
            "bench.methods.ddpo:DDPO", text="clipped policy gradient with advantages by a prompt's running statistics"
        ),
        "grpo": Plugin(
            "bench.methods.ddpo:DDPO",
            _GRPO,
            "clipped policy gradient with advantages normalised within a prompt's group",
        ),
        "dpok": Plugin(
            "bench.methods.ddpo:DDPO", _DPOK, "policy gradient of βr minus the KL to the prior at the sampled states"
        ),
        "flow_grpo": Plugin(
            "bench.methods.flow_grpo:FlowGRPO",
            _FLOW_GRPO,
            "Flow-GRPO: policy gradient within groups, KL to the prior by the SDE's rate; evaluates an EMA",
        ),
        "flow_grpo_cps": Plugin("bench.methods.flow_grpo:FlowGRPO", _CPS, "Flow-GRPO with FlowCPS's density"),
        "dance_grpo": Plugin(
            "bench.methods.flow_grpo:FlowGRPO",
            _UNBIASED | {"method.shared_start": True},
            "DanceGRPO: all samples of a group start from one noise",
        ),
        "mix_grpo": Plugin(
            "bench.methods.flow_grpo:FlowGRPO",
            _UNBIASED | {"method.window": 4},
            "MixGRPO: noise, and so the gradient, in a moving window of steps",
        ),
        "grpo_guard": Plugin(
            "bench.methods.flow_grpo:FlowGRPO",
            _GUARD,
            "GRPO-Guard: ratios normalised so that one clip range suits every step",
        ),
        "flow_dppo": Plugin(
            "bench.methods.flow_grpo:FlowGRPO", _DPPO, "Flow-GRPO with a mask by divergence in the place of the clip"
        ),
        "nft": Plugin(
            "bench.methods.velocity_matching:VelocityMatching",
            _NFT,
            "DiffusionNFT: regression on good and away from bad samples, noised anew",
        ),
        "awm": Plugin(
            "bench.methods.velocity_matching:VelocityMatching",
            _AWM,
            "AWM: regression on finished samples, noised anew, weighted by their advantage",
        ),
        "ram": Plugin(
            "bench.methods.velocity_matching:VelocityMatching",
            _RAM,
            "RAM: the same regression with β times the reward above the group's mean as the weight",
        ),
        "rvm": Plugin(
            "bench.methods.velocity_matching:VelocityMatching",
            _RVM,
            "RVM: the same regression with normalised advantages, held to the prior",
        ),
        "tilt_matching": Plugin(
            "bench.methods.velocity_matching:VelocityMatching",
            _TILT,
            "tilt matching: regression in stages, each of which tilts the one before by exp(βr / stages)",
        ),
        "draft": Plugin("bench.methods.draft:DRaFT", text="DRaFT-5: backpropagation through the last 5 steps"),
        "draft_1": Plugin(
            "bench.methods.draft:DRaFT", {"method.depth": 1}, "DRaFT-1: backpropagation through the last step"
        ),
        "draft_full": Plugin(
            "bench.methods.draft:DRaFT", {"method.depth": 0}, "DRaFT: backpropagation through all steps"
        ),
        "draft_lv": Plugin(
            "bench.methods.draft:DRaFT",
            {"method.depth": 1, "method.renoise": 2},
            "DRaFT-LV: the last step, averaged over two re-noised copies of it",
        ),
        "leap_align": Plugin(
            "bench.methods.draft:DRaFT",
            {"method.leap": True},
            "LeapAlign: two leaps between random steps stand in for the trajectory's gradient",
        ),
        "alignprop": Plugin(
            "bench.methods.draft:DRaFT",
            {"method.start": (0.84, 0.1), "optimizer.lr": 1e-3},
            "AlignProp: backpropagation from a random step on",
        ),
        "refl": Plugin(
            "bench.methods.refl:ReFL", text="ReFL: reward gradient of the clean prediction at one random late step"
        ),
        "adjoint_matching": Plugin(
            "bench.methods.adjoint_matching:AdjointMatching",
            text="regression of the control on the lean adjoint: samples from p_# exp(βr)",
        ),
        "best_of_n": Plugin("bench.methods.best_of_n:BestOfN", text="nothing trained: draw 8, keep the best"),
        "prior": Plugin("bench.methods.prior:Prior", text="the pretrained model, unchanged"),
    },
    "rewards": {
        "emoji_clip": Plugin("bench.rewards.emoji_clip:EmojiClip"),
        "emoji_style": Plugin("bench.rewards.emoji_style:EmojiStyle"),
        "linear": Plugin("bench.rewards.linear:Linear"),
        "quadratic": Plugin("bench.rewards.quadratic:Quadratic"),
        "colorfulness": Plugin("bench.rewards.colorfulness:Colorfulness"),
        "aesthetic": Plugin("bench.rewards.aesthetic:Aesthetic"),
        "hps": Plugin("bench.rewards.hps:HPS"),
        "image_reward": Plugin("bench.rewards.image_reward:ImageReward"),
        "pickscore": Plugin("bench.rewards.pickscore:PickScore"),
        "clip_score": Plugin("bench.rewards.clip_score:ClipScore"),
        "jpeg_compressibility": Plugin("bench.rewards.jpeg_compressibility:JpegCompressibility"),
        "jpeg_incompressibility": Plugin("bench.rewards.jpeg_compressibility:JpegIncompressibility"),
    },
    "metrics": {
        "reward": Plugin("bench.metrics.reward:RewardGain"),
        "reward_prompts": Plugin("bench.metrics.reward:RewardPrompts"),
        "fid_prior": Plugin("bench.metrics.fid_prior:FidPrior"),
        "fid_prior_per_prompt": Plugin("bench.metrics.fid_prior:FidPriorPerPrompt"),
        "kid_prior": Plugin("bench.metrics.kid_prior:KidPrior"),
        "diversity": Plugin("bench.metrics.diversity:Diversity"),
        "diversity_dreamsim": Plugin("bench.metrics.diversity:DiversityDreamSim"),
        "diversity_clip": Plugin("bench.metrics.diversity:DiversityClip"),
        "vendi": Plugin("bench.metrics.vendi:Vendi"),
        "coverage": Plugin("bench.metrics.coverage:Coverage"),
        "path_kl": Plugin("bench.metrics.path_kl:PathKl"),
        "path_kl_steps": Plugin("bench.metrics.path_kl:PathKlSteps"),
        "sampler_gap": Plugin("bench.metrics.sampler_gap:SamplerGap"),
        "output_norm": Plugin("bench.metrics.output_norm:OutputNorm"),
        "tilt_gap": Plugin("bench.metrics.tilt_gap:TiltGap"),
        "tilt_tv": Plugin("bench.metrics.tilt_tv:TiltTv"),
        "tilt_sw2": Plugin("bench.metrics.tilt_sw2:TiltSw2"),
        "fid_target": Plugin("bench.metrics.fid_target:FidTarget"),
    },
    "models": {  # code alone, without weights
        "ring": Plugin("bench.models.analytic:RingModel"),
        "ring_flow": Plugin("bench.models.analytic:RingFlowModel"),
        "gaussian": Plugin("bench.models.analytic:GaussianModel"),
        "gaussian_flow": Plugin("bench.models.analytic:GaussianFlowModel"),
    },
    "pipelines": {  # families of pipelines, by the class that their model_index.json names
        "StableDiffusionPipeline": Plugin("bench.models.stable_diffusion:StableDiffusion"),
        "StableDiffusionXLPipeline": Plugin("bench.models.sdxl:StableDiffusionXL"),
        "StableDiffusion3Pipeline": Plugin("bench.models.sd3:StableDiffusion3"),
        "FluxPipeline": Plugin("bench.models.flux:Flux"),
        "Flux2KleinPipeline": Plugin("bench.models.flux2:Flux2Klein"),
    },
}


@cache
def plugins(kind: str) -> dict[str, Plugin]:
    """All plugins of a kind (a key of `BUILT_IN`): built in, then those of installed packages.

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


def describe(kind: str, name: str) -> str:
    """A line on a plugin, read without importing it where its source is at hand.

    Raises BenchError for an unknown name, and for a plugin that can be neither read nor imported.
    """
    plugin, found = find(kind, name), None
    if plugin.text:
        return plugin.text
    module, _, attribute = plugin.target.partition(":")
    with contextlib.suppress(Exception):  # whatever stands in the way, the import below says it
        body = ast.parse(Path(importlib.util.find_spec(module).origin).read_bytes()).body
        found = next(ast.get_docstring(n) or "" for n in body if isinstance(n, ast.ClassDef) and n.name == attribute)
    if found is None:
        found = load(kind, name).__doc__
    return (found or "(no description)").strip().partition("\n")[0]


def load(kind: str, name: str) -> Any:
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
