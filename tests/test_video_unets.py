"""UNetMotionModel, UNetSpatioTemporalConditionModel, I2VGenXLUNet and the temporal autoencoder, without
torch."""

import mlx_unet3d
import mlx.core as mx
import numpy as np
import pytest
from mlx_unet3d import FeatureCache, MotionAdapter, UNetMotionModel, cpu
from mlx.utils import tree_flatten
from mlx_unet3d.checkpoints import file_shapes, parameter_layouts, to_mlx
from mlx_unet3d.operations import Tracer, traced_by
from seeded import CONFIGS, inputs, weight

UNETS = [name for name in CONFIGS if name.endswith("UNet") or name.startswith("UNet")]


@pytest.fixture(scope="module")
def goldens(request):
    return np.load(request.path.parent / "goldens" / "video_networks.npz")


def make(kind, **changes):
    """A network with seeded weights, in evaluation mode."""
    model = getattr(mlx_unet3d, kind)(**{**CONFIGS[kind], **changes})
    layouts = parameter_layouts(model)
    state = []
    for name, array in tree_flatten(model.parameters()):
        if name.endswith(".pe"):
            state.append((name, array))
            continue
        layout = layouts.get(name, "identity")
        made = weight(name, file_shapes(layout, tuple(array.shape))[0])
        state.append((name, to_mlx(layout, mx.array(made))))
    model.load_weights(state)
    mx.eval(model.parameters())
    return model.eval()


@pytest.fixture(scope="module", params=UNETS)
def unet(request):
    return make(request.param)


def arguments(model, dtype=mx.float32, **shape):
    made = inputs(type(model).__name__, **shape)
    halves = [i for i, x in enumerate(made) if isinstance(x, np.ndarray) and x.ndim > 2]
    halves += [4] if type(model).__name__ == "I2VGenXLUNet" else []
    return [
        mx.array(x).astype(dtype) if i in halves else mx.array(x) if isinstance(x, np.ndarray) else x
        for i, x in enumerate(made)
    ]


def run(model, **shape):
    return model(*arguments(model, **shape)).sample


def close(found, expected, tolerance=1e-5):
    found, expected = np.array(found), np.array(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_goldens(unet, goldens):
    close(run(unet), goldens[type(unet).__name__])


def test_golden_of_the_temporal_autoencoder(goldens):
    vae = make("AutoencoderKLTemporalDecoder")
    z, frames = arguments(vae)
    expected = goldens["AutoencoderKLTemporalDecoder"]
    close(vae.decode(z, frames), expected)
    vae.enable_frame_chunking(2)
    vae.enable_pixel_chunking(11)
    close(vae.decode(z, frames), expected)


def test_batch_of_two_is_two_singles(unet):
    both = run(unet)
    made = arguments(unet)
    for i in range(2):
        rows = [
            x[len(x) // 2 * i : len(x) // 2 * (i + 1)] if isinstance(x, mx.array) and x.ndim else x
            for x in made
        ]
        close(unet(*rows).sample, both[i : i + 1])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_stays(unet, dtype):
    half = type(unet)(**unet.config)
    half.load_weights([(k, a.astype(dtype)) for k, a in tree_flatten(unet.parameters())])
    half.eval()
    made = arguments(half, dtype, batch=1, frames=2, height=4, width=4)
    found = half(*made).sample
    assert found.dtype == dtype
    expected = run(unet, batch=1, frames=2, height=4, width=4)
    close(found.astype(mx.float32), expected, 0.02 if dtype == mx.float16 else 0.15)


def test_the_temporal_autoencoder_keeps_half_precision():
    vae = make("AutoencoderKLTemporalDecoder")
    vae.load_weights([(k, a.astype(mx.float16)) for k, a in tree_flatten(vae.parameters())])
    z = mx.array(inputs("AutoencoderKLTemporalDecoder", 1, 2, 2, 2)[0])
    assert vae.decode(z, 2).dtype == vae.encode(mx.zeros((1, 3, 4, 4))).mean.dtype == mx.float16


def test_compiled_is_eager(unet):
    small = dict(batch=1, frames=2, height=4, width=4)  # powers of two: kernels that other networks share
    expected = run(unet, **small)
    unet.compile()
    try:
        close(run(unet, **small), expected)
        unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
        changed = run(unet, **small)
        unet.uncompile()
        close(changed, run(unet, **small))
        assert mx.abs(changed - expected).max().item() > 1e-3
    finally:
        unet.disable_freeu()
        unet.uncompile()


def test_cached_features(unet):
    """The same input again gives the same prediction, from the deep features of the first."""
    made = arguments(unet)
    cache = FeatureCache(interval=2, depth=1)
    first = unet(*made, feature_cache=cache).sample
    second = unet(*made, feature_cache=cache).sample
    close(second, first, 1e-6)
    other = [made[0] + 1, *made[1:]]
    cache.reset()
    unet(*made, feature_cache=cache)
    approximate = unet(*other, feature_cache=cache).sample
    exact = unet(*other).sample
    assert 1e-4 < mx.abs(approximate - exact).max().item() < 0.9 * mx.abs(exact).max().item()


def test_saved_and_loaded(unet, tmp_path):
    for layout in ("mlx", "diffusers"):
        unet.save_pretrained(tmp_path / layout, layout=layout)
        again = type(unet).from_pretrained(tmp_path / layout)
        assert mx.array_equal(run(again), run(unet))
        assert again.config == unet.config


def test_quantized(unet, tmp_path):
    expected = run(unet)
    coarse = type(unet)(**unet.config)
    coarse.load_weights(list(tree_flatten(unet.parameters())))
    coarse.eval().quantize(8, group_size=32)
    close(run(coarse), expected, 0.1)
    coarse.save_pretrained(tmp_path)
    assert mx.array_equal(run(type(unet).from_pretrained(tmp_path)), run(coarse))


def test_lora(unet):
    """A rank of one, at run time, at half strength, fused and removed."""
    expected = run(unet)
    path = next(p for p, m in unet.named_modules() if p.endswith("attn1.to_q"))
    width = dict(unet.named_modules())[path].weight.shape[0]
    tensors = {
        f"unet.{path}.lora_A.weight": mx.ones((1, width)),
        f"unet.{path}.lora_B.weight": mx.array(weight("up", (width, 1))),
    }
    unet.load_lora_adapter(tensors)
    changed = run(unet)
    assert mx.abs(changed - expected).max().item() > 1e-4
    unet.fuse_lora()
    close(run(unet), changed, 1e-4)
    unet.unfuse_lora()
    unet.delete_adapters("default")
    assert mx.array_equal(run(unet), expected)


REFUSED = {
    "UNetMotionModel": [
        (0, mx.zeros((1, 4, 9, 4, 4)), "num_frames=9 exceeds the motion module's 8 positions"),
        (2, mx.zeros((5, 4, 12)), r"\(2, tokens, 12\) or \(6, tokens, 12\)"),
        (2, mx.zeros((2, 4, 11)), "as wide as cross_attention_dim"),
    ],
    "UNetSpatioTemporalConditionModel": [
        (0, mx.zeros((1, 3, 4, 6, 5)), r"it must be \(batch, frames, 8, height, width\)"),
        (3, mx.zeros((2, 2)), r"added_time_ids has shape \(2, 2\); it must be \(2, 3\)"),
        (2, mx.zeros((1, 1, 12)), "one row of text a sample"),
    ],
    "I2VGenXLUNet": [
        (2, mx.zeros((3,)), r"fps has shape \(3,\)"),
        (3, mx.zeros((2, 4, 3, 6, 6)), "image_latents has shape"),
        (4, None, "image_embeddings has shape None"),
    ],
}


def test_refused_inputs(unet):
    for position, value, message in REFUSED[type(unet).__name__]:
        made = arguments(unet)
        made[position] = value
        with pytest.raises(ValueError, match=message):
            unet(*made)
    with pytest.raises(ValueError, match=r"cast it: sample.astype\(unet.dtype\)"):
        unet(arguments(unet)[0].astype(mx.float16), *arguments(unet)[1:])


def test_refused_masks_and_conditions_of_motion():
    config = CONFIGS["UNetMotionModel"]
    deep = mlx_unet3d.UNetMotionModel(**config)
    sample, t, text = arguments(deep)[:3]
    frames, pixels = sample.shape[0] * sample.shape[2], sample.shape[3] * sample.shape[4]
    with pytest.raises(ValueError, match=r"2 levels; a mask must be .* one level only"):
        deep(sample, t, text, attention_mask=mx.ones((frames, pixels)))
    one = {name: config[name][:1] for name in ("block_out_channels", "down_block_types")}
    flat = mlx_unet3d.UNetMotionModel(**config | one | dict(up_block_types=("CrossAttnUpBlockMotion",)))
    with pytest.raises(ValueError, match="one entry a pixel"):
        flat(sample, t, text, attention_mask=mx.ones((1, pixels)))
    sdxl = mlx_unet3d.UNetMotionModel(
        **config,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )
    batch = sample.shape[0]
    for pooled, ids in ((mx.ones((batch, 9)), mx.ones((batch, 6))), (mx.ones((8,)), mx.ones((batch, 6)))):
        with pytest.raises(ValueError, match=r"E \+ 4 n = 32, projection_class_embeddings_input_dim"):
            sdxl(sample, t, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids})


@pytest.mark.parametrize("kind", UNETS)
def test_refused_configs(kind):
    cls = getattr(mlx_unet3d, kind)
    with pytest.raises(ValueError, match="same number of `down_block_types` as `up_block_types`"):
        cls(up_block_types=CONFIGS[kind]["up_block_types"])
    with pytest.raises(ValueError, match="`DownBlock` does not exist"):
        cls(down_block_types=("DownBlock",) * 4)
    with pytest.raises(ValueError, match=r"layers_per_block=0|layers_per_block=\(0"):
        cls(layers_per_block=0)
    with pytest.raises(TypeError):
        cls(no_such_key=1)


def test_empty_texts_are_refused(unet):
    made = arguments(unet)
    position = 5 if type(unet).__name__ == "I2VGenXLUNet" else 2
    made[position] = mx.zeros((2, 0, 12))
    with pytest.raises(ValueError, match=r"encoder_hidden_states has shape \(2, 0, 12\); .*tokens, 12\)"):
        unet(*made)


@pytest.mark.parametrize(
    "name",
    ["motion_layers_per_block", "motion_transformer_layers_per_block", "motion_num_attention_heads"],
)
def test_lists_of_a_motion_adapter_have_an_entry_a_level(name):
    with pytest.raises(ValueError, match=f"same number of `{name}` as `block_out_channels`"):
        MotionAdapter((16, 32), motion_norm_num_groups=8, **{name: (1, 1, 1)})


def test_a_network_of_numpy_numbers():
    unet = UNetMotionModel(**{**CONFIGS["UNetMotionModel"], "layers_per_block": np.int64(1)})
    assert unet.config.layers_per_block == 1
    assert type(unet.config.layers_per_block) is int


# Motion modules.


def test_motion_modules_are_exchanged(tmp_path):
    unet = make("UNetMotionModel")
    expected = run(unet)
    unet.save_motion_modules(tmp_path)
    adapter = MotionAdapter.from_pretrained(tmp_path)
    other = make("UNetMotionModel")
    for block in (*other.down_blocks, other.mid_block, *other.up_blocks):
        for module in block.motion_modules:
            module.proj_out.weight = mx.zeros_like(module.proj_out.weight)
    assert mx.abs(run(other) - expected).max().item() > 1e-3
    other.load_motion_modules(adapter)
    assert mx.array_equal(run(other), expected)
    wrong = MotionAdapter((16, 32), motion_layers_per_block=2, motion_norm_num_groups=8)
    with pytest.raises(ValueError, match="does not fit this network"):
        other.load_motion_modules(wrong)
    assert mx.array_equal(run(other), expected)


def test_only_motion_modules_train():
    unet = make("UNetMotionModel")
    unet.freeze_unet2d_params()
    names = {name for name, _ in tree_flatten(unet.trainable_parameters())}
    assert names
    assert all(".motion_modules." in name for name in names)
    assert not any(name.endswith(".pe") for name in names)
    assert unet.num_parameters(only_trainable=True) < unet.num_parameters()


def heads_of(model):
    """The channels of heads that MLX's attention is given."""

    class Heads(Tracer):
        def attention(self, query, *others):
            seen.add(query.shape[-1])
            return super().attention(query, *others)

    seen = set()
    with cpu.routes(False), traced_by(Heads()):
        run(model)
    return seen


def test_padded_heads_change_nothing():
    model = make("UNetMotionModel")
    plain, narrow = run(model), heads_of(model)
    assert max(narrow) < 64
    model.set_attention_padding("always")
    assert heads_of(model) == {64}
    close(run(model), plain, 3e-6)
    model.set_attention_padding("never")
    assert heads_of(model) == narrow
    with pytest.raises(ValueError, match="'auto', 'always', 'never'"):
        model.set_attention_padding("on")


def test_the_temporal_autoencoder_takes_what_can_be_indexed(monkeypatch):
    vae = make("AutoencoderKLTemporalDecoder")
    (z,) = inputs("AutoencoderKLTemporalDecoder", 1, 4, 2, 2)[:1]
    z = mx.array(z)
    clips = vae.decode(z, 2)
    size = vae.spatial_factor * 2
    frame = 2**31 // vae.check_frame(size, size)
    calls = []
    monkeypatch.setattr(type(vae), "decode", counted(type(vae).decode, calls))
    monkeypatch.setattr("mlx_unet3d.models.autoencoder_kl._MAX_ELEMENTS", 3 * frame)
    monkeypatch.setattr("mlx_unet3d.models.autoencoder_kl._CHUNK_ELEMENTS", frame)
    close(vae.decode(z, 2), clips)  # a clip at a time, spatial layers a frame at a time
    assert [n for n, _ in calls] == [4, 2, 2]
    with pytest.raises(ValueError, match=r"4 frames .* give chunk_size=3 or less"):
        vae.decode(z, 4)


def counted(decode, calls):
    def call(vae, z, num_frames, *args, **options):
        calls.append((z.shape[0], num_frames))
        return decode(vae, z, num_frames, *args, **options)

    return call
