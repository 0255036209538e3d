"""Wan 2.1 (text to video), and Wan 2.2 where one transformer denoises at every noise level."""

from collections.abc import Mapping
from typing import Any

from diffusers import WanPipeline
from torch import Tensor

from bench.errors import BenchError
from bench.model import Conditioning
from bench.models.family import Call, Parts, standardised
from bench.models.pipeline import PipelineModel
from bench.models.rules import FLOW_SOLVER, FLOW_SOLVERS, TOKENIZER, Configs, equals, flow_grid, one_of, sides
from bench.models.spec import PipelineSpec
from bench.sampling.kernel import Kernel

TOKENS = 512  # of text: the pipeline's default


class Wan(PipelineModel):
    """A `WanPipeline`: a rectified flow on latents of a causal autoencoder of videos, whose first holds one frame.

    The text states are zeros behind the prompt's. No configuration says how large or how long a video is.
    """

    pipeline_class = WanPipeline
    parts = {
        "transformer": ("WanTransformer3DModel",),
        "vae": ("AutoencoderKLWan",),
        "text_encoder": ("UMT5EncoderModel",),
        "tokenizer": TOKENIZER,
        "scheduler": FLOW_SOLVERS,
    }
    rules = FLOW_SOLVER | {
        "transformer.in_channels": equals(lambda c: c["vae"]["z_dim"], "as many as the autoencoder's latents"),
        "transformer.text_dim": equals(lambda c: c["text_encoder"]["d_model"], "the text encoder's width"),
        "transformer.image_dim": one_of(None),
    }
    denoiser = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    default_size = (480, 832)
    video = True
    alone = True

    @classmethod
    def describe(cls, configs: Configs) -> PipelineSpec:
        """Latents [C, F, H, W]; F − 1 of them hold several frames each."""
        config, vae, picture = configs["transformer"], configs["vae"], configs["picture"]
        more, rest = divmod(picture["frames"] - 1, vae["scale_factor_temporal"])
        if rest:
            several = ", ".join(str(1 + i * vae["scale_factor_temporal"]) for i in range(4))
            raise BenchError(f"model.frames = {picture['frames']}: this autoencoder's videos have {several}, … frames.")
        scale, (_, *patch) = cls.pixels(vae), config["patch_size"]
        return PipelineSpec(
            latent_shape=(config["in_channels"], 1 + more, *sides(picture, scale, scale * max(patch))),
            conditioning={"text": (TOKENS, config["text_dim"])},
            output="flow",
            **flow_grid(configs["scheduler"]),
        )

    def encode_one(self, prompt: str) -> Parts:
        """Text states."""
        text, _ = self.pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=TOKENS, device=self.device
        )
        return {"text": text}

    def call_pipeline(self, pipe: Any, conditioning: Conditioning, z: Tensor, kernel: Kernel, output_type: str) -> Any:
        """See `PipelineModel.call_pipeline`; a video of one frame is a picture."""
        drawn = super().call_pipeline(pipe, conditioning, z, kernel, output_type)
        return drawn[:, 0] if output_type == "pt" and drawn.shape[1] == 1 else drawn

    @staticmethod
    def denoise(call: Call, z: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """See `Family.denoise`."""
        return call(hidden_states=z, timestep=t, encoder_hidden_states=parts["text"], return_dict=False)[0]

    @staticmethod
    def pixels(vae: Mapping[str, Any]) -> int:
        """See `Family.pixels`."""
        return vae["scale_factor_spatial"]

    @staticmethod
    def vae_latents(z: Tensor, vae: Any) -> Tensor:
        """See `Family.vae_latents`."""
        return standardised(z, vae)
