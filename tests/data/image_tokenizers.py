"""Small image tokenizers with random weights, of every class that is read, saved the way their libraries save them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CODES = 40
STRIDE = 2
NAMES = ("emu3", "janus", "chameleon", "diffusers", "torchscript")
DECODING = tuple(name for name in NAMES if name != "chameleon")


def make_network(name: str, *, seed: int = 0) -> Any:
    """A network of two levels: 40 codes of 2x2 pixels."""
    torch.manual_seed(seed)
    if name == "torchscript":
        return Pair().eval()
    if name == "diffusers":
        import diffusers

        network = diffusers.VQModel(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            num_vq_embeddings=CODES,
            vq_embed_dim=4,
            latent_channels=4,
        ).eval()
        # As it is initialized, one code would win nearly everywhere.
        network.quantize.embedding.weight.data.normal_()
        return network
    import transformers

    small = {"embed_dim": 4, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
    if name == "emu3":
        config = transformers.Emu3VQVAEConfig(
            codebook_size=CODES, latent_channels=4, hidden_size=32, attn_resolutions=[1], **small
        )
        return transformers.Emu3VQVAE(config)
    if name == "janus":
        config = transformers.JanusVQVAEConfig(num_embeddings=CODES, latent_channels=32, num_patches=4, **small)
        return transformers.JanusVQVAE(config)
    config = transformers.ChameleonVQVAEConfig(num_embeddings=CODES, latent_channels=32, resolution=8, **small)
    return transformers.ChameleonVQVAE(config)


class Pair(nn.Module):
    """A convolution to scores of codes, and one back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Scores()
        self.decoder = Colours()


class Scores(nn.Module):
    """Ids and, as Cosmos's encoders do, something else behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, CODES, STRIDE, stride=STRIDE)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.layer(images)
        return scores.argmax(dim=1), scores


class Colours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CODES, 4)
        self.layer = nn.ConvTranspose2d(4, 3, STRIDE, stride=STRIDE)

    def forward(self, codes: Tensor) -> Tensor:
        return self.layer(self.table(codes).permute(0, 3, 1, 2))


def save_network(name: str, network: Any, folder: Path) -> Path:
    """Save a network into a folder that doesn't exist yet."""
    if name != "torchscript":
        network.save_pretrained(folder)
        return folder
    folder.mkdir()
    for part in ("encoder", "decoder"):
        torch.jit.script(getattr(network, part)).save(str(folder / f"{part}.pt"))
    description = {"version": 1, "kind": "torchscript", "codebook_size": CODES, "stride": STRIDE, "channels": 3}
    (folder / "codec.json").write_text(json.dumps(description))
    return folder


def scaled(name: str, pixels: np.ndarray) -> Tensor:
    """What a network sees of pixels uint8 [images, height, width, 3], by the words of its image processor."""
    values = torch.from_numpy(pixels.astype(np.float64)).permute(0, 3, 1, 2)
    return (values * 0.0078 - 1 if name == "chameleon" else values * 2 / 255 - 1).float()


def encode_directly(name: str, network: Any, pixels: np.ndarray) -> np.ndarray:
    """Codes [images, rows, columns] by the class's own method."""
    images, height, width = pixels.shape[:3]
    with torch.inference_mode():
        seen = scaled(name, pixels)
        if name == "emu3":
            ids = torch.stack(network.encode(seen, torch.tensor([[height, width]] * images)).image_tokens)
        elif name in ("janus", "chameleon"):
            ids = network.encode(seen).image_tokens
        elif name == "diffusers":
            ids = network.quantize(network.encode(seen).latents)[2][2]
        else:
            ids = network.encoder(seen)[0]
    return ids.reshape(images, height // STRIDE, width // STRIDE).numpy()


def decode_directly(name: str, network: Any, codes: np.ndarray) -> np.ndarray:
    """Pixels float64 [images, height, width, 3], neither rounded nor clipped, by the class's own method."""
    ids = torch.from_numpy(codes)
    with torch.inference_mode():
        if name == "emu3":
            images = network.decode(ids)
        elif name == "janus":
            images = network.decode(ids.reshape(len(ids), -1))
        elif name == "diffusers":
            vectors = network.quantize.embedding(ids).permute(0, 3, 1, 2)
            images = network.decode(vectors, force_not_quantize=True).sample
        else:
            images = network.decoder(ids)
    return (images.permute(0, 2, 3, 1).numpy().astype(np.float64) + 1) * 127.5
