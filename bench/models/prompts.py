"""What a pipeline's text encoders make of prompts: encoded once, remembered, and stored on disk."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.model import Conditioning
from bench.models.family import Family, Parts
from bench.models.folder import read
from bench.models.lora import Adapters
from bench.models.prompt_store import PromptStore
from bench.runtime.finite import require_finite_weights
from bench.settings import ModelConfig

PRIOR = "prior."  # how the names of the conditioning's parts begin that the prior's own text encoders made
TEXT_ENCODER = "text_encoder"  # how the names of such parts begin
TEXTS = 256  # encoded prompts that are remembered: FLUX's are 4 MB each


class PromptEncoder(Family):
    """The half of a pipeline that reads prompts; `bench.models.pipeline` has the other.

    With `model.offload` the text encoders load for prompts that are not stored, and wait on the CPU.
    """

    pipeline: Any
    folder: Path
    config: ModelConfig
    guidance: float
    device: torch.device
    _components: dict[str, Any]
    _prior_dtype: torch.dtype
    _store: PromptStore | None
    _texts: dict[str | None, Conditioning]  # None: what guidance starts from
    _encoders: Sequence[Adapters]  # of the text encoders, where what is judged has changed them too

    def open(self, dtype: torch.dtype = torch.float32, without: Iterable[str] = ()) -> Any:
        """The pipeline as diffusers reads it from the folder, on the CPU; the decoder is in float32.

        without: parts that are left out.
        """
        index = read(self.folder / "model_index.json")
        absent = {name: None for name, part in index.items() if part == [None, None]}  # has to be said once more
        pipe = self.pipeline_class.from_pretrained(
            self.folder,
            dtype={"default": dtype, "vae": torch.float32},
            use_safetensors=True,
            local_files_only=True,
            **absent | dict(self.unused) | self._components | dict.fromkeys(without),
        )
        pipe.set_progress_bar_config(disable=True)
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
                require_finite_weights(part.state_dict(prefix=f"{name}.").items(), self.folder)
        return pipe

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """One row per prompt. Each prompt is encoded alone, and the last `TEXTS` are remembered."""
        self._require(dict.fromkeys(prompts))
        for prompt in prompts:
            self._texts[prompt] = self._texts.pop(prompt)
        whole = Conditioning.join([self._texts[prompt] for prompt in prompts])
        for old in list(self._texts)[:-TEXTS]:
            del self._texts[old]
        return whole

    def unconditional(self) -> Conditioning:
        """The row of the empty or the negative prompt, which guidance starts from."""
        self._require([None])
        return self._texts[None]

    def _require(self, prompts: Iterable[str | None]) -> None:
        """Encode the prompts whose rows are neither here nor on the disk; None: what guidance starts from."""
        if absent := [prompt for prompt in prompts if not self._remembered(prompt)]:
            with self._encoding(), torch.no_grad():
                for prompt in absent:
                    parts = self._encode_both(prompt)
                    self._texts[prompt] = Conditioning(parts)
                    if self._store:
                        self._store.add(parts, *self._text_key(prompt))

    def _remembered(self, prompt: str | None) -> bool:
        """Whether the prompt's row is here, or is now, read from the disk."""
        if prompt not in self._texts and self._store and (parts := self._store.find(*self._text_key(prompt))):
            self._texts[prompt] = Conditioning(parts).to(self.device)
        return prompt in self._texts

    def _text_key(self, prompt: str | None) -> tuple[str, list[Any]]:
        """The text, and what its parts depend on besides the encoders: some families put guidance and sizes in."""
        text = self.config.negative_prompt if prompt is None else prompt
        return text, [prompt is None, self.guidance, list(self.latent_shape)]

    def _encode_both(self, prompt: str | None) -> Parts:
        """A prompt's parts, and beside them the prior's where other text encoders made them."""
        text, _ = self._text_key(prompt)
        encode = self.encode_null if prompt is None else self.encode_one
        parts = encode(text)
        if self._encoders:
            with ExitStack() as off:
                for adapters in self._encoders:
                    off.enter_context(adapters.off())
                parts |= {PRIOR + name: part for name, part in encode(text).items()}
        return parts

    def pipeline_inputs(self, conditioning: Conditioning) -> dict[str, Any]:
        """Keywords of the pipeline's own call for these rows and this guidance."""
        inputs = self.call_texts(conditioning.parts)
        if self.rows(self.guidance) > 1:
            null = self.call_texts(self.unconditional().expand(len(conditioning)).parts)
            inputs |= {f"negative_{keyword}": text for keyword, text in null.items()}
        return inputs | self.call_guidance(self.guidance)

    def _load_encoders(self) -> dict[str, Any]:
        """The text encoders by name, loaded now if that was put off."""
        pipe, names = self.pipeline, [name for name in self.pipeline.components if name.startswith(TEXT_ENCODER)]
        if self._store and not all(getattr(pipe, name) for name in self._store.encoders):
            loaded = self.open(self._prior_dtype, without=(self.denoiser, "vae"))
            pipe.register_modules(**{name: getattr(loaded, name) for name in self._store.encoders})
        return {name: part for name in names if (part := getattr(pipe, name)) is not None}

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """A block in which the text encoders are on the device; with `model.offload` they wait on the CPU."""
        encoders = self._load_encoders().values() if self.config.offload else ()
        for encoder in encoders:
            encoder.to(self.device)
        try:
            yield
        finally:
            for encoder in encoders:
                encoder.to("cpu")
