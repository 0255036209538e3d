"""A pipeline without its weights: what checking, estimating memory and loading share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bench.errors import BenchError
from bench.model import Conditioning, ModelSpec


@dataclass(frozen=True, eq=False, kw_only=True)
class PipelineSpec(ModelSpec):
    """What a pipeline's configuration files say of it.

    conditioning: shape of one row of every part of a `Conditioning`; "text" holds the text states, their width last.
    guided: whether it can be sampled with guidance; False for one that was distilled to none.
    """

    conditioning: Mapping[str, tuple[int, ...]]
    guided: bool = True

    def require_guidance(self, guidance: float, source: object) -> None:
        """Raise BenchError for a guidance scale other than 1 of a pipeline that has no guidance."""
        if guidance != 1 and not self.guided:
            raise BenchError(f"{source} was distilled to no guidance: use sampler.guidance=1.")

    def latent_network(self, channels: Sequence[int], layers_per_block: int = 1) -> nn.Module:
        """A small text-conditioned UNet; see `DiffusionModel.latent_network`. Frames are further channels to it."""
        return _LatentUNet(self.latent_shape, channels, layers_per_block, self.conditioning["text"][-1])


class _LatentUNet(nn.Module):
    """`(z, t, text) → [B, *latent]`. Weight and bias of the last layer are zero at first, and so is the output."""

    def __init__(self, latent_shape: tuple[int, ...], channels: Sequence[int], layers_per_block: int, text_width: int):
        from diffusers import UNet2DConditionModel  # seconds to import, and a model of points needs none

        super().__init__()
        levels = len(channels)
        unet: Any = UNet2DConditionModel(
            sample_size=latent_shape[-1],
            in_channels=math.prod(latent_shape[:-2]),
            out_channels=math.prod(latent_shape[:-2]),
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
            cross_attention_dim=text_width,
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            norm_num_groups=min(32, channels[0]),
        )
        nn.init.zeros_(unet.conv_out.weight)
        nn.init.zeros_(unet.conv_out.bias)
        self.unet = unet

    def forward(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        text = conditioning.parts["text"].float()
        return self.unet(z.flatten(1, -3), t, encoder_hidden_states=text, return_dict=False)[0].view_as(z)
