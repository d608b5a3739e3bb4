"""AnimateDiff's pipelines against diffusers' own, live, in fp32."""

import copy
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import mlx_unet3d  # noqa: E402
import diffusers  # noqa: E402
import numpy as np  # noqa: E402
from mlx_unet3d import (  # noqa: E402
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AnimateDiffVideoToVideoPipeline,
)
from ip_files import CHANNELS, adapter, flat  # noqa: E402
from mlx_unet3d.schedulers import scheduler_from_config  # noqa: E402
from PIL import Image  # noqa: E402
from reference import randomize_constants, to_mlx  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny import SCHEDULER, write_tokenizer  # noqa: E402
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from video_networks import randomize  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

# diffusers looks for the final norm at the place where transformers 4 had it.
if not hasattr(CLIPTextModel, "text_model"):
    CLIPTextModel.text_model = property(lambda self: self)

SPATIAL = dict(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=24,
    attention_head_dim=4,
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=8,
)
ADAPTER = dict(
    block_out_channels=(32, 64),
    motion_layers_per_block=1,
    motion_num_attention_heads=4,
    motion_norm_num_groups=8,
    motion_max_seq_length=24,
)
LINEAR = SCHEDULER | {"beta_schedule": "linear"}
SETTINGS = dict(num_frames=3, height=64, width=48, num_inference_steps=4)


def small_vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=64,
    )


def text_config(tokenizer, **changes):
    return CLIPTextConfig(
        **dict(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_act="quick_gelu",
            eos_token_id=len(tokenizer) - 1,
        )
        | changes
    )


def vision():
    config = CLIPVisionConfig(
        hidden_size=CHANNELS * 2,
        intermediate_size=24,
        projection_dim=CHANNELS,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """AnimateDiff of small networks, saved by diffusers, and beside it the parts that it was made of."""
    folder = tmp_path_factory.mktemp("animatediff")
    write_tokenizer(folder / "tokenizer_source")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer_source")
    torch.manual_seed(0)
    unet, motion = diffusers.UNet2DConditionModel(**SPATIAL), diffusers.MotionAdapter(**ADAPTER)
    vae, text = small_vae(), CLIPTextModel(text_config(tokenizer))
    for model in (unet, motion):
        randomize(model.eval())
    for seed, model in enumerate((vae, text)):
        randomize_constants(model.eval(), seed)
    scheduler = diffusers.DDIMScheduler(**LINEAR)
    diffusers.StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(folder / "sd")
    motion.save_pretrained(folder / "motion")
    pipe = diffusers.AnimateDiffPipeline(vae, text, tokenizer, copy.deepcopy(unet), motion, scheduler)
    pipe.save_pretrained(folder / "whole")
    return folder


@pytest.fixture(scope="module")
def pipes(folder):
    theirs = diffusers.AnimateDiffPipeline.from_pretrained(folder / "whole")
    theirs.set_progress_bar_config(disable=True)
    return theirs, AnimateDiffPipeline.from_pretrained(folder / "whole")


def difference(ours, theirs) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


def both(pipes, seed=3, **args):
    """The videos of both, of the same seed; `mx`, arguments that are arrays here."""
    theirs, ours = pipes
    args = {"prompt": "a fox", "output_type": "np", **SETTINGS, **args}
    if "video" in args:
        del args["num_frames"]
    expected = theirs(**args, generator=torch.Generator().manual_seed(seed)).frames
    arrays = {name: _to_mlx(value) for name, value in args.items()}
    return ours(**arrays, seed=seed).frames, expected


def _to_mlx(value):
    if isinstance(value, list):
        return [_to_mlx(one) for one in value]
    return to_mlx(value) if isinstance(value, torch.Tensor) else value


def check(pipes, seed=3, **args):
    frames, expected = both(pipes, seed, **args)
    expected = np.asarray(expected)
    assert expected.std() > 0.01
    assert difference(frames, expected) <= 1e-4 * max(np.abs(expected).max(), 1)
    return frames


EMBEDS = torch.randn(1, 77, 24, generator=torch.Generator().manual_seed(4))
CALLS = {
    "plain": {},
    "negative": dict(negative_prompt="rain, a cat"),
    "two": dict(prompt=["a fox", "two moons"], negative_prompt=["rain", "a cat"], guidance_scale=6.5),
    "clip_skip": dict(clip_skip=1),
    "no_guidance": dict(guidance_scale=1.0, negative_prompt="ignored"),
    "eta": dict(eta=0.7),
    "frames": dict(num_frames=5, decode_chunk_size=2),
    "trained_size": dict(height=None, width=None, num_inference_steps=2),
    "embeds": dict(prompt=None, prompt_embeds=EMBEDS, negative_prompt_embeds=-EMBEDS),
    "latents": dict(latents=torch.randn(1, 4, 3, 8, 6, generator=torch.Generator().manual_seed(5))),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(pipes, name):
    frames = check(pipes, **CALLS[name])
    assert frames.dtype == np.float32


SCHEDULERS = {
    "euler": ("EulerDiscreteScheduler", {}),
    "lightning": ("EulerDiscreteScheduler", dict(timestep_spacing="trailing")),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++")),
    "pndm": ("PNDMScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}


def with_scheduler(pipes, name, options):
    """Pipelines with another scheduler; the given ones stay as they are."""
    theirs, ours = (copy.copy(pipe) for pipe in pipes)
    theirs.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config, **options)
    ours.scheduler = scheduler_from_config({**ours.scheduler.config, **options}, name)
    return theirs, ours


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(pipes, name):
    """The noise of samplers is drawn in the shape of the video, not of folded frames."""
    check(with_scheduler(pipes, *SCHEDULERS[name]), prompt=["a fox", "two moons"])


def test_stable_diffusion_with_a_motion_adapter(folder, pipes):
    expected = pipes[0](
        "a fox", generator=torch.Generator().manual_seed(1), output_type="np", **SETTINGS
    ).frames
    for motion in (folder / "motion", mlx_unet3d.MotionAdapter.from_pretrained(folder / "motion")):
        ours = AnimateDiffPipeline.from_pretrained(folder / "sd", motion_adapter=motion)
        assert difference(ours("a fox", seed=1, **SETTINGS).frames, expected) <= 1e-4


def test_diffusers_reads_what_is_saved(pipes, tmp_path):
    pipes[1].save_pretrained(tmp_path, layout="diffusers")
    theirs = diffusers.AnimateDiffPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    check((theirs, pipes[1]))


def test_motion_lora(folder, tmp_path):
    theirs = diffusers.AnimateDiffPipeline.from_pretrained(folder / "whole")
    theirs.set_progress_bar_config(disable=True)
    ours = AnimateDiffPipeline.from_pretrained(folder / "whole")
    before, _ = both((theirs, ours))
    generator, state = torch.Generator().manual_seed(8), {}
    for name, module in theirs.unet.named_modules():
        if "motion_modules" in name and name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            key = f"unet.{name.replace('to_out.0', 'to_out')}".rpartition(".")
            key = f"{key[0]}.processor.{key[2]}_lora"
            out, into = module.weight.shape
            state[f"{key}.down.weight"] = torch.randn(4, into, generator=generator) / 4
            state[f"{key}.up.weight"] = torch.randn(out, 4, generator=generator) / 2
    save_file(state, tmp_path / "pan.safetensors")
    theirs.load_lora_weights(tmp_path, weight_name="pan.safetensors", adapter_name="pan")
    ours.load_lora_weights(tmp_path, weight_name="pan.safetensors", adapter_name="pan")
    theirs.set_adapters(["pan"], [0.8])
    ours.set_adapters(["pan"], [0.8])
    frames = check((theirs, ours))
    assert difference(frames, before) > 1e-2
    check((theirs, ours), cross_attention_kwargs={"scale": 0.5})


def picture(seed=0, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def image_pipes(folder, tmp_path_factory):
    """Pipelines with an image encoder, which the folder of the IP-Adapters brings along."""
    made = tmp_path_factory.mktemp("ip")
    torch.manual_seed(2)
    randomize_constants(encoder := vision(), 2)
    encoder.save_pretrained(made / "models" / "image_encoder")
    theirs = diffusers.AnimateDiffPipeline.from_pretrained(folder / "whole")
    theirs.set_progress_bar_config(disable=True)
    for kind in ("plain", "plus"):
        state = adapter(theirs.unet, kind)
        if kind == "plus":  # which takes hidden states
            state["image_proj"]["proj_in.weight"] = torch.randn(20, 2 * CHANNELS) / 4
        save_file(flat(state), made / "models" / f"{kind}.safetensors")
    return made, theirs, AnimateDiffPipeline.from_pretrained(folder / "whole")


ADAPTERS = {
    "plain": ("plain.safetensors", 1.0, picture()),
    "scaled": ("plain.safetensors", 0.4, picture(1, (16, 16))),
    "several": ("plain.safetensors", 1.0, [[picture(0), picture(1), picture(2)]]),
    "plus": ("plus.safetensors", 0.7, picture()),
    "both": (["plain.safetensors", "plus.safetensors"], [0.6, 0.5], [[picture(0), picture(1)], picture(2)]),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_ip_adapter(image_pipes, name):
    folder, theirs, ours = image_pipes
    weight_name, scale, image = ADAPTERS[name]
    for pipe in (theirs, ours):
        pipe.load_ip_adapter(str(folder), subfolder="models", weight_name=weight_name)
        pipe.set_ip_adapter_scale(scale)
    assert ours.feature_extractor.config.size == 16
    try:
        frames = check((theirs, ours), ip_adapter_image=image)
        alone = check((theirs, ours), ip_adapter_image=image, guidance_scale=1.0)
        assert difference(frames, alone) > 1e-2
        args = dict(prompt=["a fox", "two moons"], ip_adapter_image=image)
        check((theirs, ours), **args)
        with torch.no_grad():
            embeds = theirs.prepare_ip_adapter_image_embeds(image, None, "cpu", 1, True)
        made = ours.encode_ip_adapter_image(image)
        assert all(difference(mine, its) <= 1e-5 for mine, its in zip(made, embeds, strict=True))
        again = check((theirs, ours), ip_adapter_image_embeds=embeds)
        assert difference(again, frames) <= 1e-4
    finally:
        theirs.unload_ip_adapter()
        theirs.image_encoder = theirs.feature_extractor = None
        ours.unload_ip_adapter()


# Video to video.


@pytest.fixture(scope="module")
def video_pipes(folder, pipes):
    theirs = diffusers.AnimateDiffVideoToVideoPipeline(**dict(pipes[0].components))
    theirs.set_progress_bar_config(disable=True)
    return theirs, AnimateDiffVideoToVideoPipeline.from_pretrained(folder / "whole")


CLIP = [picture(seed, (64, 48)) for seed in range(3)]
LATENTS = torch.randn(1, 4, 3, 8, 6, generator=torch.Generator().manual_seed(7))
VIDEO_CALLS = {
    "plain": {},
    "resized": dict(video=[picture(seed, (37, 90)) for seed in range(3)]),
    "resized_floats": dict(video=np.random.default_rng(1).random((1, 3, 40, 60, 3), np.float32)),
    "chunks": dict(decode_chunk_size=2, strength=0.5),
    "enforced": dict(enforce_inference_steps=True, strength=0.3),
    "latents": dict(video=None, latents=LATENTS, strength=1.0),
    "enforced_latents": dict(video=None, latents=LATENTS, enforce_inference_steps=True),
    "two": dict(prompt=["a fox", "two moons"], video=[CLIP, CLIP[::-1]], negative_prompt=["rain", "a cat"]),
    "no_guidance": dict(guidance_scale=1.0, clip_skip=1, eta=0.5),
}


@pytest.mark.parametrize("name", VIDEO_CALLS)
def test_video_to_video(video_pipes, name):
    check(video_pipes, **{"video": CLIP, **VIDEO_CALLS[name]})


@pytest.mark.parametrize("name", ["euler", "euler-a", "dpm++", "heun", "lcm"])
def test_video_to_video_schedulers(video_pipes, name):
    check(with_scheduler(video_pipes, *SCHEDULERS[name]), video=CLIP, strength=0.6)
    if name == "euler":
        check(
            with_scheduler(video_pipes, *SCHEDULERS[name]),
            video=CLIP,
            strength=0.6,
            enforce_inference_steps=True,
        )


# SDXL.

SPATIAL_XL = SPATIAL | dict(
    use_linear_projection=True,
    transformer_layers_per_block=(1, 2),
    attention_head_dim=(2, 4),
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 20,
)


@pytest.fixture(scope="module")
def folder_xl(folder, tmp_path_factory):
    """As `folder`, of SDXL."""
    made = tmp_path_factory.mktemp("animatediff_sdxl")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer_source")
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(**SPATIAL_XL)
    motion = diffusers.MotionAdapter(**ADAPTER, use_motion_mid_block=False)
    vae = small_vae()
    text = CLIPTextModel(text_config(tokenizer, hidden_size=8, num_attention_heads=2))
    config = text_config(tokenizer, hidden_size=16, hidden_act="gelu", projection_dim=20)
    text_2 = CLIPTextModelWithProjection(config)
    for model in (unet, motion):
        randomize(model.eval())
    for seed, model in enumerate((vae, text, text_2)):
        randomize_constants(model.eval(), seed)
    parts = dict(
        vae=vae,
        text_encoder=text,
        text_encoder_2=text_2,
        tokenizer=tokenizer,
        tokenizer_2=copy.deepcopy(tokenizer),
        scheduler=diffusers.EulerDiscreteScheduler.from_config(LINEAR),
    )
    diffusers.StableDiffusionXLPipeline(**parts, unet=unet).save_pretrained(made / "sd")
    motion.save_pretrained(made / "motion")
    pipe = diffusers.AnimateDiffSDXLPipeline(**parts, unet=unet, motion_adapter=motion)
    # diffusers leaves it as it was initialized
    pipe.unet.add_embedding.load_state_dict(unet.add_embedding.state_dict())
    pipe.save_pretrained(made / "whole")
    return made


@pytest.fixture(scope="module")
def pipes_xl(folder_xl):
    theirs = diffusers.AnimateDiffSDXLPipeline.from_pretrained(folder_xl / "whole")
    theirs.set_progress_bar_config(disable=True)
    return theirs, AnimateDiffSDXLPipeline.from_pretrained(folder_xl / "whole")


POOLED = torch.randn(1, 20, generator=torch.Generator().manual_seed(6))
CALLS_XL = {
    "plain": {},
    "negative": dict(negative_prompt="rain"),
    "second": dict(prompt_2="two moons", negative_prompt="rain", negative_prompt_2="a cat"),
    "two": dict(prompt=["a fox", "two moons"], negative_prompt=["rain", "a cat"]),
    "two_without": dict(prompt=["a fox", "two moons"]),
    "clip_skip": dict(clip_skip=1, negative_prompt="rain"),
    "no_guidance": dict(guidance_scale=1.0),
    "rescale": dict(guidance_rescale=0.7, guidance_scale=8.0, negative_prompt="rain"),
    "sizes": dict(original_size=(640, 480), target_size=(64, 48), crops_coords_top_left=(8, 16)),
    "negative_sizes": dict(negative_original_size=(32, 32), negative_target_size=(64, 64)),
    "ending": dict(denoising_end=0.6, output_type="latent"),
    "embeds": dict(
        prompt=None,
        prompt_embeds=EMBEDS,
        pooled_prompt_embeds=POOLED,
        negative_prompt_embeds=-EMBEDS,
        negative_pooled_prompt_embeds=-POOLED,
    ),
    "timesteps": dict(timesteps=[900, 700, 300, 50], num_inference_steps=None),
}


@pytest.mark.parametrize("name", CALLS_XL)
def test_sdxl_calls(pipes_xl, name):
    check(pipes_xl, **CALLS_XL[name])


def test_sdxl_schedulers(pipes_xl):
    check(with_scheduler(pipes_xl, *SCHEDULERS["euler-a"]))
    check(with_scheduler(pipes_xl, "DDIMScheduler", LINEAR), eta=0.4)


def test_sdxl_with_a_motion_adapter(folder_xl, pipes_xl):
    """`from_unet2d` copies `add_embedding`."""
    ours = AnimateDiffSDXLPipeline.from_pretrained(folder_xl / "sd", motion_adapter=folder_xl / "motion")
    check((pipes_xl[0], ours))


def test_sdxl_with_guidance_as_an_embedding(folder_xl, tmp_path):
    """One pass a step, with the scale less one embedded; with a base model that was distilled so, too."""
    base = diffusers.UNet2DConditionModel.from_pretrained(folder_xl / "sd", subfolder="unet")
    unet = diffusers.UNet2DConditionModel.from_config(base.config, time_cond_proj_dim=32)
    unet.load_state_dict(base.state_dict(), strict=False)
    shutil.copytree(folder_xl / "sd", tmp_path / "sd")
    unet.save_pretrained(tmp_path / "sd" / "unet")
    motion = diffusers.MotionAdapter.from_pretrained(folder_xl / "motion")
    theirs = diffusers.AnimateDiffSDXLPipeline.from_pretrained(tmp_path / "sd", motion_adapter=motion)
    theirs.unet.add_embedding.load_state_dict(unet.add_embedding.state_dict())
    theirs.set_progress_bar_config(disable=True)
    ours = AnimateDiffSDXLPipeline.from_pretrained(tmp_path / "sd", motion_adapter=folder_xl / "motion")
    frames = check((theirs, ours), negative_prompt="rain", guidance_scale=8.5)
    weak = check((theirs, ours), prompt=["a fox", "two moons"], guidance_scale=1.2, num_inference_steps=2)
    assert difference(frames, weak[:1]) > 1e-3
    assert ours.encode_prompt("a fox", guidance_scale=8.5).negative_prompt_embeds is None


def test_sdxl_without_zeros(folder_xl):
    theirs = diffusers.AnimateDiffSDXLPipeline.from_pretrained(
        folder_xl / "whole", force_zeros_for_empty_prompt=False
    )
    theirs.set_progress_bar_config(disable=True)
    ours = AnimateDiffSDXLPipeline.from_pretrained(folder_xl / "whole")
    zeros = ours("a fox", seed=3, **SETTINGS).frames
    ours.force_zeros_for_empty_prompt = False
    assert difference(check((theirs, ours)), zeros) > 1e-3
    again = AnimateDiffSDXLPipeline.from_pipe(ours)
    assert not again.force_zeros_for_empty_prompt


def test_sdxl_ip_adapter_and_embeddings(folder_xl, image_pipes, tmp_path):
    theirs = diffusers.AnimateDiffSDXLPipeline.from_pretrained(folder_xl / "whole")
    theirs.set_progress_bar_config(disable=True)
    ours = AnimateDiffSDXLPipeline.from_pretrained(folder_xl / "whole")
    save_file(flat(adapter(theirs.unet, "plain")), tmp_path / "ip.safetensors")
    encoder = image_pipes[0] / "models" / "image_encoder"
    theirs.image_encoder = CLIPVisionModelWithProjection.from_pretrained(encoder)
    ours.image_encoder = mlx_unet3d.CLIPVisionModelWithProjection.from_pretrained(encoder)
    for pipe in (theirs, ours):
        pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="ip.safetensors")
    check((theirs, ours), ip_adapter_image=picture())
    learned = {"clip_l": torch.randn(2, 8), "clip_g": torch.randn(2, 16)}
    save_file(learned, tmp_path / "style.safetensors")
    names = ours.load_textual_inversion(tmp_path / "style.safetensors", "<style>")
    assert names == ["<style>", "<style>_1"]
    first = dict(text_encoder=theirs.text_encoder, tokenizer=theirs.tokenizer)
    second = dict(text_encoder=theirs.text_encoder_2, tokenizer=theirs.tokenizer_2)
    theirs.load_textual_inversion(learned["clip_l"], token="<style>", **first)
    theirs.load_textual_inversion(learned["clip_g"], token="<style>", **second)
    check((theirs, ours), prompt="a <style> fox", ip_adapter_image=picture())


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_scale_of_lora_reaches_the_text_encoders(family, request, tmp_path):
    """`cross_attention_kwargs["scale"]`, for UNet and text encoders at once."""
    peft = pytest.importorskip("peft")
    folder = request.getfixturevalue("folder" if family == "sd" else "folder_xl") / "whole"
    xl = family == "sdxl"
    theirs = (diffusers.AnimateDiffSDXLPipeline if xl else diffusers.AnimateDiffPipeline).from_pretrained(
        folder
    )
    theirs.set_progress_bar_config(disable=True)
    ours = (AnimateDiffSDXLPipeline if xl else AnimateDiffPipeline).from_pretrained(folder)
    prompt = "a fox"
    if not xl:  # prompts of frames are encoded apart
        prompt = {0: "a fox", 2: "two moons"}
        theirs.enable_free_noise(2, 1)
        ours.enable_free_noise(2, 1)
    torch.manual_seed(4)
    layers = {}
    for name in ("unet", "text_encoder", "text_encoder_2") if xl else ("unet", "text_encoder"):
        targets = ["to_q"] if name == "unet" else ["q_proj", "v_proj", "fc1"]
        config = peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets)
        network = peft.inject_adapter_in_model(config, getattr(theirs, name))
        state = peft.get_peft_model_state_dict(network)
        layers |= {f"{name}.{key}": value.contiguous() for key, value in state.items()}
    save_file(layers, tmp_path / "lora.safetensors")
    ours.load_lora_weights(tmp_path / "lora.safetensors")
    calls = [dict(cross_attention_kwargs={"scale": scale}) for scale in (0.5, 0.0)]
    half, none = (check((theirs, ours), prompt=prompt, num_inference_steps=2, **call) for call in calls)
    assert difference(half, none) > 1e-3
    text = [ours.encode_prompt("a fox", lora_scale=scale).prompt_embeds for scale in (None, 0.5)]
    assert difference(*text) > 1e-2
