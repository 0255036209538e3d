"""The embedded priors: small latent text-to-image pipelines, two reward networks, and the recipe that made them.

``path()`` is the folder of shipped weights. It is laid out as diffusers and transformers write such folders, so
``StableDiffusionPipeline.from_pretrained(path())`` and ``CLIPModel.from_pretrained(path() / "clip")`` need no code from
here. ``FLOW`` holds the transformer of ``emoji_flow``, whose other parts are those of ``path()``:
``StableDiffusion3Pipeline.from_pretrained(FLOW, **shared(FLOW))``. ``python -m bench.recipe.train`` makes the weights,
``python -m bench.recipe.evaluate`` measures them. ``turbo/`` has the adapters of their students of 4 steps, which
``python -m bench.recipe.distil`` makes and measures; ``student(FLOW)`` in the place of ``shared(FLOW)`` loads one.
"""

import json
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parent / "weights"
FLOW = Path(__file__).parent / "flow"
TURBO = Path(__file__).parent / "turbo"
PREFERENCE = Path(__file__).parent / "preference"  # of the rewards `emoji_preference` and `emoji_gold`
STYLES = ("noto", "twemoji", "fluent")
GUIDANCE = 3.0  # best measured trade of fidelity against variety at 20 steps; see README.md


def path() -> Path:
    """Folder of the shipped weights: the pipeline itself, and below it ``clip/``, ``style/`` and ``concepts.json``."""
    return WEIGHTS


def concepts() -> list[dict]:
    """What the prior can draw: one entry per concept with ``name``, ``names``, ``category`` and ``codepoint``."""
    return json.loads((path() / "concepts.json").read_text(encoding="utf-8"))


def shared(folder: Path) -> dict[str, Any]:
    """Parts of the pipeline in ``folder`` that ship with another, by the pipeline's names: none but for ``FLOW``.

    One text encoder serves as both that the pipeline asks for; its pooled states are handed on as they are.
    """
    if folder != FLOW:
        return {}
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    text = CLIPTextModel.from_pretrained(WEIGHTS / "text_encoder", dtype=torch.float32)
    config = CLIPTextConfig.from_dict(text.config.to_dict() | {"projection_dim": text.config.hidden_size})
    encoder = CLIPTextModelWithProjection(config)
    encoder.text_model.load_state_dict(getattr(text, "text_model", text).state_dict())  # nested until transformers 5
    encoder.text_projection.weight.data = torch.eye(config.hidden_size)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    return {
        "vae": AutoencoderKL.from_pretrained(WEIGHTS / "vae", torch_dtype=torch.float32),
        "text_encoder": encoder.eval(),
        "text_encoder_2": encoder,
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        **dict.fromkeys(("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor")),  # which it lacks
    }


def student(folder: Path) -> dict[str, Any]:
    """The `shared` parts of the pipeline in ``folder``, and the denoiser of its few-step student."""
    import torch
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel
    from safetensors.torch import load_file

    if folder == FLOW:
        name, part, kind = "emoji_flow", "transformer", SD3Transformer2DModel
    else:
        name, part, kind = "emoji", "unet", UNet2DConditionModel
    network = kind.from_pretrained(folder / part, torch_dtype=torch.float32)
    network.load_lora_adapter(load_file(TURBO / name / "pytorch_lora_weights.safetensors"), prefix=part)
    network.fuse_lora()
    network.unload_lora()
    return shared(folder) | {part: network}
