"""Qwen-Image."""

from collections.abc import Mapping
from typing import Any

from diffusers import QwenImagePipeline
from torch import Tensor

from bench.models.family import Call, Parts, padded, standardised
from bench.models.flux import pack, unpack
from bench.models.pipeline import PipelineModel
from bench.models.rules import FLOW_SCHEDULER, FLOW_SCHEDULERS, QWEN_TOKENIZER, Configs, equals, fixed, sides
from bench.models.spec import PipelineSpec

TOKENS = 512  # of text: the pipeline's default


class QwenImage(PipelineModel):
    """A `QwenImagePipeline`: a rectified flow on packed latents, whose guided output is as long as the conditional one.

    The autoencoder is one of videos, which gets a single frame. No configuration says how large a picture is.
    """

    pipeline_class = QwenImagePipeline
    parts = {
        "transformer": ("QwenImageTransformer2DModel",),
        "vae": ("AutoencoderKLQwenImage",),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
        "tokenizer": QWEN_TOKENIZER,
        "scheduler": FLOW_SCHEDULERS,
    }
    rules = FLOW_SCHEDULER | {
        "transformer.in_channels": equals(lambda c: 4 * c["vae"]["z_dim"], "four times the autoencoder's channels"),
        "transformer.joint_attention_dim": equals(
            lambda c: c["text_encoder"]["text_config"]["hidden_size"], "the text encoder's width"
        ),
        **fixed("transformer", guidance_embeds=False, zero_cond_t=False, use_additional_t_cond=False),
        **fixed("scheduler", use_dynamic_shifting=True, time_shift_type="exponential", shift_terminal=0.02),
        **fixed("scheduler", base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192),
    }
    denoiser = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    default_size = (1024, 1024)
    waits = 1
    alone = True

    @classmethod
    def describe(cls, configs: Configs) -> PipelineSpec:
        """The text has a mask beside it, 1 for a token and 0 for padding; the latents are packed 2×2 to a token."""
        config, scale = configs["transformer"], cls.pixels(configs["vae"])
        height, width = sides(configs["picture"], scale, 2 * scale)
        return PipelineSpec(
            latent_shape=(config["in_channels"] // 4, height, width),
            conditioning={"text": (TOKENS, config["joint_attention_dim"]), "mask": (TOKENS,)},
            output="flow",
            spacing="qwen",
            tokens=height * width // 4,
        )

    def encode_one(self, prompt: str) -> Parts:
        """Text states and their mask."""
        text, _ = self.pipeline.encode_prompt(prompt, device=self.device, max_sequence_length=TOKENS)
        return padded(text, TOKENS)

    @classmethod
    def call_texts(cls, parts: Parts) -> dict[str, Any]:
        """See `Family.call_texts`."""
        return {"prompt_embeds": parts["text"], "prompt_embeds_mask": parts["mask"]}

    @staticmethod
    def call_guidance(scale: float) -> dict[str, Any]:
        """See `Family.call_guidance`."""
        return {"true_cfg_scale": scale}

    @staticmethod
    def guide(null: Tensor, output: Tensor, scale: float) -> Tensor:
        """See `Family.guide`; each token is then made as long as the conditional one."""
        guided, conditional = pack(null + scale * (output - null)), pack(output)
        guided = guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return unpack(guided, output.shape[2] // 2, output.shape[3] // 2)

    def pipeline_latents(self, z: Tensor) -> Tensor:
        """See `Family.pipeline_latents`; packed."""
        return pack(z)

    @staticmethod
    def denoise(call: Call, z: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """See `Family.denoise`."""
        rows, columns = z.shape[2] // 2, z.shape[3] // 2
        output = call(
            hidden_states=pack(z),
            timestep=t / 1000,
            encoder_hidden_states=parts["text"],
            encoder_hidden_states_mask=parts["mask"],
            img_shapes=[[(1, rows, columns)]] * len(z),
            return_dict=False,
        )[0]
        return unpack(output, rows, columns)

    @staticmethod
    def pixels(vae: Mapping[str, Any]) -> int:
        """See `Family.pixels`."""
        return 2 ** len(vae["temperal_downsample"])

    @staticmethod
    def vae_latents(z: Tensor, vae: Any) -> Tensor:
        """See `Family.vae_latents`; one frame."""
        return standardised(z.unsqueeze(2), vae)
