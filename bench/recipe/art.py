"""The art behind the embedded prior: fetching it, naming it, and turning it into augmented training images."""

import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from bench.models.emoji import STYLES

SIZE = 32  # pixels a side of every training image
ART_SIZE = 64  # pixels a side of the art as it is kept; the factor two is what the augmentation averages over

# style: (npm package, path of one picture in its archive, SHA-256 of the archive)
PACKAGES = {
    "noto": (
        "emoji-datasource-google@16.0.0",
        "package/img/google/64/{}.png",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "twemoji": (
        "emoji-datasource-twitter@16.0.0",
        "package/img/twitter/64/{}.png",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "fluent": (
        "@lobehub/fluent-emoji-3d@1.1.0",
        "package/assets/{}.webp",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
}

# Concepts by category, as emoji short names; "short=name" where the short name is not a plain English word.
# Only what can be recognised at 32 pixels is here: a sharp prior of a hundred concepts beats a blurred one of more.
CONCEPTS = {
    "animal": """mouse cow tiger rabbit cat horse monkey_face=monkey dog pig hamster wolf polar_bear=polar+bear bear
        panda_face=panda lion_face=lion unicorn_face=unicorn bat fox_face=fox deer gorilla rhinoceros
        giraffe_face=giraffe zebra_face=zebra hedgehog kangaroo llama hippopotamus raccoon sloth otter orangutan skunk
        beaver moose donkey koala elephant sheep camel poodle mammoth frog""",
    "bird": """rooster chicken baby_chick=chick penguin dove_of_peace=dove turkey eagle duck owl peacock parrot swan
        flamingo goose""",
    "insect": "snail bug=caterpillar ant bee ladybug spider scorpion butterfly mosquito beetle",
    "sea animal": """whale octopus shell=seashell fish tropical_fish=tropical+fish blowfish dolphin crab shark shrimp
        squid lobster seal coral jellyfish""",
    "reptile": "dragon_face=dragon crocodile snake turtle lizard sauropod=dinosaur t-rex",
    "fruit": """grapes melon watermelon tangerine=orange lemon banana pineapple mango apple green_apple=green+apple pear
        peach cherries strawberry blueberries kiwifruit=kiwi tomato olive coconut""",
    "vegetable": """chestnut hot_pepper=chili corn mushroom eggplant avocado cucumber potato carrot broccoli
        leafy_green=lettuce garlic onion bell_pepper=bell+pepper ginger_root=ginger pea_pod=peas""",
}


@dataclass(frozen=True)
class Concept:
    """One thing that every style draws: its plain name, all its names, its category and its code points."""

    name: str
    names: tuple[str, ...]
    category: str
    codepoint: str


def fetch(cache: Path) -> dict[str, Path]:
    """The archive of each style in ``cache``, fetched with ``npm pack`` where absent. OSError on a wrong checksum."""
    cache.mkdir(parents=True, exist_ok=True)
    archives = {}
    for style, (package, _, digest) in PACKAGES.items():
        archive = cache / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
        if not archive.exists():
            subprocess.run(["npm", "pack", package, "--pack-destination", str(cache)], check=True)
        if hashlib.sha256(archive.read_bytes()).hexdigest() != digest:
            raise OSError(f"{archive} is not the published {package}: delete it and run again")
        archives[style] = archive
    return archives


def load(cache: Path) -> tuple[list[Concept], torch.Tensor]:
    """All concepts and their art ``[concept, style, 4, 64, 64]``, uint8 RGB premultiplied by the alpha in plane 3."""
    archives = fetch(cache)
    with tarfile.open(archives["noto"]) as tar:
        table = {entry["short_name"]: entry for entry in json.loads(_read(tar, "package/emoji.json"))}
    concepts = []
    for category, words in CONCEPTS.items():
        for word in words.split():
            short, _, name = word.partition("=")
            name = (name or short).replace("+", " ")
            official = table[short]["name"].lower().replace(" face", "")
            names = tuple(dict.fromkeys((name, official, short.replace("_face", "").replace("_", " "))))
            concepts.append(Concept(name, names, category, table[short]["unified"].lower()))
    art = torch.empty(len(concepts), len(STYLES), 4, ART_SIZE, ART_SIZE, dtype=torch.uint8)
    for s, style in enumerate(STYLES):
        wanted = {PACKAGES[style][1].format(c.codepoint): i for i, c in enumerate(concepts)}
        wanted |= {PACKAGES[style][1].format(c.codepoint.replace("-fe0f", "")): i for i, c in enumerate(concepts)}
        seen = set()
        with tarfile.open(archives[style]) as tar:
            for member in tar:
                if member.name in wanted:
                    seen.add(wanted[member.name])
                    art[wanted[member.name], s] = _pixels(_read(tar, member))
        if len(seen) < len(concepts):
            raise OSError(f"{archives[style]} lacks {[c.name for i, c in enumerate(concepts) if i not in seen]}")
    return concepts, art


def _read(archive: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise OSError(f"{member} is no file")
    return file.read()


def _pixels(data: bytes) -> torch.Tensor:
    # premultiplied before resizing, or edges pick up dark fringes
    image = Image.open(io.BytesIO(data)).convert("RGBA").convert("RGBa")
    return torch.from_numpy(np.array(image.resize((ART_SIZE, ART_SIZE), Image.Resampling.LANCZOS))).permute(2, 0, 1)


def caption(concept: Concept, style: str, rng: np.random.Generator, category_only: float = 0.05) -> str:
    """A random caption: the style word in half of them, now and then nothing but the category."""
    if rng.random() < category_only:
        core = concept.category
    else:
        # the plain name is what people will type, so it is drawn most often
        core = concept.name if rng.random() < 0.7 else str(rng.choice(concept.names))
    if rng.random() < 0.5:
        forms = ["{s} {c}", "{c}, {s} style", "a {s} {c}", "{c} in {s} style"]
    else:
        forms = ["{c}", "{c}", "{c}", "the {c}", "{c} emoji", "a picture of {c}", "{c}, {k}"]
    return str(rng.choice(forms)).format(s=style, c=core, k=concept.category)


def augment(art: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Training images ``[B, 3, 32, 32]`` in [0, 1] from art ``[B, 4, 64, 64]``, uint8 and premultiplied.

    Nuisance factors: background colour (half white, a tenth dark), scale 0.8-1, shift, horizontal flip.
    """
    b = len(art)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    scale = 0.8 + 0.2 * uniform(b)
    flip = torch.where(uniform(b) < 0.5, -1.0, 1.0)
    shift = (2 * uniform(b, 2) - 1) * (1.1 - scale)[:, None]  # small pictures wander further
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = flip / scale, 1 / scale, shift
    grid = F.affine_grid(theta, [b, 4, ART_SIZE, ART_SIZE], align_corners=False)
    moved = F.grid_sample(art.float() / 255, grid, align_corners=False)
    kind = uniform(b, 1)
    colour = uniform(b, 3)
    background = torch.where(kind < 0.45, 1.0, torch.where(kind < 0.55, 0.25 * colour, 0.35 + 0.65 * colour))
    image = moved[:, :3] + (1 - moved[:, 3:]) * background[:, :, None, None]
    return F.avg_pool2d(image, ART_SIZE // SIZE).clamp(0, 1)
