"""Compiled forwards: the results of plain ones, whatever has changed since the trace was made."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx_unet3d import TextContext, TextToVideoPipeline, UNet3DConditionModel, compilation
from mlx.utils import tree_map
from mlx_unet3d.layers.attention_adapters import LoRAAttnProcessor
from mlx_unet3d.layers.attention_processors import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor

SHAPE = (2, 4, 2, 4, 8)  # powers of two: a kernel has its constants, such as 1 / 32, built in
ONE_LEVEL = dict(
    block_out_channels=(8,),
    down_block_types=("CrossAttnDownBlock3D",),
    up_block_types=("CrossAttnUpBlock3D",),
)


@pytest.fixture
def unet():
    return tiny.randomize(UNet3DConditionModel(**tiny.UNET))


@pytest.fixture
def small():
    return tiny.randomize(UNet3DConditionModel(**tiny.UNET | ONE_LEVEL))


def inputs(shape=SHAPE, dtype=mx.float32, seed=1):
    mx.random.seed(seed)
    text = mx.random.normal((shape[0], 5, 12))
    return mx.random.normal(shape).astype(dtype), mx.array([500, 20][: shape[0]]), text.astype(dtype)


def both(unet, *args, **keywords):
    """The compiled and the plain result."""
    compiled = unet(*args, **keywords).sample
    mx.eval(compiled)
    held, unet._compiled = unet._compiled, None
    plain = unet(*args, **keywords).sample
    unet._compiled = held
    return np.array(compiled.astype(mx.float32)), np.array(plain.astype(mx.float32))


def same(unet, *args, atol=1e-5, **keywords):
    compiled, plain = both(unet, *(args or inputs(dtype=unet.dtype)), **keywords)
    np.testing.assert_allclose(compiled, plain, atol=atol * np.abs(plain).max())
    return compiled


def count_traces(unet, monkeypatch):
    """How often Python runs the forward from here on, as a list of one number."""
    count, forward = [0], UNet3DConditionModel._forward

    def counting(self, *args):
        count[0] += 1
        return forward(self, *args)

    monkeypatch.setattr(UNet3DConditionModel, "_forward", counting)
    return count


def test_traced_once(unet, monkeypatch):
    unet.compile()
    count = count_traces(unet, monkeypatch)
    for timestep in (999, 500, 0.5):
        unet(inputs()[0], timestep, inputs()[2])
    assert count == [1]
    unet(*inputs((1, 4, 2, 5, 3)))
    assert count == [2]
    unet.uncompile()
    unet(*inputs())
    unet(*inputs())
    assert count == [4]


def test_odd_sizes(unet):
    unet.compile()
    same(unet, *inputs((1, 4, 1, 3, 5)))


def test_half_precision(small):
    small.set_dtype(mx.float16)
    small.compile()
    arguments = inputs((2, 4, 4, 4, 4), mx.float16)
    same(small, *arguments, atol=5e-3)
    assert small(*arguments).sample.dtype == mx.float16


def test_all_arguments(unet):
    unet.compile()
    sample, timestep, text = inputs()
    skips = [(4, 8, 8), (4, 8, 8), (2, 4, 8), (2, 4, 16)]
    residuals = [mx.random.normal((4, c, h, w)) for h, w, c in skips]
    extra = dict(
        attention_mask=mx.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]),
        down_block_additional_residuals=residuals,
        mid_block_additional_residual=mx.random.normal((4, 16, 2, 4)),
        cross_attention_kwargs={"scale": 0.5},
    )
    without = same(unet, sample, timestep, text)
    with_all = same(unet, sample, timestep, text, **extra)
    assert np.abs(without - with_all).max() > 1e-2
    assert isinstance(unet(sample, timestep, text, return_dict=False), tuple)
    same(unet, sample, timestep, text, cross_attention_kwargs={"scale": np.float32(0.5)})


@pytest.mark.parametrize("training", [False, True])
def test_errors_leave_the_network_as_it_was(small, training):
    small.compile()
    small.train(training)
    sample, timestep, text = inputs()
    state = mx.random.state[0].tolist()
    with pytest.raises(ValueError, match="encoder_hidden_states has shape"):
        small(sample, timestep, text[:1])
    with pytest.raises(ValueError, match="sample is"):
        small(sample.astype(mx.float16), timestep, text)
    assert mx.random.state[0].tolist() == state
    small.eval()
    same(small)


def lora(unet):
    processors = {}
    for path, layer in unet._attentions().items():
        cross = layer.cross_attention_dim if layer.is_cross_attention else None
        processors[f"{path}.processor"] = LoRAAttnProcessor(layer.query_dim, cross, rank=2)
    unet.set_attn_processor(processors)
    unet.update(tree_map(lambda p: p + 0.05, unet.parameters()))


def adapter(unet):
    rng = np.random.default_rng(3)
    name = "unet.down_blocks.0.attentions.0.proj_in"
    unet.load_lora_adapter(
        {
            f"{name}.lora_A.weight": mx.array(rng.normal(size=(2, 8)).astype(np.float32)),
            f"{name}.lora_B.weight": mx.array(rng.normal(size=(8, 2)).astype(np.float32)),
        }
    )


def mutated_processor(unet):
    """A constant inside an object that stays in its place."""
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor.gain = 3.0


class Gain(AttnProcessor):
    """The attention times a constant that may change, and a function of it."""

    gain = 1.0

    def __init__(self):
        self.after = partial(mx.multiply, 1.0)

    def __call__(self, *args, **keywords):
        return self.after(super().__call__(*args, **keywords) * self.gain)


def function_of_a_processor(unet):
    """The same function with another constant."""
    next(iter(unet.attn_processors.values())).after = partial(mx.multiply, 3.0)


CHANGES = {
    "update": lambda unet: unet.update(tree_map(lambda p: p * 1.1, unet.parameters())),
    "one weight": lambda unet: setattr(unet.conv_out, "weight", unet.conv_out.weight * 2),
    "freeu": lambda unet: unet.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "freeu again": lambda unet: (unet.enable_freeu(0.9, 0.2, 1.2, 1.4), unet.enable_freeu(0.1, 0.2, 2, 2)),
    "quantize": lambda unet: unet.quantize(bits=4, group_size=32, recipe="uniform"),
    "lora processors": lora,
    "lora": adapter,
    "lora fused": lambda unet: (adapter(unet), unet.fuse_lora(2.0)),
    "lora weight": lambda unet: (adapter(unet), unet.set_adapters("default", 0.3)),
    "constant of a layer": lambda unet: setattr(unet.conv_norm_out, "eps", 0.5),
    "constant of a processor": mutated_processor,
    "function of a processor": function_of_a_processor,
    "half precision": lambda unet: unet.set_dtype(mx.float16),
    "another class": lambda unet: setattr(unet.down_blocks[0].resnets[0], "act", nn.GELU()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(small, name):
    small.set_attn_processor(Gain())
    small.compile()
    before = same(small)
    CHANGES[name](small)
    after = same(small, atol=5e-3 if name == "half precision" else 1e-5)
    assert np.abs(before - after).max() > 1e-4 * np.abs(before).max()


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
        lambda unet: unet.set_attn_processor(SlicedAttnProcessor(1)),
        lambda unet: unet.fuse_qkv_projections(),
        lambda unet: unet.enable_forward_chunking(1),
    ],
)
def test_options_that_change_no_result(small, change, monkeypatch):
    small.set_default_attn_processor()
    small.compile()
    before = same(small)
    count = count_traces(small, monkeypatch)
    change(small)
    after = small(*inputs()).sample
    assert count == [1], "the option must be part of the trace"
    np.testing.assert_allclose(np.array(after), before, atol=1e-5 * np.abs(before).max())


def test_back_and_forth(unet, monkeypatch):
    """An earlier structure finds its trace again, with the weights of now."""
    unet.compile()
    plain = same(unet)
    adapter(unet)
    with_lora = same(unet)
    count = count_traces(unet, monkeypatch)
    unet.unload_lora()
    np.testing.assert_array_equal(np.array(unet(*inputs()).sample), plain)
    assert count == [0]
    unet.conv_out.weight = unet.conv_out.weight * 2
    assert np.abs(same(unet) - plain).max() > 1e-2
    assert np.abs(with_lora - plain).max() > 1e-3


def test_few_structures_are_kept(small):
    small.compile()
    for i in range(compilation._MOST_STRUCTURES + 2):
        small.enable_freeu(0.9, 0.2, 1.2, 1.4 + i)
        same(small)
    assert len(small._compiled._compiled) == compilation._MOST_STRUCTURES


def test_text_context(unet, monkeypatch):
    """Keys and values are made once for all steps, and two prompts of one shape share a trace."""
    unet.compile()
    sample, timestep, text = inputs()
    first, second = TextContext(text), TextContext(text + 1)
    one = same(unet, sample, timestep, first)
    keys = [id(array) for pair in first.take_apart()[2] for array in pair]
    np.testing.assert_allclose(one, same(unet, sample, timestep, text), atol=1e-5)
    count = count_traces(unet, monkeypatch)
    assert np.abs(np.array(unet(sample, timestep, second).sample) - one).max() > 1e-2
    assert count == [1]  # to make the keys and values of the second; its trace is the first's
    same(unet, sample, 7, second)
    same(unet, sample, timestep, first)
    assert [id(array) for pair in first.take_apart()[2] for array in pair] == keys


def test_gradients(small):
    sample, timestep, text = inputs()

    def loss(sample):
        return small(sample, timestep, text).sample.square().mean()

    plain = mx.grad(loss)(sample)
    small.compile()
    np.testing.assert_allclose(np.array(mx.grad(loss)(sample)), np.array(plain), atol=1e-6)


def test_dropout_is_drawn_anew(small):
    small.train()
    small.compile()
    first, second = (np.array(small(*inputs(seed=4)).sample) for _ in range(2))
    np.testing.assert_array_equal(first, second)  # `inputs` seeds the generator
    args = inputs()
    assert np.abs(np.array(small(*args).sample) - np.array(small(*args).sample)).max() > 1e-4


def test_pipeline(tmp_path):
    pipe = TextToVideoPipeline.from_pretrained(tiny.write_pipeline(tmp_path / "pipe"))
    settings = dict(num_frames=3, num_inference_steps=3, seed=2, output_type="latent")
    plain = pipe("a cat", **settings).frames
    pipe.unet.compile()
    for prompt in ("a cat", "a dog", "a cat"):
        compiled = pipe(prompt, **settings).frames
    np.testing.assert_allclose(np.array(compiled), np.array(plain), atol=1e-4)


def test_saving_and_quantizing_a_compiled_network(unet, tmp_path):
    unet.compile()
    same(unet)
    unet.save_pretrained(tmp_path / "unet")
    again = UNet3DConditionModel.from_pretrained(tmp_path / "unet")
    np.testing.assert_array_equal(np.array(again(*inputs()).sample), both(unet, *inputs())[1])
