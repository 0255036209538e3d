"""Names → plugins. A built-in plugin is one line here; any other package announces its own by an entry point.

Targets are imported only when asked for.
"""

import ast
import contextlib
import importlib.util
import logging
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from bench.errors import BenchError, did_you_mean

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plugin:
    """A name's target, "module:Class", and the package that it comes from."""

    target: str
    package: str = "nabla-bench"


BUILT_IN: dict[str, dict[str, Plugin]] = {
    "methods": {
        "nabla_gfn": Plugin("bench.methods.nabla.residual:NablaGFN"),
        "nabla_gfn_noflow": Plugin("bench.methods.nabla.residual:NablaGFNNoFlow"),
        "nabla_gfn_published": Plugin("bench.methods.nabla.published:NablaGFNPublished"),
        "nabla_gfn_adjoint": Plugin("bench.methods.nabla.adjoint:NablaGFNAdjoint"),
        "nabla_db": Plugin("bench.methods.nabla.published:NablaDB"),
        "db": Plugin("bench.methods.balance.db:DB"),
        "res_db": Plugin("bench.methods.balance.db:ResDB"),
        "dag_kl": Plugin("bench.methods.balance.dag_kl:DAGKL"),
        "rtb": Plugin("bench.methods.balance.rtb:RTB"),
        "rtb_softmax": Plugin("bench.methods.balance.softmax:SoftmaxRTB"),
        "tmpo": Plugin("bench.methods.balance.softmax:TMPO"),
        "online_dpo": Plugin("bench.methods.online_dpo:OnlineDPO"),
        "vgg_flow": Plugin("bench.methods.vgg_flow:VGGFlow"),
        "vgg_flow_pruned": Plugin("bench.methods.vgg_flow:VGGFlowPruned"),
        "ddpo": Plugin("bench.methods.policy_gradient.ddpo:DDPO"),
        "grpo": Plugin("bench.methods.policy_gradient.grpo:GRPO"),
        "dpok": Plugin("bench.methods.policy_gradient.dpok:DPOK"),
        "flow_grpo": Plugin("bench.methods.policy_gradient.flow_grpo:FlowGRPO"),
        "flow_grpo_cps": Plugin("bench.methods.policy_gradient.flow_cps:FlowCPS"),
        "dance_grpo": Plugin("bench.methods.policy_gradient.dance_grpo:DanceGRPO"),
        "mix_grpo": Plugin("bench.methods.policy_gradient.mix_grpo:MixGRPO"),
        "grpo_guard": Plugin("bench.methods.policy_gradient.grpo_guard:GRPOGuard"),
        "flow_dppo": Plugin("bench.methods.policy_gradient.flow_dppo:FlowDPPO"),
        "gardo": Plugin("bench.methods.policy_gradient.gardo:GARDO"),
        "tempflow_grpo": Plugin("bench.methods.policy_gradient.tempflow_grpo:TempFlowGRPO"),
        "flash_grpo": Plugin("bench.methods.policy_gradient.flash_grpo:FlashGRPO"),
        "nft": Plugin("bench.methods.regression.nft:NFT"),
        "awm": Plugin("bench.methods.regression.awm:AWM"),
        "ram": Plugin("bench.methods.regression.ram:RAM"),
        "rvm": Plugin("bench.methods.regression.rvm:RVM"),
        "tilt_matching": Plugin("bench.methods.regression.tilt_matching:TiltMatching"),
        "iterative_tilting": Plugin("bench.methods.regression.iterative_tilting:IterativeTilting"),
        "dgpo": Plugin("bench.methods.regression.dgpo:DGPO"),
        "crd": Plugin("bench.methods.regression.crd:CRD"),
        "draft": Plugin("bench.methods.backprop.draft:DRaFT"),
        "draft_1": Plugin("bench.methods.backprop.draft:DRaFT1"),
        "draft_full": Plugin("bench.methods.backprop.draft:DRaFTFull"),
        "draft_kl": Plugin("bench.methods.backprop.draft:DRaFTKL"),
        "draft_lv": Plugin("bench.methods.backprop.draft:DRaFTLV"),
        "leap_align": Plugin("bench.methods.backprop.leap_align:LeapAlign"),
        "alignprop": Plugin("bench.methods.backprop.alignprop:AlignProp"),
        "refl": Plugin("bench.methods.backprop.refl:ReFL"),
        "dmdr": Plugin("bench.methods.dmdr:DMDR"),
        "value_matching": Plugin("bench.methods.value_matching:ValueMatching"),
        "adjoint_matching": Plugin("bench.methods.adjoint_matching:AdjointMatching"),
        "best_of_n": Plugin("bench.methods.best_of_n:BestOfN"),
        "soft_best_of_n": Plugin("bench.methods.best_of_n:SoftBestOfN"),
        "fk_steering": Plugin("bench.methods.fk_steering:FKSteering"),
        "prior": Plugin("bench.methods.prior:Prior"),
        "judged": Plugin("bench.methods.judged:Judged"),
    },
    "rewards": {
        "emoji_clip": Plugin("bench.rewards.emoji_clip:EmojiClip"),
        "emoji_gold": Plugin("bench.rewards.emoji_gold:EmojiGold"),
        "emoji_preference": Plugin("bench.rewards.emoji_preference:EmojiPreference"),
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
        "hpsv3": Plugin("bench.rewards.hpsv3:HPSv3"),
        "geneval2": Plugin("bench.rewards.geneval2:GenEval2"),
        "ocr": Plugin("bench.rewards.ocr:OCR"),
        "vlm": Plugin("bench.rewards.vlm:VLM"),
        "remote": Plugin("bench.rewards.remote:Remote"),
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
        "tilt_within": Plugin("bench.metrics.tilt_within:TiltWithin"),
        "tilt_sw2": Plugin("bench.metrics.tilt_sw2:TiltSw2"),
        "fid_target": Plugin("bench.metrics.fid_target:FidTarget"),
        "share_tv": Plugin("bench.metrics.share_tv:ShareTv"),
        "within_mode": Plugin("bench.metrics.within_mode:WithinMode"),
        "prior_nll": Plugin("bench.metrics.prior_nll:PriorNll"),
        "target_sw2": Plugin("bench.metrics.target_sw2:TargetSw2"),
    },
    "models": {  # a class each, whose weights, if any, ship with it
        "ring": Plugin("bench.models.analytic:RingModel"),
        "ring_flow": Plugin("bench.models.analytic:RingFlowModel"),
        "ring_flow_turbo": Plugin("bench.models.analytic:RingFlowTurboModel"),
        "gaussian": Plugin("bench.models.analytic:GaussianModel"),
        "gaussian_flow": Plugin("bench.models.analytic:GaussianFlowModel"),
        "emoji_mixture": Plugin("bench.models.mixture:EmojiMixture"),
        "emoji_mixture_flow": Plugin("bench.models.mixture:EmojiMixtureFlow"),
    },
    "pipelines": {  # families of pipelines, by the class that their model_index.json names
        "StableDiffusionPipeline": Plugin("bench.models.stable_diffusion:StableDiffusion"),
        "StableDiffusionXLPipeline": Plugin("bench.models.sdxl:StableDiffusionXL"),
        "StableDiffusion3Pipeline": Plugin("bench.models.sd3:StableDiffusion3"),
        "FluxPipeline": Plugin("bench.models.flux:Flux"),
        "Flux2KleinPipeline": Plugin("bench.models.flux2:Flux2Klein"),
        "ZImagePipeline": Plugin("bench.models.z_image:ZImage"),
        "QwenImagePipeline": Plugin("bench.models.qwen_image:QwenImage"),
        "SanaPipeline": Plugin("bench.models.sana:Sana"),
        "WanPipeline": Plugin("bench.models.wan:Wan"),
    },
}


@cache
def plugins(kind: str) -> dict[str, Plugin]:
    """All plugins of a kind (a key of `BUILT_IN`): built in, then those of installed packages.

    Of an installed package that claims a taken name, that plugin is left out, with a warning.
    """
    by_name = dict(BUILT_IN[kind])
    for entry in entry_points(group=f"bench.{kind}"):
        package = entry.dist.name if entry.dist else "?"
        if entry.name in by_name:
            log.warning(
                "the %s name %r of package %r is already taken by %r: it is left out until its entry point is renamed",
                kind[:-1],
                entry.name,
                package,
                by_name[entry.name].package,
            )
            continue
        by_name[entry.name] = Plugin(entry.value, package=package)
    return by_name


def find(kind: str, name: str) -> Plugin:
    """The plugin of that name, or a BenchError with the nearest names."""
    by_name = plugins(kind)
    if name not in by_name:
        raise BenchError(f"unknown {kind[:-1]} {name!r}{did_you_mean(name, by_name)}")
    return by_name[name]


def describe(kind: str, name: str) -> str:
    """A line on a plugin, read without importing it where its source is at hand.

    Raises BenchError for an unknown name, and for a plugin that can be neither read nor imported.
    """
    plugin, docstring = find(kind, name), None
    module, _, attribute = plugin.target.partition(":")
    with contextlib.suppress(Exception):  # whatever stands in the way, the import below says it
        spec = importlib.util.find_spec(module)
        body = ast.parse(Path(spec.origin).read_bytes()).body if spec and spec.origin else []
        (node,) = (n for n in body if isinstance(n, ast.ClassDef) and n.name == attribute)
        docstring = ast.get_docstring(node) or ""
    if docstring is None:
        docstring = load(kind, name).__doc__
    return (docstring or "(no description)").strip().partition("\n")[0]


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
        plugin_class = getattr(importlib.import_module(module), attribute)
        if not isinstance(plugin_class, type):
            raise TypeError(f"{attribute} is no class")
        return plugin_class
    except (Exception, SystemExit) as error:  # a module that ends the program on import must end its own plugin only
        raise BenchError(
            f"the {kind[:-1]} {name!r} ({plugin.target}, package {plugin.package!r}) does not import: "
            f"{type(error).__name__}: {error}. Repair or uninstall that package."
        ) from error
