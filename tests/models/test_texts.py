"""What encoders of texts read."""

import pytest
import torch
from example_families import SAMPLES, loaded

from bench.model import Conditioning
from bench.models.catalogue import repository
from bench.models.random_weights import write
from bench.models.sana import INSTRUCTION
from bench.sampling.noise import Noise


@torch.no_grad()
def test_sana_reads_a_prompt_with_the_instruction_and_the_empty_one_without(hub):
    write([repository("sana-600m")], hub, "tiny")
    model = loaded("sana-600m")
    prompt, null = model.encode([""]).parts, model.unconditional().parts
    text, mask, null_text, null_mask = model.pipeline.encode_prompt(
        "", True, complex_human_instruction=INSTRUCTION, max_sequence_length=300
    )
    assert torch.equal(prompt["text"], text) and torch.equal(prompt["mask"], mask.float())
    assert torch.equal(null["text"], null_text) and torch.equal(null["mask"], null_mask.float())
    assert not torch.equal(text, null_text)


@torch.no_grad()
@pytest.mark.parametrize("name", ["z-image-turbo", "qwen-image", "sana-600m"])
def test_padding_of_a_text_changes_nothing(hub, name):
    """What stands there is not read, whatever it is."""
    write([repository(name)], hub, "tiny")
    model = loaded(name)
    z, t, text = (
        Noise(0, "train", SAMPLES)(0, model.latent_shape),
        torch.tensor(500.0),
        model.encode(["cat", "", "a fox"]),
    )
    states, mask = text.parts["text"], text.parts["mask"]
    assert len(set(mask.sum(1).tolist())) > 1
    other = Conditioning({"text": states + 10 * (1 - mask)[..., None], "mask": mask})
    assert torch.equal(model.predict(z, t, other), model.predict(z, t, text))
