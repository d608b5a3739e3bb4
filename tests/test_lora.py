"""LoRA and Custom Diffusion: every spelling of a file, weights, fusing, saving, and what is refused."""

import json
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import TextToVideoPipeline, UNet3DConditionModel, VideoToVideoPipeline, media
from mlx.utils import tree_flatten
from mlx_unet3d.checkpoints.adapter_keys import components_of
from mlx_unet3d.checkpoints.adapters import AdapterFile
from mlx_unet3d.cli import main
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.layers import attention_adapters
from mlx_unet3d.layers.adapted import (
    AdaptedLayer,
    adapter_scale,
    layout_of,
    scaled_adapters,
    weight_shape,
)
from mlx_unet3d.layers.attention_processors import AttnProcessor2_0

RANK = 2


def make(**quantization):
    unet = tiny.randomize(UNet3DConditionModel(**tiny.UNET)).eval()
    return unet.quantize(**quantization) if quantization else unet


def inputs(dtype=mx.float32):
    mx.random.seed(1)
    sample, text = mx.random.normal((1, 4, 3, 4, 4)), mx.random.normal((1, 5, 12))
    return sample.astype(dtype), 500, text.astype(dtype)


def run(unet, **keywords):
    return unet(*inputs(unet.dtype), **keywords).sample


def layers_of(unet, kinds=("linear", "conv2d", "conv3d_temporal")):
    return {path: m for path, m in unet._adaptable().items() if layout_of(m) in kinds}


def random_lora(unet, seed=0, wanted=lambda path: True):
    """Arrays in torch's layout: path -> (down, up), for all kinds of layers."""
    rng = np.random.default_rng(seed)

    def array(*shape):
        return mx.array(0.2 * rng.normal(size=shape).astype(np.float32))

    made = {}
    for path, layer in layers_of(unet).items():
        if not wanted(path):
            continue
        out, *rest = weight_shape(layer)
        if len(rest) == 1:
            made[path] = array(RANK, *rest), array(out, RANK)
        else:
            height, width, channels = rest
            ends = (1,) if layout_of(layer) == "conv3d_temporal" else ()
            made[path] = (
                array(RANK, channels, height, width, *ends),
                array(out, RANK, 1, 1, *ends),
            )
    return made


def merged(unet, lora, scale):
    """The same network with the changes in its weights, by plain arithmetic."""
    weights = dict(tree_flatten(unet.parameters()))
    changed = []
    for path, (down, up) in lora.items():
        weight = weights[f"{path}.weight"]
        change = (up.reshape(up.shape[0], -1) @ down.reshape(RANK, -1)).reshape(-1, *down.shape[1:])
        if change.ndim == 5:
            change = change[..., 0]
        if change.ndim == 4:
            change = change.transpose(0, 2, 3, 1)
        changed.append((f"{path}.weight", weight + scale * change.reshape(weight.shape)))
    unet.load_weights(changed, strict=False)
    return unet


def attention(path):
    return path.rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v") or path.endswith("to_out.0")


def processor_key(path):
    layer, name = path.removesuffix(".0").rsplit(".", 1)
    return f"{layer}.processor.{name}_lora"


SPELLINGS = {
    # name: (which layers, keys and arrays of a layer, alpha over rank)
    "peft": (None, lambda p, d, u: {f"unet.{p}.lora_A.weight": d, f"unet.{p}.lora_B.weight": u}, 1),
    "peft alone": (
        None,
        lambda p, d, u: {
            f"base_model.model.{p}.lora_A.default.weight": d,
            f"base_model.model.{p}.lora_B.default.weight": u,
        },
        1,
    ),
    "kohya": (
        None,
        lambda p, d, u: {
            f"lora_unet_{p.replace('.', '_')}.lora_down.weight": d,
            f"lora_unet_{p.replace('.', '_')}.lora_up.weight": u,
            f"lora_unet_{p.replace('.', '_')}.alpha": mx.array(0.5 * RANK),
        },
        0.5,
    ),
    "processors": (
        attention,
        lambda p, d, u: {
            f"unet.{processor_key(p)}.down.weight": d,
            f"unet.{processor_key(p)}.up.weight": u,
        },
        1,
    ),
    "processors without prefix": (
        attention,
        lambda p, d, u: {f"{processor_key(p)}.down.weight": d, f"{processor_key(p)}.up.weight": u},
        1,
    ),
    "layers": (
        None,
        lambda p, d, u: {f"unet.{p}.lora.down.weight": d, f"unet.{p}.lora.up.weight": u},
        1,
    ),
    "lora_layer": (
        attention,
        lambda p, d, u: {f"{p}.lora_layer.down.weight": d, f"{p}.lora_layer.up.weight": u},
        1,
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name, tmp_path):
    which, spell, scaling = SPELLINGS[name]
    unet = make()
    lora = random_lora(unet, wanted=which or (lambda path: True))
    tensors = {key: array for path, (d, u) in lora.items() for key, array in spell(path, d, u).items()}
    mx.save_safetensors(str(tmp_path / "lora.safetensors"), tensors, {"format": "pt"})
    before = run(unet)
    assert unet.load_lora_adapter(tmp_path / "lora.safetensors") == len(lora)
    for scale in (0.0, 0.5, 1.0):
        truth = run(merged(make(), lora, scaling * scale))
        assert mx.allclose(run(unet, cross_attention_kwargs={"scale": scale}), truth, atol=2e-5)
        unet.set_adapters("default", scale)
        assert mx.allclose(run(unet), truth, atol=2e-5)
        assert mx.array_equal(run(unet), before) == (scale == 0)
        unet.set_adapters("default")
    unet.unload_lora()
    assert mx.array_equal(run(unet), before)


def test_original_names():
    """ModelScope's names of blocks, as the web UI and, with "_" for every ".", kohya's scripts write them."""
    unet = make()
    names = {path: name for name, path in unet.other_layer_names(layers_of(unet)).items()}
    assert names.keys() == layers_of(unet).keys()
    block = "transformer_blocks.0.attn1.to_q"
    known = {
        "time_embedding.linear_1": "time_embed.0",
        f"transformer_in.{block}": f"input_blocks.0.1.{block}",
        f"down_blocks.0.attentions.0.{block}": f"input_blocks.1.1.{block}",
        "down_blocks.0.temp_convs.0.conv1.2": "input_blocks.1.0.temopral_conv.conv1.2",
        f"mid_block.temp_attentions.0.{block}": f"middle_block.2.{block}",
        "up_blocks.1.resnets.1.conv_shortcut": "output_blocks.3.0.skip_connection",
    }
    lora = random_lora(unet, wanted=lambda path: path in known)
    truth = run(merged(make(), lora, 1))
    for spell in (
        lambda name: f"model.diffusion_model.{name}.lora_{{}}.weight",
        lambda name: f"lora_unet_{name.replace('.', '_')}.lora_{{}}.weight",
    ):
        tensors = {}
        for path, (down, up) in lora.items():
            key = spell(known[path])
            tensors |= {key.format("down"): down, key.format("up"): up}
        again = make()
        assert again.load_lora_adapter(tensors) == len(known)
        assert mx.allclose(run(again), truth, atol=2e-5)


def test_list_that_fits_several_classes_is_refused(monkeypatch):
    unet = make()
    several = {("conv_in",): "ResnetBlock2D", ("conv_out",): "Attention"}
    monkeypatch.setattr(UNet3DConditionModel, "layers_of_list", lambda self, file: several)
    file = AdapterFile(None, {"0": mx.zeros((8, 1)), "1": mx.zeros((1, 4, 3, 3))}, {})
    with pytest.raises(
        CheckpointError, match="layers in ResnetBlock2D or in Attention; give a file with names"
    ):
        unet.load_lora_adapter(file)


def stable_pairs(unet):
    """loralib's shapes, and the change that each stands for."""
    rng = np.random.default_rng(3)
    made, changes = {}, {}
    for path, layer in layers_of(unet).items():
        out, *rest = weight_shape(layer)
        k = rest[0] if len(rest) > 1 else 1
        a = 0.1 * rng.normal(size=(RANK * k, rest[-1] * k)).astype(np.float32)
        b = 0.1 * rng.normal(size=(out * k, RANK * k)).astype(np.float32)
        made |= {f"{path}.lora_A": mx.array(a), f"{path}.lora_B": mx.array(b)}
        change = b @ a
        if layout_of(layer) == "conv2d":  # torch: (lora_B @ lora_A).view(O, I, k, k)
            change = change.reshape(out, rest[-1], k, k).transpose(0, 2, 3, 1)
        elif layout_of(layer) == "conv3d_temporal":  # torch: .view(O, I, k, k, 1).mean(-2, keepdim=True)
            change = change.reshape(out, rest[-1], k, k, 1).mean(-2).transpose(0, 2, 3, 1)
        changes[path] = mx.array(np.ascontiguousarray(change))
    return made, changes


def test_stable_lora():
    unet = make()
    tensors, changes = stable_pairs(unet)
    unet.load_lora_adapter(tensors)
    plain = make()
    weights = dict(tree_flatten(plain.parameters()))
    plain.load_weights(
        [
            (f"{p}.weight", weights[f"{p}.weight"] + c.reshape(weights[f"{p}.weight"].shape))
            for p, c in changes.items()
        ],
        strict=False,
    )
    assert mx.allclose(run(unet), run(plain), atol=2e-5)
    unet.fuse_lora()
    assert mx.allclose(run(unet), run(plain), atol=2e-5)
    with pytest.raises(ValueError, match="no low-rank change"):
        unet.save_lora_adapter("anywhere")


def peft(lora, prefix="unet."):
    return {
        f"{prefix}{path}.lora_{half}.weight": array
        for path, pair in lora.items()
        for half, array in zip("AB", pair, strict=True)
    }


def test_several_at_once():
    unet = make()
    first, second = random_lora(unet, 0), random_lora(unet, 1, lambda path: "conv" not in path)
    unet.load_lora_adapter(peft(first), "a")
    unet.load_lora_adapter(peft(second), "b", weight=0.25)
    assert unet.list_adapters() == {"a": 1, "b": 0.25}
    assert mx.allclose(run(unet), run(merged(merged(make(), first, 1), second, 0.25)), atol=5e-5)
    unet.set_adapters(["b", "a"], [1.5, 0.5])
    assert mx.allclose(run(unet), run(merged(merged(make(), first, 0.5), second, 1.5)), atol=5e-5)
    unet.set_adapters("b")
    assert mx.allclose(run(unet), run(merged(make(), second, 1)), atol=5e-5)
    unet.delete_adapters("a")
    assert unet.list_adapters() == {"b": 1}
    assert not isinstance(unet.conv_in, AdaptedLayer)
    unet.delete_adapters("b")
    assert mx.array_equal(run(unet), run(make()))


def test_fused_and_unfused(tmp_path):
    unet = make()
    before = run(unet)
    lora = random_lora(unet)
    unet.load_lora_adapter(peft(lora))
    beside = run(unet, cross_attention_kwargs={"scale": 0.7})
    unet.fuse_lora(0.7)
    assert mx.allclose(run(unet), beside, atol=2e-5)
    for refused in (
        lambda: unet.fuse_lora(),
        lambda: unet.set_adapters("default"),
        lambda: unet.delete_adapters("default"),
        lambda: unet.load_lora_adapter(peft(lora), "more"),
    ):
        with pytest.raises(ValueError, match="call unfuse_lora"):
            refused()
    unet.unfuse_lora()
    assert mx.allclose(run(unet, cross_attention_kwargs={"scale": 0.7}), beside, atol=1e-6)
    assert mx.array_equal(run(unet, cross_attention_kwargs={"scale": 0.0}), before)
    unet.fuse_lora()
    with pytest.raises(ValueError, match="before saving"):
        unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="before quantizing"):
        unet.quantize(8)
    unet.unload_lora()
    unet.save_pretrained(tmp_path)
    again = UNet3DConditionModel.from_pretrained(tmp_path)
    assert mx.allclose(run(again), run(merged(make(), lora, 1)), atol=2e-5)
    with pytest.raises(ValueError, match="no adapter to fuse"):
        unet.fuse_lora()


def test_beside_quantized_weights():
    config = tiny.UNET | {"block_out_channels": (32, 64), "cross_attention_dim": 12}

    def wide(**quantization):
        unet = tiny.randomize(UNet3DConditionModel(**config)).eval()
        return unet.quantize(**quantization) if quantization else unet

    lora = random_lora(wide())
    dense, quantized = wide(), wide(bits=8, group_size=32)
    base = run(quantized) - run(dense)
    for unet in (dense, quantized):
        unet.load_lora_adapter(peft(lora))
    change = mx.abs(run(dense) - run(wide())).max()
    assert mx.abs(run(quantized) - run(dense)).max() < mx.abs(base).max() + 0.1 * change
    with pytest.raises(ValueError, match="cannot be fused into quantized"):
        quantized.fuse_lora()
    assert not any(layer.fused for layer in quantized._adapted().values())


def test_half_precision_stays():
    unet = make()
    unet.set_dtype(mx.float16)
    unet.load_lora_adapter(peft(random_lora(unet)))
    assert run(unet).dtype == mx.float16
    assert all(array.dtype == mx.float16 for _, array in tree_flatten(unet.parameters()))


def test_saving_and_loading(tmp_path):
    unet = make()
    tensors = {
        key: array
        for path, (d, u) in random_lora(unet).items()
        for key, array in SPELLINGS["kohya"][1](path, d, u).items()
    }
    unet.load_lora_adapter(tensors)
    file = unet.save_lora_adapter(tmp_path)
    assert file.name == "pytorch_lora_weights.safetensors"
    again = make()
    again.load_lora_adapter(tmp_path)
    assert mx.array_equal(run(again), run(unet))
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        unet.save_lora_adapter(tmp_path, weight_name="lora.bin")
    with pytest.raises(ValueError, match="no adapter 'other'; there are: default"):
        unet.save_lora_adapter(tmp_path, "other")


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 3.0), (True, 3.0 * RANK**0.5)])
def test_settings_of_peft(tmp_path, rslora, scaling):
    unet = make()
    lora = random_lora(unet, wanted=lambda p: p.endswith("to_q"))
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), peft(lora, "base_model.model."))
    own = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    config = {"r": RANK, "lora_alpha": 3 * RANK, "use_rslora": rslora, "alpha_pattern": {own: 0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    unet.load_lora_adapter(tmp_path)
    truth = merged(make(), {p: pair for p, pair in lora.items() if p != own}, scaling)
    assert mx.allclose(run(unet), run(truth), atol=5e-5)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {r"mid.*\.to_q": 0}}))
    expression = make()
    expression.load_lora_adapter(tmp_path)
    truth = merged(make(), {p: pair for p, pair in lora.items() if not p.startswith("mid")}, scaling)
    assert mx.allclose(run(expression), run(truth), atol=5e-5)
    for wrong in ("(a+)+", "(", ".*" * 20, "(.|.)" * 20, "x?" * 60):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {wrong: 0}}))
        with pytest.raises(CheckpointError, match=r"could take forever|no regular expression"):
            unet.load_lora_adapter(tmp_path, "expression")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="DoRA"):
        unet.load_lora_adapter(tmp_path, "dora")


Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_Q = "text_model.encoder.layers.0.self_attn.q_proj"
GOOD = {f"{Q}.lora_A.weight": mx.zeros((2, 16)), f"{Q}.lora_B.weight": mx.zeros((16, 2))}
REFUSED = {
    "empty": ({}, "has nothing for the unet"),
    "text only": (
        {f"text_encoder.{key.replace(Q, TEXT_Q)}": a for key, a in GOOD.items()},
        "has nothing for the unet",
    ),
    "text by its layers": (
        {f"unet.{key.replace(Q, TEXT_Q)}": a for key, a in GOOD.items()},
        "has nothing for the unet",
    ),
    "other names": ({"double_blocks.0.lora_A.weight": mx.zeros((2, 2))}, "fit no layer"),
    "some other names": (GOOD | {"double_blocks.0.lora_A.weight": mx.zeros((2, 2))}, "1 of 3 tensors"),
    "no lora": ({f"{Q}.weight": mx.zeros((16, 16))}, "fit no layer"),
    "one half": ({f"{Q}.lora_A.weight": mx.zeros((2, 16))}, "one half"),
    "wider": (GOOD | {f"{Q}.lora_A.weight": mx.zeros((2, 320))}, "do not fit"),
    "ranks": (GOOD | {f"{Q}.lora_B.weight": mx.zeros((16, 3))}, "do not fit"),
    "rank 0": (
        {f"{Q}.lora_A.weight": mx.zeros((0, 16)), f"{Q}.lora_B.weight": mx.zeros((16, 0))},
        "do not fit",
    ),
    "dora": (GOOD | {f"{Q}.lora_magnitude_vector.weight": mx.zeros((16,))}, "DoRA"),
    "loha": ({f"{Q}.hada_w1_a": mx.zeros((2, 2))}, "LoHa"),
    "infinite alpha": (GOOD | {f"{Q}.alpha": mx.array(float("inf"))}, "must be a number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files(name, tmp_path):
    tensors, message = REFUSED[name]
    unet = make()
    before = dict(tree_flatten(unet.parameters())).keys()
    with pytest.raises(CheckpointError, match=message):
        unet.load_lora_adapter(tensors)
    assert dict(tree_flatten(unet.parameters())).keys() == before
    assert not unet.list_adapters()


def test_file_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nosuch\.safetensors does not exist"):
        UNet3DConditionModel(**tiny.UNET).load_lora_adapter("nosuch.safetensors")


def test_refused_arguments(tmp_path):
    unet = make()
    with pytest.raises(FileNotFoundError, match="has none of pytorch_lora_weights"):
        unet.load_lora_adapter(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="web page"):
        unet.load_lora_adapter(tmp_path / "a.safetensors")
    unet.load_lora_adapter(GOOD)
    with pytest.raises(ValueError, match="there is an adapter 'default'"):
        unet.load_lora_adapter(GOOD)
    with pytest.raises(ValueError, match="finite number"):
        unet.load_lora_adapter(GOOD, "b", weight=float("nan"))
    with pytest.raises(ValueError, match="1 adapter names and 2 weights"):
        unet.set_adapters("default", [1, 2])
    with pytest.raises(ValueError, match="no adapter 'c'"):
        unet.set_adapters("c")
    with pytest.raises(ValueError, match="projections with adapters"):
        unet.fuse_qkv_projections()


# Processors.


def test_processor_files(tmp_path):
    unet = make()
    unet.set_attn_processor(processors_of(unet))
    file = unet.save_attn_procs(tmp_path)
    assert file.name == "pytorch_lora_weights.safetensors"
    again = make()
    again.load_attn_procs(tmp_path)
    assert mx.allclose(run(again), run(unet), atol=2e-5)
    scaled = {"cross_attention_kwargs": {"scale": 0.5}}
    assert mx.allclose(run(again, **scaled), run(unet, **scaled), atol=2e-5)


def test_processors_are_an_adapter_as_any(tmp_path):
    unet, direct = make(), make()
    loras = processors_of(unet)
    unet.set_attn_processor(loras)
    assert unet.list_adapters() == {"processors": 1.0}
    direct.load_lora_adapter(unet.save_lora_adapter(tmp_path, "processors"))
    assert mx.allclose(run(direct), run(unet), atol=1e-6)
    both = random_lora(unet)
    for network in (unet, direct):
        network.load_lora_adapter(peft(both), "more", weight=0.5)
    assert mx.allclose(run(unet), run(direct), atol=1e-6)
    beside = run(unet)
    unet.fuse_lora()
    assert mx.allclose(run(unet), beside, atol=2e-5)
    with pytest.raises(ValueError, match="call unfuse_lora"):
        unet.set_default_attn_processor()
    unet.unfuse_lora()
    unet.set_default_attn_processor()
    assert unet.list_adapters() == {"more": 0.5}
    assert {type(p).__name__ for p in unet.attn_processors.values()} == {"AttnProcessor"}
    wrong = dict(loras)
    wrong[next(reversed(wrong))] = attention_adapters.LoRAAttnProcessor(3)
    with pytest.raises(ValueError, match="3 channels to 3, the projection"):
        unet.set_attn_processor(wrong)
    assert unet.list_adapters() == {"more": 0.5}


def test_adapters_beside_fused_projections():
    unet, plain = make(), make()
    unet.fuse_qkv_projections()
    for network in (unet, plain):
        network.load_lora_adapter(peft(random_lora(plain)))
    assert mx.allclose(run(unet), run(plain), atol=1e-5)


def test_the_scale_of_a_forward_is_its_own():
    """In threads, between forwards that are built and not yet computed, compiled or not."""
    unet = make()
    unet.load_lora_adapter(peft(random_lora(unet)))
    scales = (0.0, 0.5, 1.0, -2.0)
    expected = {s: run(unet, cross_attention_kwargs={"scale": s}) for s in scales}
    mx.eval(expected)
    for compiled in (False, True):
        if compiled:
            unet.compile()
        lazy = {s: run(unet, cross_attention_kwargs={"scale": s}) for s in scales}  # none computed yet
        for scale in scales:
            assert mx.allclose(lazy[scale], expected[scale], atol=1e-5), scale
    unet.uncompile()

    inside = []

    class Asks(AttnProcessor2_0):
        """A processor in which another forward of the network runs with a scale of its own."""

        def __call__(self, *args, **keywords):
            if not inside:
                inside.append(True)
                assert mx.allclose(run(unet), expected[1.0], atol=1e-5)
            return super().__call__(*args, **keywords)

    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.set_processor(Asks())
    assert mx.allclose(run(unet, cross_attention_kwargs={"scale": 0.5}), expected[0.5], atol=1e-5)
    assert inside
    for wrong in ("much", float("nan"), True):
        with pytest.raises(ValueError, match="finite number"):
            run(unet, cross_attention_kwargs={"scale": wrong})


def test_scales_in_threads():
    unet = make()
    unet.load_lora_adapter(peft(random_lora(unet)))
    scales = (0.0, 0.5, 1.0, -2.0)
    layer = next(iter(unet._adapted().values()))
    seen = {}

    def amount(scale):
        with scaled_adapters(scale):
            barrier.wait(10)  # all scales are set at once
            seen[scale] = adapter_scale()
            barrier.wait(10)

    barrier = threading.Barrier(len(scales))
    threads = [threading.Thread(target=amount, args=(s,)) for s in scales]
    before = dict(vars(layer))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {s: s for s in scales}
    assert vars(layer) == before
    assert adapter_scale() == 1


def processors_of(unet, kind=attention_adapters.LoRAAttnProcessor2_0):
    loras = {}
    for i, (path, layer) in enumerate(unet._attentions().items()):
        context = layer.cross_attention_dim if layer.is_cross_attention else None
        loras[f"{path}.processor"] = tiny.randomize(kind(layer.query_dim, context, rank=2), i)
    return loras


def test_custom_diffusion_files(tmp_path):
    unet = make()
    made = {}
    for i, (path, layer) in enumerate(unet._attentions().items()):
        context = layer.cross_attention_dim if layer.is_cross_attention else None
        crossing = layer.is_cross_attention
        processor = attention_adapters.CustomDiffusionAttnProcessor2_0(
            crossing, i % 2 == 0 and crossing, layer.query_dim, context
        )
        made[f"{path}.processor"] = tiny.randomize(processor, i)
    unet.set_attn_processor(made)
    file = unet.save_attn_procs(tmp_path)
    assert file.name == "pytorch_custom_diffusion_weights.safetensors"
    again = make()
    again.load_attn_procs(tmp_path)
    assert mx.allclose(run(again), run(unet), atol=1e-6)
    tensors = mx.load(str(file))
    first = next(iter(tensors))
    for wrong in (
        {first.replace("mid_block", "end_block").replace("down_blocks", "sideways"): tensors[first]},
        tensors | {first: mx.zeros((3, 3))},
    ):
        with pytest.raises(CheckpointError, match=r"Custom Diffusion of a layer|other shapes"):
            make().load_attn_procs(wrong)
    with pytest.raises(ValueError, match="without weights"):
        make().save_attn_procs(tmp_path)


# Pipelines and the command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("model") / "source")


@pytest.fixture
def both(folder, tmp_path):
    """A file for the UNet and the text encoder."""
    pipe = TextToVideoPipeline.from_pretrained(folder)
    tensors = peft(random_lora(pipe.unet, wanted=attention))
    tensors |= peft(random_lora(pipe.text_encoder, wanted=lambda p: p.endswith("q_proj")), "text_encoder.")
    mx.save_safetensors(str(tmp_path / "both.safetensors"), tensors)
    return tmp_path / "both.safetensors"


def test_pipeline(folder, both):
    pipe = TextToVideoPipeline.from_pretrained(folder)
    short = dict(num_frames=2, num_inference_steps=2)
    before = pipe("a cat", **short).frames
    counts = pipe.load_lora_weights(both, "style")
    assert counts["text_encoder"] == 2
    assert counts["unet"] == len(pipe.unet.list_adapters() and pipe.unet._adapted())
    with_both = pipe("a cat", **short).frames
    assert not np.array_equal(with_both, before)
    pipe.set_adapters("style", 0.0)
    assert np.array_equal(pipe("a cat", **short).frames, before)
    pipe.set_adapters("style")
    pipe.fuse_lora()
    assert np.allclose(pipe("a cat", **short).frames, with_both, atol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert np.array_equal(pipe("a cat", **short).frames, before)
    with pytest.raises(ValueError, match="no adapter to fuse"):
        pipe.fuse_lora()
    with pytest.raises(ValueError, match="no adapter 'style'"):
        pipe.set_adapters("style")


@pytest.mark.parametrize("kind", [TextToVideoPipeline, VideoToVideoPipeline])
def test_the_scale_of_a_call_is_that_of_all_networks(folder, both, kind):
    pipe = kind.from_pretrained(folder)
    pipe.load_lora_weights(both, "style")
    args = dict(num_inference_steps=2, output_type="latent")
    args |= {"num_frames": 2} if kind is TextToVideoPipeline else {"video": mx.zeros((1, 4, 2, 4, 4))}
    scaled = pipe("a cat", cross_attention_kwargs={"scale": 0.3}, **args).frames
    states = pipe.encode_prompt("a cat", "rain", lora_scale=0.3)
    pipe.set_adapters("style", 0.3)
    assert mx.allclose(pipe("a cat", **args).frames, scaled, atol=1e-5)
    for ours, weighed in zip(states, pipe.encode_prompt("a cat", "rain"), strict=True):
        assert mx.array_equal(ours, weighed)
    pipe.text_encoder.set_adapters("style", 1.0)
    assert not mx.allclose(pipe("a cat", **args).frames, scaled, atol=1e-3)
    with pytest.raises(ValueError, match="scale"):
        pipe("a cat", cross_attention_kwargs={"scale": "much"}, **args)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "unet"])
@pytest.mark.parametrize("spelling", ["{0}.{2}.lora_A.weight", "lora_{1}_{2}.lora_down.weight"])
def test_the_network_of_a_key(name, spelling):
    """The text encoders of SDXL have layers of the same names."""
    layer = "mid_block.attentions.0.proj_in" if name == "unet" else "text_model.encoder.layers.0.mlp.fc1"
    short = {"text_encoder": "te1", "text_encoder_2": "te2", "unet": "unet"}[name]
    if "down" in spelling:
        layer = layer.replace(".", "_")
    key = spelling.format(name, short, layer)
    assert components_of(AdapterFile(None, {key: mx.zeros(1)}, {})) == {name}


def test_pipeline_loads_all_or_nothing(folder, both):
    pipe = TextToVideoPipeline.from_pretrained(folder)
    tensors = mx.load(str(both)) | {"text_encoder.nowhere.lora_A.weight": mx.zeros((2, 2))}
    with pytest.raises(CheckpointError, match="fit no layer of the text_encoder"):
        pipe.load_lora_weights(tensors)
    assert not pipe.unet.list_adapters()


def test_a_pipeline_with_adapters_is_not_saved_over_another(folder, both, tmp_path):
    pipe = TextToVideoPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "saved")
    before = (tmp_path / "saved" / "model_index.json").read_bytes()
    pipe.load_lora_weights(both)
    with pytest.raises(ValueError, match="adapters are loaded; before saving"):
        pipe.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model_index.json").read_bytes() == before


def test_command(folder, both, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["generate", "a cat", "--model", str(folder), "--num-frames", "2", "--steps", "2"]
    assert main([*command, "-o", "plain.png"]) == 0
    assert main([*command, "-o", "one.png", "--lora", "both.safetensors", "0.5"]) == 0
    assert "2 layers of the text_encoder, weight 0.5" in capsys.readouterr().err
    one = media.read_metadata("one.png")
    assert one["lora"] == '[["both.safetensors", 0.5]]'
    assert one["weights"] != media.read_metadata("plain.png")["weights"]
    assert main(["generate", "--from", "one.png", "--model", str(folder), "-o", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("one.png").read_bytes()
    assert main([*command, "-o", "none.png", "--lora", "both.safetensors", "0"]) == 0
    frames = [media.read_video(f"{name}.png")[0] for name in ("plain", "one", "none")]
    assert np.array_equal(frames[0], frames[2])
    assert not np.array_equal(frames[0], frames[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lora", "nowhere.safetensors"), "does not exist; give an existing file"),
        (("--lora", "both.safetensors", "much"), "the weight must be a finite number"),
        (("--lora", "both.safetensors", "1", "2"), "repeat --lora"),
        (("--lora", "both.safetensors", "--lora", "both.safetensors"), "there is an adapter"),
    ],
)
def test_command_refuses(folder, both, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    short = ("--num-frames", "2", "--steps", "2")
    assert main(["generate", "a cat", "--model", str(folder), "-o", "out.png", *short, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out.png").exists()
