"""Train a small text-to-video model on the world of world.py, and write it as a diffusers folder.

    python examples/demo_model/train.py vae --out runs/demo              # frames <-> latents
    python examples/demo_model/train.py decoder --out runs/demo          # the same latents, sharper frames
    python examples/demo_model/train.py text --out runs/demo             # prompts -> text states
    python examples/demo_model/train.py text-to-video --out runs/demo    # noise + text states -> latents
    python examples/demo_model/train.py export --out runs/demo           # -> runs/demo/checkpoint

Every stage saves its state every few minutes and goes on from there when started again. Needs torch,
diffusers and transformers (the [parity] extra).
"""

import argparse
import copy
import json
import math
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import world
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
)
from diffusers.models.resnet import TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

TOKENS = 24
SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    rescale_betas_zero_snr=True,
    clip_sample=False,
    set_alpha_to_one=False,
)


RECOMMENDED = dict(num_frames=world.FRAMES, num_inference_steps=8, guidance_scale=2.0)


class Run:
    """A model under training: its average, optimizer, step and random state, kept in one file.

    Args:
        path: of the state file; read where it exists.
        total: steps in all; the learning rate follows a cosine from `rate` to a twentieth of it.
        threads: a number, or a file that holds one and is read again now and then.
    """

    def __init__(self, model: nn.Module, path: Path, *, total: int, rate: float, threads: str, decay: float):
        self.model, self.path, self.total, self.rate, self.decay = model, path, total, rate, decay
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.rng = np.random.default_rng(0)
        self.threads, self.step, self.seconds = threads, 0, 0.0
        if path.exists():
            self._load(torch.load(path, weights_only=False))
        self._saved = self._mark = time.monotonic()
        self._losses: list[float] = []

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.bit_generator.state = state["numpy"]
        torch.set_rng_state(state["torch"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Write the state beside its place, then put it there."""
        state = dict(
            model=self.model.state_dict(),
            average=self.average.state_dict(),
            optimizer=self.optimizer.state_dict(),
            numpy=self.rng.bit_generator.state,
            torch=torch.get_rng_state(),
            step=self.step,
            seconds=self.seconds,
        )
        beside = self.path.with_suffix(".part")
        torch.save(state, beside)
        os.replace(beside, self.path)
        self._saved = time.monotonic()

    def steps(self) -> Iterator[int]:
        """The steps that are left; call `learn` once in each. SIGTERM ends them early, with all saved."""
        asked: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
        while self.step < self.total and not asked:
            if self.step % 20 == 0:
                set_threads(self.threads)
            yield self.step
        self.save()

    def learn(self, loss: Tensor) -> None:
        """One step of the optimizer and of the average; prints and saves when it is time."""
        warm = min((self.step + 1) / 100, 1)
        rate = self.rate * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * self.step / self.total)) / 2)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        keep = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            pairs = list(self.average.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(*pairs, 1 - keep)
        self.step += 1
        self._losses.append(loss.item())
        now = time.monotonic()
        self.seconds += now - self._mark
        self._mark = now
        if self.step % 50 == 0:
            mean = sum(self._losses) / len(self._losses)
            print(f"step {self.step}/{self.total}  loss {mean:.5f}  {self.seconds / 60:.1f} min", flush=True)
            self._losses.clear()
        if now - self._saved > 180:
            self.save()


def set_threads(threads: str) -> None:
    """Obey a number of threads, or a file that holds one; 0 in the file means wait."""
    while True:
        count = int(Path(threads).read_text()) if Path(threads).is_file() else int(threads)
        if count > 0:
            break
        time.sleep(2)
    if count != torch.get_num_threads():
        torch.set_num_threads(count)


def to_images(frames: np.ndarray) -> Tensor:
    """(..., H, W, 3) in [0, 1] -> (N, 3, H, W) in [-1, 1]."""
    flat = torch.from_numpy(frames).reshape(-1, *frames.shape[-3:])
    return (flat * 2 - 1).permute(0, 3, 1, 2).contiguous()


# The VAE: 64x64x3 pixels <-> 8x8x8 latents.


def new_vae() -> AutoencoderKL:
    """An untrained VAE whose latents start with little noise."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=world.SIZE,
        force_upcast=False,
    )
    nn.init.zeros_(vae.quant_conv.weight[8:])
    nn.init.constant_(vae.quant_conv.bias[8:], -6.0)
    return vae


def train_vae(out: Path, threads: str, total: int) -> None:
    """Frames of random clips, one a clip; absolute and squared error and a light pull to N(0, 1)."""
    torch.manual_seed(0)
    run = Run(new_vae(), out / "vae.pt", total=total, rate=1.5e-3, threads=threads, decay=0.995)
    for _ in run.steps():
        clips = [world.render(world.sample_attributes(run.rng), run.rng) for _ in range(8)]
        images = to_images(np.stack([clip[run.rng.integers(world.FRAMES)] for clip in clips]))
        latents = run.model.encode(images).latent_dist
        error = run.model.decode(latents.sample()).sample - images
        # Mostly squared error: under absolute error alone the plain ground is a place to stay.
        loss = 4 * error.square().mean() + 0.2 * error.abs().mean() + 1e-4 * latents.kl().mean() / 512
        run.learn(loss)


def load_vae(out: Path) -> AutoencoderKL:
    """The trained VAE of a run, with each latent channel moved and scaled to mean 0 and deviation 1.

    The change goes into the 1x1 convolutions on both sides of the latents and cancels out in the frames.
    """
    vae = new_vae()
    vae.load_state_dict(torch.load(out / "vae.pt", weights_only=False)["average"])
    vae.eval().requires_grad_(False)
    measured = out / "latents_measured.pt"
    if not measured.exists():
        rng = np.random.default_rng(1)
        frames = np.stack([world.render(world.sample_attributes(rng), rng)[::4] for _ in range(64)])
        latents = vae.encode(to_images(frames)).latent_dist.mean  # (N, 8, 8, 8)
        torch.save((latents.mean((0, 2, 3)), latents.std((0, 2, 3))), measured)
    mean, deviation = torch.load(measured)
    into, back = vae.quant_conv, vae.post_quant_conv
    back.bias += back.weight[..., 0, 0] @ mean
    back.weight *= deviation[None, :, None, None]
    into.bias[:8] -= mean
    into.bias[:8] /= deviation
    into.weight[:8] /= deviation[:, None, None, None]
    into.bias[8:] -= 2 * deviation.log()
    vae.register_to_config(scaling_factor=1.0)
    if (out / "decoder.pt").exists():
        decoder_of(vae).load_state_dict(torch.load(out / "decoder.pt", weights_only=False)["average"])
    return vae


def decoder_of(vae: AutoencoderKL) -> nn.ModuleDict:
    """The network between the latents and the frames."""
    return nn.ModuleDict(dict(decoder=vae.decoder, post_quant_conv=vae.post_quant_conv))


def train_decoder(out: Path, threads: str, total: int) -> None:
    """Sharpen the decoder for latents that stay as they are, give or take a little noise."""
    torch.manual_seed(0)
    vae = load_vae(out)
    model = decoder_of(vae).requires_grad_(True)
    run = Run(model, out / "decoder.pt", total=total, rate=1e-3, threads=threads, decay=0.995)
    for _ in run.steps():
        clips = [world.render(world.sample_attributes(run.rng), run.rng) for _ in range(8)]
        images = to_images(np.stack([clip[run.rng.integers(world.FRAMES)] for clip in clips]))
        latents = vae.encode(images).latent_dist.mean
        error = vae.decode(latents + 0.05 * torch.randn_like(latents)).sample - images
        run.learn(4 * error.square().mean() + 0.2 * error.abs().mean())


# The text encoder: a word is a token; every state from the end mark on is taught to hold the whole prompt.


def byte_pairs(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary and merges that make a token of each word; other text falls to letters and bytes."""
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters]
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while any(len(split) > 1 for split in pieces.values()):
        pairs = Counter(pair for split in pieces.values() for pair in pairwise(split))
        best = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(best)
        tokens.append("".join(best))
        for word, split in pieces.items():
            merged: list[str] = []
            for piece in split:
                if merged and (merged[-1], piece) == best:
                    merged[-1] += piece
                else:
                    merged.append(piece)
            pieces[word] = merged
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path) -> None:
    """The four files of a slow CLIP tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = byte_pairs(world.vocabulary())
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    marks = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    marks |= dict(pad_token="<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(json.dumps(marks, indent=2) + "\n")
    config = dict(tokenizer_class="CLIPTokenizer", model_max_length=TOKENS, do_lower_case=True, **marks)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def new_text_encoder(vocabulary: int) -> CLIPTextModel:
    """An untrained text encoder, 64 wide, two layers deep."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act="gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config)


def all_prompts() -> tuple[list[str], np.ndarray]:
    """Every prompt of the world, and (P, 5) word numbers in it, the open ones last."""
    choices = list(product(*((*words, None) for words in world.ATTRIBUTES.values())))
    prompts = [world.prompt_of(dict(zip(world.ATTRIBUTES, words, strict=True))) for words in choices]
    counts = [range(len(words) + 1) for words in world.ATTRIBUTES.values()]
    return prompts, np.array(list(product(*counts)))


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Prompts -> ids (P, TOKENS)."""
    padded = tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True)
    return torch.tensor(padded["input_ids"])


def train_text(out: Path, threads: str, total: int) -> None:
    """Read all attributes from one random state behind the end mark; now and then with a strange word."""
    torch.manual_seed(0)
    write_tokenizer(out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    encoder = new_text_encoder(len(tokenizer))
    sizes = [len(words) + 1 for words in world.ATTRIBUTES.values()]
    model = nn.ModuleDict(dict(encoder=encoder, probe=nn.Linear(64, sum(sizes))))
    run = Run(model, out / "text.pt", total=total, rate=2e-3, threads=threads, decay=0.98)
    prompts, answers = all_prompts()
    letters = list("abcdefghijklmnopqrstuvwxyz")
    for _ in run.steps():
        chosen = run.rng.integers(len(prompts), size=64)
        texts = []
        for i in chosen:
            words = prompts[i].split() if run.rng.random() < 0.9 or i != len(prompts) - 1 else []
            if run.rng.random() < 0.25:
                strange = "".join(run.rng.choice(letters, run.rng.integers(2, 7)))
                words.insert(int(run.rng.integers(len(words) + 1)), strange)
            texts.append(" ".join(words))
        ids = tokenize(tokenizer, texts)
        states = run.model["encoder"](ids).last_hidden_state
        ends = ids.eq(len(tokenizer) - 1).int().argmax(1)
        at = [int(run.rng.integers(end, TOKENS)) for end in ends.tolist()]
        logits = run.model["probe"](states[torch.arange(len(at)), at]).split(sizes, dim=1)
        truth = torch.from_numpy(answers[chosen])
        run.learn(sum(F.cross_entropy(guess, truth[:, k]) for k, guess in enumerate(logits)))


def load_text(out: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The trained tokenizer and text encoder of a run."""
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    encoder = new_text_encoder(len(tokenizer))
    average = torch.load(out / "text.pt", weights_only=False)["average"]
    encoder.load_state_dict({k[8:]: v for k, v in average.items() if k.startswith("encoder.")})
    return tokenizer, encoder.eval().requires_grad_(False)


# The UNet.


def new_unet() -> UNet3DConditionModel:
    """An untrained UNet without dropout; its temporal layers do little yet but tell the frames apart."""
    unet = UNet3DConditionModel(
        sample_size=world.SIZE // 8,
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=16,
    )
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, TemporalConvLayer):
            nn.init.normal_(module.conv4[-1].weight, std=0.01)
        elif isinstance(module, TransformerTemporalModel):
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)
    for block in unet.down_blocks:
        number_frames(block.temp_convs[0])
    return unet


def number_frames(layer: TemporalConvLayer) -> None:
    """Let half the channels of a temporal layer start as a code of the frame's place in the clip.

    Nothing else in the network knows that place, and what a direction means hangs on it. The half starts as
    constants (weight 0 and a random bias in its first norm). Convolutions padded with zeros then see the ends
    of the clip, 4 frames far together, and make a different vector of each frame, which is added to the rest.
    """
    random = torch.Generator().manual_seed(1)
    half = layer.conv1[0].num_channels // 2
    with torch.no_grad():
        layer.conv1[0].weight[:half] = 0
        layer.conv1[0].bias[:half] = torch.randn(half, generator=random)
        for block in (layer.conv1, layer.conv2, layer.conv3):
            weight = block[-1].weight
            weight[:half] = 0
            weight[:half, :half] = torch.randn(half, half, 3, 1, 1, generator=random) / half**0.5
            block[-1].bias[:half] = 0
        out = layer.conv4[-1].weight
        out[:, :half] = 0.5 * torch.randn(2 * half, half, 3, 1, 1, generator=random) / half**0.5


def quicken_temporal_layers() -> None:
    """For training only: a still passes by the temporal layers; (3, 1, 1) convolutions run as (3, 1) ones."""

    def convolve(layer: nn.Conv3d, x: Tensor) -> Tensor:
        batch, _, frames, height, width = x.shape
        flat = x.reshape(batch, -1, frames, height * width)
        flat = F.conv2d(flat, layer.weight[..., 0], layer.bias, padding=(1, 0))
        return flat.reshape(batch, -1, frames, height, width)

    def convolutions(self: TemporalConvLayer, hidden_states: Tensor, num_frames: int = 1) -> Tensor:
        if num_frames == 1:
            return hidden_states
        n, channels, height, width = hidden_states.shape
        video = hidden_states.reshape(n // num_frames, num_frames, channels, height, width)
        video = video.permute(0, 2, 1, 3, 4).contiguous()  # (B, C, F, H, W)
        x = video
        for block in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = convolve(block[-1], F.silu(block[0](x)))
        return (video + x).permute(0, 2, 1, 3, 4).reshape(n, channels, height, width)

    attention = TransformerTemporalModel.forward

    def transformer(self: TransformerTemporalModel, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("num_frames", 1) == 1:
            return (hidden_states,)
        return attention(self, hidden_states, *args, **kwargs)

    TemporalConvLayer.forward = convolutions
    TransformerTemporalModel.forward = transformer


def write_latents(out: Path, threads: str, count: int) -> None:
    """Clips that are not held out, as latents (count, F, 8, 8, 8), and their word numbers (count, 5)."""
    if (out / "labels.npy").exists():
        return
    set_threads(threads)
    vae, rng = load_vae(out), np.random.default_rng(2)
    scale = vae.config.scaling_factor
    latents = np.lib.format.open_memmap(
        out / "latents.npy", "w+", np.float16, (count, world.FRAMES, 8, world.SIZE // 8, world.SIZE // 8)
    )
    labels = np.zeros((count, len(world.ATTRIBUTES)), np.int64)
    for i in range(count):
        attributes = world.sample_attributes(rng, training=True)
        labels[i] = [words.index(attributes[name]) for name, words in world.ATTRIBUTES.items()]
        images = to_images(world.render(attributes, rng))
        latents[i] = (vae.encode(images).latent_dist.mean * scale).numpy()
        if (i + 1) % 500 == 0:
            print(f"{i + 1}/{count} clips encoded", flush=True)
    latents.flush()
    np.save(out / "labels.npy", labels)


def train_text_to_video(out: Path, threads: str, total: int, stills: int, focus: int) -> None:
    """v-prediction with zero terminal SNR: `stills` steps on first frames, `focus` steps on the clips of one
    scene, then all clips.

    Where a shape is depends on direction and frame together, and either alone tells nothing: that is learned
    late or never while all else varies. So first frames, in which "moving left" says "at the right"; then a
    scene in which nothing but the motion varies; and later each clip beside itself played backwards, under
    the same noise, so that what the two have in common drops out of the difference.
    """
    torch.manual_seed(0)
    quicken_temporal_layers()
    write_latents(out, threads, 3500)
    latents, labels = np.load(out / "latents.npy", mmap_mode="r"), np.load(out / "labels.npy")
    scene = np.flatnonzero((labels[:, [0, 1, 2, 4]] == [1, 0, 0, 0]).all(1))  # large red circles, dark
    tokenizer, encoder = load_text(out)
    prompts, numbers = all_prompts()
    states = encoder(tokenize(tokenizer, prompts)).last_hidden_state  # (P, TOKENS, 64)
    nothing = encoder(tokenize(tokenizer, [""])).last_hidden_state[0]
    row = {tuple(number): i for i, number in enumerate(numbers.tolist())}
    open_words = np.array([len(words) for words in world.ATTRIBUTES.values()])
    signal, noise_level = noise_levels()
    run = Run(new_unet(), out / "unet.pt", total=total, rate=0.8e-3, threads=threads, decay=0.998)
    rng = run.rng
    for step in run.steps():
        still, focused = step < stills, stills <= step < stills + focus
        chosen = rng.choice(scene, 4) if focused else rng.integers(len(labels), size=32 if still else 3)
        clean, said = np.array(latents[np.sort(chosen)], np.float32), labels[np.sort(chosen)].copy()
        half = len(clean)
        if still:
            clean, said = turn_back(clean, said, rng.random(half) < 0.5)
            clean = clean[:, :1]
        elif focused:
            clean, said = turn_back(clean, said, rng.random(half) < 0.5)
        else:
            backwards, of_those = turn_back(clean, said, np.ones(half, bool))
            clean, said = np.concatenate([clean, backwards]), np.concatenate([said, of_those])
        copies = len(clean) // half
        left_out = np.tile(rng.random((half, said.shape[1])) < 0.12, (copies, 1))
        text = states[[row[tuple(number)] for number in np.where(left_out, open_words, said).tolist()]]
        unguided = torch.from_numpy(np.tile(rng.random(half) < 0.1, copies))
        text = torch.where(unguided[:, None, None], nothing, text)
        clean = torch.from_numpy(clean).transpose(1, 2)  # (B, C, F, h, w)
        noise = torch.randn(clean[:half].shape).repeat(copies, 1, 1, 1, 1)
        # Shape is decided between clear and drowned; motion, which all frames tell together, in more noise;
        # that edges and colours are even, in less.
        place = np.where(rng.random(half) < 0.15, rng.random(half), rng.beta(2, 1.4, half))
        if not still:
            kind = rng.random(half)
            place = np.where(kind < 0.45, rng.random(half), place)
            place = np.where(kind < 0.25, 1 - 0.15 * rng.random(half), place)
        t = torch.from_numpy(999.99 * np.tile(place, copies)).long()
        a, s = signal[t].view(-1, 1, 1, 1, 1), noise_level[t].view(-1, 1, 1, 1, 1)
        guess = run.model(a * clean + s * noise, t, text).sample
        run.learn(F.mse_loss(guess, a * noise - s * clean))


def noise_levels() -> tuple[Tensor, Tensor]:
    """Shares of signal and of noise at the 1000 timesteps, as the exported scheduler has them."""
    scheduler = DDIMScheduler.from_config(SCHEDULER)
    return scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()


def turn_back(clean: np.ndarray, said: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Copies of clips, some played backwards with the word for that, except for held-out combinations."""
    motions = world.ATTRIBUTES["motion"]
    back = dict(left="right", right="left", up="down", down="up", growing="shrinking", shrinking="growing")
    clean, said = clean.copy(), said.copy()
    for i in np.flatnonzero(which):
        words = {name: words[k] for (name, words), k in zip(world.ATTRIBUTES.items(), said[i], strict=True)}
        *first, last = words["motion"].split()
        words["motion"] = " ".join([*first, back.get(last, last)])
        if not world.is_held_out(words):
            clean[i], said[i, 3] = clean[i, ::-1].copy(), motions.index(words["motion"])
    return clean, said


def load_pipeline(out: Path) -> TextToVideoSDPipeline:
    """The current averages of a run as a pipeline."""
    tokenizer, encoder = load_text(out)
    unet = new_unet()
    unet.load_state_dict(torch.load(out / "unet.pt", weights_only=False)["average"])
    scheduler = DPMSolverMultistepScheduler.from_config(SCHEDULER)
    return TextToVideoSDPipeline(load_vae(out), encoder, tokenizer, unet.eval(), scheduler)


def export(out: Path) -> None:
    """Write out/checkpoint, a diffusers folder in single precision; beside its place, then put there."""
    beside, folder, old = out / "checkpoint.part", out / "checkpoint", out / "checkpoint.old"
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    load_pipeline(out).save_pretrained(beside)
    shutil.copytree(out / "tokenizer", beside / "tokenizer", dirs_exist_ok=True)
    index = json.loads((beside / "model_index.json").read_text())
    index["_recommended"] = RECOMMENDED | dict(vocabulary=world.vocabulary())
    (beside / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    """Parse the command line and run a stage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("vae", "decoder", "text", "text-to-video", "export"))
    parser.add_argument("--out", type=Path, required=True, help="folder of states and of the checkpoint")
    parser.add_argument("--steps", type=int, help="steps in all")
    parser.add_argument("--threads", default=str(os.cpu_count()), help="number, or file that holds it")
    parser.add_argument("--stills", type=int, default=4200, help="first steps of text-to-video, on stills")
    parser.add_argument("--focus", type=int, default=250, help="steps after that, on clips of one scene")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage == "vae":
        train_vae(args.out, args.threads, args.steps or 2200)
    elif args.stage == "decoder":
        train_decoder(args.out, args.threads, args.steps or 1500)
    elif args.stage == "text":
        train_text(args.out, args.threads, args.steps or 600)
    elif args.stage == "text-to-video":
        train_text_to_video(args.out, args.threads, args.steps or 12700, args.stills, args.focus)
    else:
        export(args.out)


if __name__ == "__main__":
    main()
