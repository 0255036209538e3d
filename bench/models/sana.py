"""Sana 600M and 1600M, 1.0 and 1.5."""

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import SanaPipeline
from torch import Tensor

from bench.model import Conditioning
from bench.models.family import Call, Parts
from bench.models.pipeline import PipelineModel
from bench.models.rules import FLOW_SOLVER, FLOW_SOLVERS, SIDE, Configs, equals, fixed, flow_grid
from bench.models.spec import PipelineSpec

TOKENS = 300  # of text: the pipeline's default
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class Sana(PipelineModel):
    """A `SanaPipeline`: a rectified flow by a transformer with linear attention, on latents of a deep autoencoder.

    A language model reads each prompt after an instruction to enhance it; the text states are those of its first token
    and the prompt's. The empty or negative prompt is read without the instruction.
    """

    pipeline_class = SanaPipeline
    parts = {
        "transformer": ("SanaTransformer2DModel",),
        "vae": ("AutoencoderDC",),
        "text_encoder": ("Gemma2Model",),
        "tokenizer": ("GemmaTokenizer", "GemmaTokenizerFast"),
        "scheduler": FLOW_SOLVERS,
    }
    rules = FLOW_SOLVER | {
        "transformer.sample_size": SIDE,
        "transformer.in_channels": equals(
            lambda c: c["vae"]["latent_channels"], "as many as the autoencoder's latents"
        ),
        "transformer.caption_channels": equals(lambda c: c["text_encoder"]["hidden_size"], "the text encoder's width"),
        **fixed("transformer", guidance_embeds=False, timestep_scale=1.0),
    }
    denoiser = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    alone = True
    call_options = {"use_resolution_binning": False}  # the latents have the size that is wanted

    @classmethod
    def describe(cls, configs: Configs) -> PipelineSpec:
        """The text has a mask beside it, 1 for a token and 0 for padding."""
        config = configs["transformer"]
        return PipelineSpec(
            latent_shape=(config["in_channels"], config["sample_size"], config["sample_size"]),
            conditioning={"text": (TOKENS, config["caption_channels"]), "mask": (TOKENS,)},
            output="flow",
            **flow_grid(configs["scheduler"]),
        )

    def encode_one(self, prompt: str) -> Parts:
        """Text states and their mask."""
        return self._read(prompt, INSTRUCTION)

    def encode_null(self, prompt: str) -> Parts:
        """See `Family.encode_null`."""
        return self._read(prompt, None)

    def _read(self, prompt: str, instruction: list[str] | None) -> Parts:
        text, mask, _, _ = self.pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=TOKENS,
            complex_human_instruction=instruction,
        )
        return {"text": text, "mask": mask.to(text.dtype)}

    @classmethod
    def call_texts(cls, parts: Parts) -> dict[str, Any]:
        """See `Family.call_texts`."""
        return {"prompt_embeds": parts["text"], "prompt_attention_mask": parts["mask"]}

    def pipeline_inputs(self, conditioning: Conditioning) -> dict[str, Any]:
        """See `PipelineModel.pipeline_inputs`; its default for the negative prompt would stand beside our text."""
        return super().pipeline_inputs(conditioning) | {"negative_prompt": None}

    @staticmethod
    def pixels(vae: Mapping[str, Any]) -> int:
        """See `Family.pixels`."""
        return 2 ** (len(vae["encoder_block_out_channels"]) - 1)

    @staticmethod
    def denoise(call: Call, z: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """See `Family.denoise`."""
        return call(z, parts["text"], t, encoder_attention_mask=parts["mask"], return_dict=False)[0]
