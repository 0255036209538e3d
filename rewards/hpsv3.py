"""HPSv3: Qwen2-VL with a head trained on human preferences between images of one prompt."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bench import Config, Reward
from bench.errors import BenchError
from bench.hub import Repository
from bench.models.vision_language import READER, Reader, reader_dtype

WEIGHTS = Repository("MizzenAI/HPSv3", ("HPSv3.safetensors",), size=16_600_000_000)
BASE = Repository("Qwen/Qwen2-VL-7B-Instruct", READER, size=7_100_000)
TOKEN = "<|Reward|>"
PIXELS = 256 * 28 * 28  # of every image, about: both sides are multiples of 28

# What the network was trained to read, space for space: hpsv3/dataset/data_collator_qwen.py of its repository (MIT)
INSTRUCTION = Path(__file__).with_suffix(".txt").read_text(encoding="utf8")


class HPSv3(Reward):
    """The mean μ of the preference score, from the hidden state of Qwen2-VL-7B at a token of its own.

    As when it was trained, all tokens have the places 0, 1, 2, … of a text: the published code hands the network the
    embedded image, so that the image's rows and columns are no part of the positions. The score is not divided by 15,
    as one library does.
    """

    scale = "preference score μ, usually 0 to 15"
    source = "Ma et al. (2025), arXiv:2508.03789; MizzenAI/HPSv3"
    suite = "sd15-hps"
    files = (WEIGHTS, BASE)

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        self.reader = Reader(BASE.path(), (PIXELS, PIXELS))
        self.reader.tokenizer.add_tokens([TOKEN], special_tokens=True)
        self.token = self.reader.tokenizer.convert_tokens_to_ids(TOKEN)
        state = load_file(WEIGHTS.path(WEIGHTS.files[0]))
        self.head = _head({name: state.pop(name).float() for name in list(state) if name.startswith("rm_head.")})
        self.head.to(self.device)
        self.network = _network(state, reader_dtype(self.device)).to(self.device)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.outputs(images, prompts)[:, 0]

    def outputs(self, images: Tensor, prompts: list[str]) -> Tensor:
        """μ and log σ, float32 [B, 2]; `P(A ≻ B) = E[sigmoid(μ_A − μ_B + √(σ_A² + σ_B²) ξ)]`, ξ standard normal."""
        inputs = self.reader(images, [INSTRUCTION.replace("{prompt}", prompt) for prompt in prompts])
        rows, length = inputs["input_ids"].shape
        places = torch.arange(length, device=images.device).expand(3, rows, length)
        states = self.network(**inputs, position_ids=places, use_cache=False).last_hidden_state
        order = torch.arange(length, device=images.device) * (inputs["input_ids"] == self.token)
        last = order.argmax(1)  # a prompt may hold the token too
        return self.head(states[torch.arange(rows, device=images.device), last].float())


def _network(state: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Qwen2-VL without its own head, from the checkpoint's tensors, under the names of whatever version wrote them."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration  # take seconds

    config = Qwen2VLConfig.from_pretrained(BASE.path(), local_files_only=True)
    config.text_config.vocab_size = next(len(v) for name, v in state.items() if name.endswith("embed_tokens.weight"))
    model, loading = Qwen2VLForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    if wrong := {kind: names for kind, names in loading.items() if names}:
        raise BenchError(f"{WEIGHTS.source}: the weights do not fit Qwen2-VL ({str(wrong)[:200]}): fetch them again.")
    return model.model.eval().requires_grad_(False)


def _head(state: dict[str, Tensor]) -> nn.Sequential:
    """The three layers, with their sizes; the gaps in the numbers are activations and dropout, idle here."""
    weights = [state[f"rm_head.{number}.weight"] for number in (0, 3, 5)]
    linear = [nn.Linear(weight.shape[1], weight.shape[0], device="meta") for weight in weights]
    head = nn.Sequential(linear[0], nn.ReLU(), nn.Identity(), linear[1], nn.ReLU(), linear[2])
    head.load_state_dict({name.removeprefix("rm_head."): tensor for name, tensor in state.items()}, assign=True)
    return head.requires_grad_(False)
