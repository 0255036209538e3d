"""HPSv3 and GenEval 2, loaded by the real code from scaled-down random checkpoints, against the published forward."""

import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from bench.rewards import geneval2, hpsv3
from bench.rewards.geneval2 import GenEval2, answer_forms, first_tokens
from bench.rewards.hpsv3 import INSTRUCTION, PIXELS, HPSv3
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bench.diagnose.selftest.checking import derivative_error
from bench.errors import BenchError
from bench.evaluation.scores import load_reward
from bench.models.random_weights import write
from bench.models.vision_language import IMAGE

SIZES = [(64, 96), (96, 96)]
PROMPTS = ["a red apple", "Two cats, one dog."]
ATOMS = {
    "a red apple": [["Is the apple red?", "yes"]],
    "Two cats, one dog.": [["How many cats are there?", "two"], ["Is there a dog in the image?", "Yes"]],
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> str:
    cache = tmp_path_factory.mktemp("vl")
    write([*HPSv3.files, *GenEval2.files], cache, "tiny")
    return str(cache)


@pytest.fixture
def cache(checkpoints, monkeypatch) -> str:
    monkeypatch.setenv("HF_HUB_CACHE", checkpoints)
    return checkpoints


def pictures(height: int, width: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    blocks = rng.random((2, height // 8, width // 8, 3)).repeat(8, 1).repeat(8, 2)
    return [Image.fromarray((255 * image).astype(np.uint8)) for image in blocks]


def as_tensor(images: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).float() / 255


def processed(folder, images: list[Image.Image], **options) -> dict[str, Tensor]:
    """Pixels as transformers makes them with PIL, on 8-bit images."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    return dict(Qwen2VLImageProcessorPil(**settings | options)(images, return_tensors="pt"))


def published_scores(reward: HPSv3, image: Image.Image, prompt: str) -> tuple[Tensor, Tensor]:
    """μ and log σ as the published code computes them: the image is embedded apart, so the network sees no image.

    Then those with the positions that Qwen2-VL itself gives to an image's rows and columns.
    """
    network, tokenizer = reward.network, reward.reader.tokenizer
    seen = processed(hpsv3.BASE.path(), [image], min_pixels=PIXELS, max_pixels=PIXELS)
    text = INSTRUCTION.replace("{prompt}", prompt)
    marks = IMAGE * int(seen["image_grid_thw"].prod() // 4)
    chat = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"{marks}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(chat, return_tensors="pt").input_ids
    embedded = network.get_input_embeddings()(ids)
    parts = network.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output
    embedded[0, ids[0] == tokenizer.convert_tokens_to_ids(IMAGE)] = parts
    plain = network.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    types = (ids == tokenizer.convert_tokens_to_ids(IMAGE)).int()
    own = network(input_ids=ids, **seen, mm_token_type_ids=types, use_cache=False).last_hidden_state
    state = load_file(hpsv3.WEIGHTS.path("HPSv3.safetensors"))
    outputs = []
    for hidden in (plain, own):
        x = hidden[ids == tokenizer.convert_tokens_to_ids("<|Reward|>")].float()
        for number in (0, 3, 5):
            x = x @ state[f"rm_head.{number}.weight"].T + state[f"rm_head.{number}.bias"]
            x = x if number == 5 else x.relu()
        outputs.append(x[0])
    return outputs[0], outputs[1]


@torch.no_grad()
def test_hpsv3_is_the_published_forward_pass(cache):
    """What is left is PIL's rounding to 8 bits. Positions of image rows and columns would give other scores."""
    reward = load_reward("hpsv3")
    for size in SIZES:
        images = pictures(*size)
        found = reward.outputs(as_tensor(images), PROMPTS)
        pairs = [published_scores(reward, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
        expected, own = (torch.stack(list(column)) for column in zip(*pairs, strict=True))
        assert (found - expected).abs().max() < 0.005
        assert (own - expected).abs().max() > 0.02
        assert (expected[0] - expected[1]).abs().min() > 0.01
    assert torch.equal(reward(as_tensor(images), PROMPTS), found[:, 0])


def test_hpsv3_reads_the_published_words(cache):
    """SHA-256 of what hpsv3 1.0.0 makes of this prompt; a prompt that holds the token itself changes nothing else."""
    text = INSTRUCTION.replace("{prompt}", "a red cat")
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "decf2973d0dd1860e8bb1521c1144e6bd1eacc3a1bed12e3acc8cec5bad51fc1"
    )
    reward, x = load_reward("hpsv3"), as_tensor(pictures(56, 56))
    with torch.no_grad():
        scores = reward(x, ["a <|Reward|> cat"] * 2)
    assert scores.isfinite().all() and scores[0] != scores[1]


def test_hpsv3_loads_every_weight_or_refuses(cache, tmp_path, monkeypatch):
    reward = load_reward("hpsv3")
    state = load_file(hpsv3.WEIGHTS.path("HPSv3.safetensors"))
    assert "visual.blocks.0.attn.qkv.weight" in state and "model.layers.1.mlp.up_proj.weight" in state
    loaded = [*reward.network.parameters(), *reward.head.parameters()]
    assert sum(p.numel() for p in loaded) == sum(v.numel() for v in state.values()) - state["lm_head.weight"].numel()
    assert torch.equal(
        reward.network.language_model.layers[1].mlp.up_proj.weight, state["model.layers.1.mlp.up_proj.weight"]
    )
    assert reward.head(torch.zeros(1, 32)).dtype == torch.float32 and not reward.network.training
    del state["model.layers.1.mlp.up_proj.weight"]
    shutil.copytree(cache, tmp_path / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    save_file(state, hpsv3.WEIGHTS.path("HPSv3.safetensors"))
    with pytest.raises(BenchError, match="the weights do not fit Qwen2-VL"):
        load_reward("hpsv3")


def asked(prompts: dict[str, list] = ATOMS, **options) -> GenEval2:
    reward = load_reward("geneval2", options)
    reward.set_metadata({prompt: {"atoms": json.dumps(atoms)} for prompt, atoms in prompts.items()})
    return reward


@torch.no_grad()
def first_token(reward: GenEval2, image: Image.Image, question: str) -> Tensor:
    """The distribution [vocabulary] of the first token that the model generates, greedily, before any rule."""
    seen = processed(geneval2.WEIGHTS.path(), [image])
    marks = IMAGE * int(seen["image_grid_thw"].prod() // 4)
    chat = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"{marks}<|vision_end|>{question} Answer in one word.<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = reward.reader.tokenizer(chat, return_tensors="pt")
    types = (ids.input_ids == reward.reader.tokenizer.convert_tokens_to_ids(IMAGE)).int()
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return reward.network.generate(**ids, **seen, mm_token_type_ids=types, **options).logits[0][0].softmax(0)


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_geneval2_is_the_mean_probability_of_the_answers(cache, mean):
    reward, images = asked(mean=mean, batch=2), pictures(64, 96)
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        right = [
            float(first_token(reward, image, question)[first_tokens(reward.reader, question, answer)].sum())
            for question, answer in ATOMS[prompt]
        ]
        expected.append(math.prod(right) ** (1 / len(right)) if mean == "geometric" else sum(right) / len(right))
    with torch.no_grad():
        found = reward(as_tensor(images), PROMPTS)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0.02, atol=1e-5)


def test_geneval2_counts_a_token_once(cache):
    """The forms with a space begin with the same token here; added up one by one it would count three times."""
    reader = load_reward("geneval2").reader
    assert {*answer_forms("How many dogs?", "two")} == {"two", " two", "Two", " Two", "2", " 2"}
    tokens = [reader.tokenizer.encode(form)[0] for form in answer_forms("How many dogs?", "two")]
    assert len(tokens) == 6 and len(set(tokens)) == 4
    assert first_tokens(reader, "How many dogs?", "two") == sorted(set(tokens))
    yes = [reader.tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "yes", "ĠYes", "Ġyes")]
    assert first_tokens(reader, "Is it red?", "yes") == sorted(yes)


@pytest.mark.parametrize(
    ("atoms", "words"),
    [
        ([], "there are none"),
        ([["How many?", "many"]], "a number from zero to ten"),
        ([["Red?", "no"]], "answered by yes"),
        ("text", "is no list like"),
        ([["Red?"]], "is no list like"),
        ([["How many?", 2]], "is no list like"),
    ],
)
def test_geneval2_refuses_what_it_cannot_ask(cache, atoms, words):
    with pytest.raises(BenchError, match=words):
        asked({"a": atoms})(torch.rand(1, 3, 64, 64), ["a"])


def test_geneval2_refuses_prompts_without_questions(bench, untried, cache):
    for reward in ("geneval2", "colorfulness+geneval2"):
        status, text = bench("run", "ddpo", "--reward", reward, "--model", "emoji", "--prompts", "emoji", "--dry-run")
        assert status == 2
        assert f"{reward}: the reward reads the column 'atoms' of the prompt file" in " ".join(text.split())
    with pytest.raises(BenchError, match="column 'atoms' of the prompt file, which has nothing there for 'a'"):
        load_reward("geneval2")(torch.rand(1, 3, 64, 64), ["a"])


@pytest.mark.parametrize("name", ["hpsv3", "geneval2"])
def test_the_gradient_is_the_derivative(cache, name, monkeypatch):
    """And neighbours, with the padding that they ask for, change no score."""
    monkeypatch.setattr(hpsv3, "INSTRUCTION", "{prompt} <|Reward|>")  # the tiny vocabulary has letters: 2,600 of them
    reward = asked() if name == "geneval2" else load_reward(name)
    x = as_tensor(pictures(56, 84)).requires_grad_()
    assert derivative_error(lambda x: reward(x, PROMPTS), x) < 0.03
    with torch.no_grad():
        together = reward(x, PROMPTS)
        alone = [reward(x[row : row + 1], PROMPTS[row : row + 1]) for row in range(2)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-6)
