"""IP-Adapters and motion LoRAs on UNetMotionModel against diffusers' own, live, in fp32."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_unet3d import TextContext  # noqa: E402
from diffusers.models.attention_processor import (  # noqa: E402
    IPAdapterAttnProcessor as TheirExplicit,
)
from ip_files import CHANNELS, PROJECTIONS, WIDTH, adapter, flat  # noqa: E402
from mlx_unet3d.layers.attention_processors import AttnProcessor, XFormersAttnProcessor  # noqa: E402
from reference import relative_error, to_mlx  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from video_networks import KINDS, SDXL, draw, ours_of, theirs_of  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TOLERANCE = 1e-5
KIND = KINDS["motion"]
TOKENS = 6  # of the image encoder


def images(kind, batch=1, count=1, seed=5):
    shape = (batch, count, CHANNELS) if kind in ("plain", "face") else (batch, count, TOKENS, CHANNELS)
    return draw(seed)(*shape)


def set_scales(theirs, *scales):
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = list(scales)


def with_images(inputs, *embeds):
    arguments, more = inputs
    return arguments, {
        "added_cond_kwargs": {**more.get("added_cond_kwargs", {}), "image_embeds": list(embeds)}
    }


def ours_with(model, inputs, *embeds, dtype=mx.float32, text=None, **options):
    """Our prediction; `text` takes the place of that of the inputs."""
    (sample, t, states), more = inputs
    added = {
        name: to_mlx(x) for name, x in more.get("added_cond_kwargs", {}).items() if name != "image_embeds"
    }
    if embeds:
        added["image_embeds"] = list(embeds)
    states = to_mlx(states).astype(dtype) if text is None else text
    return model(to_mlx(sample).astype(dtype), t, states, added_cond_kwargs=added, **options).sample


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Both networks with a plain and a plus adapter, scaled; inputs; the prediction."""
    theirs, ours = KIND.pair(tmp_path_factory.mktemp("unet"))
    states = [adapter(theirs, "plain"), adapter(theirs, "plus", 4)]
    theirs._load_ip_adapter_weights(states)
    set_scales(theirs, 0.7, 1.3)
    ours.load_ip_adapter([{k: to_mlx(a) for k, a in flat(s).items()} for s in states])
    ours.set_ip_adapter_scale([0.7, 1.3])
    inputs = KIND.inputs(theirs.config, batch=2)
    inputs[0][2] = inputs[0][2][::3].repeat_interleave(3, dim=0)  # a text a sample
    embeds = [images("plain", 2, 2), images("plus", 2)]
    return ours, inputs, [to_mlx(x) for x in embeds], theirs_of(theirs, with_images(inputs, *embeds)), theirs


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_each_kind_from_a_file(tmp_path, kind):
    theirs, ours = KIND.pair(tmp_path / "unet")
    state = adapter(theirs, kind)
    theirs._load_ip_adapter_weights([state])
    if kind == "plain":
        torch.save(state, tmp_path / "ip.bin")
        ours.load_ip_adapter(tmp_path / "ip.bin")
    else:
        (tmp_path / "models").mkdir()
        save_file(flat(state), tmp_path / "models" / "ip.safetensors")
        ours.load_ip_adapter(tmp_path, subfolder="models", weight_name="ip.safetensors")
    assert ours.config.encoder_hid_dim_type == theirs.config.encoder_hid_dim_type == "ip_image_proj"
    inputs = KIND.inputs(theirs.config)
    seen = []
    for count, scale in ((1, 1.0), (3, 1.0), (1, 0.5), (1, 0)):
        embeds = images(kind, count=count)
        set_scales(theirs, scale)
        ours.set_ip_adapter_scale(scale)
        seen.append(theirs_of(theirs, with_images(inputs, embeds)))
        assert relative_error(ours_with(ours, inputs, to_mlx(embeds)), seen[-1]) <= TOLERANCE
    assert all(relative_error(seen[0], other) > 1e-2 for other in seen[1:])
    ours.unload_ip_adapter()
    assert ours.config.encoder_hid_dim_type is None
    assert relative_error(ours_of(ours, inputs), seen[-1]) <= TOLERANCE  # that of scale 0


def test_sdxl(tmp_path):
    theirs, ours = KIND.pair(tmp_path, **SDXL)
    state = adapter(theirs, "plus")
    theirs._load_ip_adapter_weights([state])
    ours.load_ip_adapter({k: to_mlx(a) for k, a in flat(state).items()})
    inputs, embeds = KIND.inputs(theirs.config, batch=2), images("plus", 2)
    expected = theirs_of(theirs, with_images(inputs, embeds))
    assert relative_error(ours_with(ours, inputs, to_mlx(embeds)), expected) <= TOLERANCE


def test_two_adapters_in_every_way(two):
    """Text of a row a frame and a sample, as an array and as a context; in chunks; compiled; explicit, sliced
    and fused attention."""
    ours, inputs, embeds, expected, _ = two
    assert relative_error(ours_with(ours, inputs, *embeds), expected) <= TOLERANCE
    text = to_mlx(inputs[0][2])

    def check():
        context = TextContext(text[::3])
        for states in (text, TextContext(text), text[::3], context, context):
            assert relative_error(ours_with(ours, inputs, *embeds, text=states), expected) <= TOLERANCE
        made = ours.embed_context(text[::3], embeds)
        assert relative_error(ours_with(ours, inputs, text=made), expected) <= TOLERANCE

    check()
    ours.enable_frame_chunking(2)
    ours.enable_pixel_chunking(7)
    check()
    ours.compile()
    check()
    ours.disable_frame_chunking()
    ours.disable_pixel_chunking()
    check()
    ours.uncompile()


def test_processors(two):
    ours, inputs, embeds, expected, theirs = two
    for change in (
        lambda: ours.set_attn_processor(AttnProcessor()),
        lambda: ours.set_attention_slice("max"),
        lambda: ours.set_attn_processor(XFormersAttnProcessor()),
        ours.set_default_attn_processor,
        lambda: ours.set_attn_processor(ours.attn_processors),
        ours.fuse_qkv_projections,
        ours.unfuse_qkv_projections,
        lambda: ours.set_attention_slice(None),
    ):
        change()
        assert relative_error(ours_with(ours, inputs, *embeds), expected) <= TOLERANCE
    explicit = {}
    for name, processor in theirs.attn_processors.items():
        explicit[name] = processor
        if hasattr(processor, "to_k_ip"):
            made = TheirExplicit(processor.hidden_size, WIDTH, processor.num_tokens, list(processor.scale))
            made.load_state_dict(processor.state_dict())
            explicit[name] = made
    fused = theirs.attn_processors
    theirs.set_attn_processor(explicit)
    again = theirs_of(theirs, with_images(inputs, *(torch.tensor(np.array(x)) for x in embeds)))
    theirs.set_attn_processor(fused)
    assert relative_error(ours_with(ours, inputs, *embeds), again) <= TOLERANCE


SCALES = [
    ({"up": {"block_1": [0.0, 1.0]}}, {"down": 0.5, "mid": [0.25]}),
    ({"down": {"block_0": 0.5}, "up": 2.0}, 0.75),
]


@pytest.mark.parametrize("scales", SCALES)
def test_scales_by_place(two, scales):
    from types import SimpleNamespace

    from diffusers.loaders.ip_adapter import IPAdapterMixin

    ours, inputs, embeds, expected, theirs = two
    IPAdapterMixin.set_ip_adapter_scale(SimpleNamespace(unet=theirs, unet_name="unet"), list(scales))
    ours.set_ip_adapter_scale(list(scales))
    found = theirs_of(theirs, with_images(inputs, *(torch.tensor(np.array(x)) for x in embeds)))
    set_scales(theirs, 0.7, 1.3)
    assert relative_error(ours_with(ours, inputs, *embeds), found) <= TOLERANCE
    ours.set_ip_adapter_scale([0.7, 1.3])
    assert relative_error(found, expected) > 1e-3


def motion_lora(theirs, seed=7):
    """Low-rank changes of all projections of all motion modules, under the hub's names."""
    randn, state = draw(seed), {}
    for name in theirs.attn_processors:
        if "motion_modules" not in name:
            continue
        attn = theirs.get_submodule(name.removesuffix(".processor"))
        for projection in ("to_q", "to_k", "to_v", "to_out"):
            layer = attn.to_out[0] if projection == "to_out" else getattr(attn, projection)
            key = f"unet.{name}.{projection}_lora"
            state[f"{key}.down.weight"] = randn(4, layer.in_features) * layer.in_features**-0.5
            state[f"{key}.up.weight"] = randn(layer.out_features, 4) / 3
    return state


def of_authors(key):
    """The name that AnimateDiff's authors give a tensor of a motion LoRA."""
    key = key.removeprefix("unet.").replace(
        ".transformer_blocks.", ".temporal_transformer.transformer_blocks."
    )
    return f"module.{key}".replace(".attn1.", ".attention_blocks.0.").replace(
        ".attn2.", ".attention_blocks.1."
    )


@pytest.mark.parametrize("spelling", ["hub", "authors", "authors' checkpoint"])
def test_motion_lora(tmp_path, spelling):
    theirs, ours = KIND.pair(tmp_path / "unet")
    inputs = KIND.inputs(theirs.config)
    base, state = theirs_of(theirs, inputs), motion_lora(theirs)
    file = tmp_path / ("lora.ckpt" if "checkpoint" in spelling else "lora.safetensors")
    names = {of_authors(k) if "authors" in spelling else k: array for k, array in state.items()}
    if "checkpoint" in spelling:
        torch.save({"state_dict": names, "global_step": 3}, file)
    else:
        save_file(names, file)
    layers = ours.load_lora_adapter(file, "zoom", weight=0.8)
    assert layers == len(state) // 2
    theirs.load_lora_adapter(state, prefix="unet", adapter_name="zoom")
    theirs.set_adapters("zoom", 0.8)
    expected = theirs_of(theirs, inputs)
    assert relative_error(expected, base) > 1e-2
    assert relative_error(ours_of(ours, inputs), expected) <= TOLERANCE
    ours.fuse_lora()
    theirs.fuse_lora()
    fused = theirs_of(theirs, inputs)
    assert relative_error(fused, expected) <= TOLERANCE
    assert relative_error(ours_of(ours, inputs), fused) <= TOLERANCE


def test_beside_a_lora(tmp_path):
    """An IP-Adapter and a LoRA of the attention to text, whichever comes first."""
    theirs, ours = KIND.pair(tmp_path)
    state, inputs = adapter(theirs, "plain"), KIND.inputs(theirs.config)
    lora = {}
    randn = draw(9)
    for name in theirs.attn_processors:
        if name.endswith("attn2.processor") and "motion_modules" not in name:
            attn = theirs.get_submodule(name.removesuffix(".processor"))
            for projection in ("to_q", "to_k", "to_v"):
                layer = getattr(attn, projection)
                key = f"unet.{name.removesuffix('.processor')}.{projection}"
                lora[f"{key}.lora_A.weight"] = randn(3, layer.in_features) / 4
                lora[f"{key}.lora_B.weight"] = randn(layer.out_features, 3) / 3
    theirs.load_lora_adapter(dict(lora), prefix="unet")
    theirs._load_ip_adapter_weights([state])
    embeds = images("plain")
    expected = theirs_of(theirs, with_images(inputs, embeds))
    arrays = {k: to_mlx(a) for k, a in flat(state).items()}
    ours.load_ip_adapter(arrays)
    assert ours.load_lora_adapter({k: to_mlx(a) for k, a in lora.items()}) == len(lora) // 2
    assert relative_error(ours_with(ours, inputs, to_mlx(embeds)), expected) <= TOLERANCE
    ours.unload_ip_adapter()
    ours.load_ip_adapter(arrays)
    assert relative_error(ours_with(ours, inputs, to_mlx(embeds)), expected) <= TOLERANCE
