"""Feature spaces: the libraries' own code on local random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance as clean_frechet_distance
from cleanfid.fid import get_folder_features
from PIL import Image
from torch import Tensor, nn

from bench.diagnose.selftest.device import device, recording
from bench.errors import BenchError
from bench.evaluation.features import SPACES, ClipL, DreamSim, InceptionV3, find_space
from bench.evaluation.statistics import frechet_distance


def images(seed: int, count: int = 6, side: int = 40) -> Tensor:
    """8-bit images [n, 3, side, side] as float, of a brightness that depends on the seed."""
    rng = np.random.default_rng(seed)
    blocks = rng.random((count, 3, side // 8, side // 8)).repeat(8, 2).repeat(8, 3) * (1 - 0.2 * seed)
    return torch.from_numpy((255 * blocks).astype(np.uint8)).float() / 255


class Layers(nn.Module):
    """A small network with Inception's interface: 299-pixel images in, 2048 numbers out."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 16, stride=16)
        self.linear = nn.Linear(8 * 18 * 18, 2048)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.convolution(x)).flatten(1))


class StandIn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture
def inception(tmp_path, monkeypatch) -> InceptionV3:
    """clean-fid's wrapper around the stand-in, read from this project's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = InceptionV3.files[0].path
    assert folder == tmp_path / "nabla-bench" / "inception"
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        torch.jit.script(StandIn()).save(str(folder / "inception-2015-12-05.pt"))
    return InceptionV3()


def test_inception_features_are_clean_fids(inception, tmp_path):
    """The same images as PNG files through clean-fid's own walk over a folder, resizer and wrapper."""
    features = []
    for seed in (0, 1):
        batch = images(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        for i, image in enumerate(batch):
            pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / f"{i}.png")
        walked = get_folder_features(
            str(folder), inception.network, num_workers=0, device=torch.device("cpu"), mode="clean", verbose=False
        )
        found = inception(batch)
        assert found.shape == (6, 2048)
        np.testing.assert_allclose(found.numpy(), walked, rtol=1e-4, atol=1e-4)
        features.append(found)
    ours = frechet_distance(*features)
    assert ours > 1
    # the full matrix root of clean-fid takes a minute in 2048 dimensions; a slice of them takes none
    part = [feature[:, :16].double().numpy() for feature in features]
    moments = [m for x in part for m in (x.mean(0), np.cov(x, rowvar=False))]
    assert frechet_distance(*map(torch.from_numpy, part)) == pytest.approx(clean_frechet_distance(*moments), rel=1e-5)


def test_inception_on_a_device(inception):
    """All but TorchScript, which no device in Python can hold: the same layers as modules are there in its place."""
    expected = inception(images(0))
    layers = Layers()
    layers.load_state_dict(inception.network.layers.state_dict())
    with recording():
        inception.device, inception.network.layers = device(), layers.to(device())
        found = inception(images(0).to(device()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_clip_features_depend_on_the_image_alone(hub):
    space = ClipL()
    x = images(0)
    found = space(x)
    assert found.shape == (6, 16)
    torch.testing.assert_close(space(x[2:3]), found[2:3], rtol=1e-4, atol=1e-5)
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_an_unknown_space_is_told():
    with pytest.raises(BenchError, match="did you mean 'inception_v3'"):
        find_space("inception")
    assert {"inception_v3", "dreamsim_open_clip_vitb32", "clip_vitl14", "efficientnet_lite0"} <= SPACES.keys()


@pytest.mark.slow
def test_dreamsim_on_random_weights(tmp_path, monkeypatch):
    """The package's own network (it exists full-size only, 335 MB), loader, LoRA and embedding."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_dreamsim(DreamSim.files[0].path)
    assert not DreamSim.files[0].missing()
    space = DreamSim()
    x = images(0)
    found = space(x)
    assert found.shape == (6, 512)
    distance = space.network(torch.nn.functional.interpolate(x[:1], 224), torch.nn.functional.interpolate(x[1:2], 224))
    assert 0 < float(distance) < 2
    unit = torch.nn.functional.normalize(found, dim=1)
    x224 = torch.nn.functional.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    expected = space.network(x224[:1], x224[1:2])
    assert 1 - float(unit[0] @ unit[1]) == pytest.approx(float(expected), rel=1e-4)
    with recording():
        there = DreamSim(device())(x.to(device()))
    torch.testing.assert_close(there, found, rtol=1e-4, atol=1e-4)


def write_dreamsim(folder: Path) -> None:
    """Random weights under the names of the released archive."""
    from dreamsim.feature_extraction.vision_transformer import vit_base
    from dreamsim.model import PerceptualModel
    from peft import LoraConfig, get_peft_model

    folder.mkdir(parents=True)
    network = vit_base(patch_size=32)
    network.pos_drop = nn.LayerNorm(network.embed_dim)
    state = network.state_dict() | {"proj": torch.randn(768, 512) / 768**0.5}
    torch.save({"state_dict": state}, folder / "open_clip_vitb32_pretrain.pth.tar")
    model = PerceptualModel("open_clip_vitb32", "embedding", "32", lora=True, load_dir=str(folder), device="cpu")
    lora = LoraConfig(r=16, lora_alpha=0.5, lora_dropout=0.3, bias="none", target_modules=["qkv"])
    get_peft_model(model, lora).save_pretrained(folder / "open_clip_vitb32_single_lora")
