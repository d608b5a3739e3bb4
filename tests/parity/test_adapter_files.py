"""Adapter files as trainers and users really have them, against torch, PEFT and diffusers, in fp32."""

import copy
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

import mlx.core as mx  # noqa: E402
from mlx_unet3d import CLIPTextModel, UNet3DConditionModel  # noqa: E402
from diffusers.models.attention_processor import Attention, AttnProcessor2_0  # noqa: E402
from mlx_unet3d.errors import CheckpointError  # noqa: E402
from mlx_unet3d.layers.adapted import ADAPTABLE, walk  # noqa: E402
from reference import Inputs, relative_error, unet_pair  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

LAYERS = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)


def trained(model, inputs, **config):
    """The network with an adapter of PEFT, all of whose numbers are drawn."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


EXTRAS = {
    "bias of lora_B": dict(target_modules=r".*(to_q|to_out\.0|resnets\.\d+\.conv1|proj_in)$", lora_bias=True),
    "modules_to_save": dict(
        target_modules=["to_q"], modules_to_save=["conv_in", "conv_out", "conv_norm_out", "norm1", "linear_2"]
    ),
    "expressions": dict(
        target_modules=["to_q", "to_k", "to_v"],
        alpha_pattern={  # in the order in which PEFT writes them to its config
            r"^mid_block\..*": 11,
            r"down_blocks.*attn1\.to_q": 3,
            "to_v": 2,
            r"transformer_blocks\.0\.(attn2|attn1)\.to_[kq]": 9,
        },
        rank_pattern={r".*temp_attentions.*to_k": 2},
    ),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_extras_of_peft(tmp_path, name):
    theirs, ours = unet_pair(tmp_path / "unet")
    inputs = Inputs(theirs)
    base = inputs.theirs(theirs)
    model = trained(theirs, inputs, **EXTRAS[name])
    model.save_pretrained(tmp_path / "lora")
    expected = inputs.theirs(model)
    assert relative_error(base, expected) > 1e-2
    before = inputs.ours(ours)
    ours.load_lora_adapter(tmp_path / "lora")
    assert relative_error(inputs.ours(ours), expected) <= 1e-5
    if name != "bias of lora_B":  # PEFT does not merge one where the layer has no bias; nor do we
        ours.fuse_lora()
        assert relative_error(inputs.ours(ours), expected) <= 1e-5
        ours.unfuse_lora()
    else:
        with pytest.raises(ValueError, match="a bias for a layer that has none"):
            ours.fuse_lora()
    assert mx.array_equal(inputs.ours(ours, cross_attention_kwargs={"scale": 0.0}), before)
    ours.enable_pixel_chunking(16)
    ours.compile()
    assert relative_error(inputs.ours(ours), expected) <= 1e-5
    ours.unload_lora()
    ours.uncompile()
    ours.disable_pixel_chunking()
    assert mx.array_equal(inputs.ours(ours), before)


def test_a_bias_is_saved_and_read_again(tmp_path):
    theirs, ours = unet_pair(tmp_path / "unet")
    inputs = Inputs(theirs)
    model = trained(theirs, inputs, target_modules=r".*(resnets\.\d+\.conv1|linear_1)$", lora_bias=True)
    model.save_pretrained(tmp_path / "lora")
    ours.load_lora_adapter(tmp_path / "lora")
    again = UNet3DConditionModel.from_pretrained(tmp_path / "unet")
    again.load_lora_adapter(ours.save_lora_adapter(tmp_path / "ours"))
    ours.fuse_lora()
    for network in (ours, again):
        assert relative_error(inputs.ours(network), inputs.theirs(model)) <= 1e-5


def test_whole_state_of_a_peft_model(tmp_path):
    """`model.state_dict()` of the wrapper: base weights beside the adapter, behind base_layer."""
    theirs, ours = unet_pair(tmp_path / "unet")
    inputs = Inputs(theirs)
    model = trained(theirs, inputs, target_modules=["to_q"], modules_to_save=["conv_in"])
    torch.save(model.state_dict(), tmp_path / "state.bin")
    count = sum(name.endswith("to_q") for name, _ in model.base_model.model.named_modules())
    config = {"lora_alpha": 6}
    (tmp_path / "adapter_config.json").write_text(str(config).replace("'", '"'))
    (tmp_path / "state.bin").rename(tmp_path / "adapter_model.bin")
    assert ours.load_lora_adapter(tmp_path / "adapter_model.bin") == count + 1
    assert relative_error(inputs.ours(ours), inputs.theirs(model)) <= 1e-5


# Lists without names, of the classes that trainers offer.


def found_by_trainers(model, classes, kinds, parts=None):
    """torch's layers inside all modules of some classes, each once, in the order of `named_modules`."""
    found = {}
    for root, ancestor in model.named_modules():
        if type(ancestor).__name__ in classes:
            for path, layer in ancestor.named_modules():
                if isinstance(layer, kinds) and (parts is None or any(part in path for part in parts)):
                    found[f"{root}.{path}".strip(".")] = layer
    return list(found.items())


def merge(layers, rank=3, seed=5):
    """Merge drawn changes into layers; returns the list of a trainer."""
    generator, tensors = torch.Generator().manual_seed(seed), []
    with torch.no_grad():
        for _, layer in layers:
            out, *rest = layer.weight.shape
            r = min(rank, out, rest[0])
            up = torch.randn(out, r, *(1 for _ in rest[1:]), generator=generator) / 3
            down = torch.randn(r, *rest, generator=generator) / 10
            layer.weight += (up.flatten(1) @ down.flatten(1)).view(layer.weight.shape)
            tensors += [up, down]
    return tensors


UNET_CLASSES = {
    "UNet3DConditionModel": (["UNet3DConditionModel"], LAYERS, None),
    "linear layers alone": (["UNet3DConditionModel"], LAYERS[:1], None),
    "default": (["CrossAttention", "Attention", "GEGLU"], LAYERS[:1], None),
    "extended": (["ResnetBlock2D", "CrossAttention", "Attention", "GEGLU"], LAYERS, None),
    "resnets": (["ResnetBlock2D"], LAYERS, None),
    "temporal convolutions": (["TemporalConvLayer"], LAYERS, None),
    "both transformers": (["Transformer2DModel", "TransformerTemporalModel"], LAYERS, None),
    "MotionDirector, spatial": (["Transformer2DModel"], LAYERS[:1], ("attn1", "ff")),
    "MotionDirector, temporal": (["TransformerTemporalModel"], LAYERS[:1], ("attn1", "attn2", "ff")),
}


@pytest.mark.parametrize("name", UNET_CLASSES)
def test_lists_of_trainers(tmp_path, name):
    theirs, ours = unet_pair(tmp_path / "unet", time_cond_proj_dim=8)
    inputs = Inputs(theirs)
    base = inputs.theirs(theirs)
    layers = found_by_trainers(theirs, *UNET_CLASSES[name])
    tensors = merge(layers)
    torch.save(tensors, tmp_path / "300_unet.pt")
    assert ours.load_lora_adapter(tmp_path / "300_unet.pt") == len(layers)
    expected = inputs.theirs(theirs)
    assert relative_error(base, expected) > 1e-3
    assert relative_error(inputs.ours(ours), expected) <= 1e-5
    torch.save(tensors[2:], tmp_path / "less.pt")
    with pytest.raises(CheckpointError, match="tensors without names, which must be"):
        ours.load_lora_adapter(tmp_path / "less.pt", "less")


def text_pair(folder):
    from transformers import CLIPTextConfig
    from transformers import CLIPTextModel as ReferenceText

    torch.manual_seed(0)
    config = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3)
    theirs = ReferenceText(CLIPTextConfig(**config, num_attention_heads=2, eos_token_id=63)).eval()
    theirs.save_pretrained(folder)
    return theirs, CLIPTextModel.from_pretrained(folder)


IDS = np.arange(3, 13)[None]


def text_error(ours, theirs):
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS))[0]
    return relative_error(ours(IDS.astype(np.int32)), expected)


@pytest.mark.parametrize("classes", [["CLIPEncoderLayer"], ["CLIPAttention"], ["CLIPMLP"]], ids=str)
def test_lists_of_the_text_encoder(tmp_path, classes):
    theirs, ours = text_pair(tmp_path / "text")
    layers = found_by_trainers(theirs, classes, LAYERS)
    torch.save(merge(layers), tmp_path / "300_text_encoder.pt")
    unet = unet_pair(tmp_path / "unet")[1]
    with pytest.raises(CheckpointError, match="of the unet"):
        unet.load_lora_adapter(tmp_path / "300_text_encoder.pt")
    assert ours.load_lora_adapter(tmp_path / "300_text_encoder.pt") == len(layers)
    assert text_error(ours, theirs) <= 1e-5


def test_layers_are_registered_in_the_order_of_torch(tmp_path):
    pairs = (
        unet_pair(tmp_path / "a", time_cond_proj_dim=8),
        unet_pair(tmp_path / "b", layers_per_block=2),
        text_pair(tmp_path / "c"),
    )
    for theirs, ours in pairs:
        names = [name for name, layer in theirs.named_modules() if isinstance(layer, LAYERS)]
        ends = [name.removeprefix("text_model.") for name in names]
        found = [path for path, layer in walk(ours) if isinstance(layer, ADAPTABLE)]
        assert [path.removeprefix("text_model.") for path in found] == ends


# What stands in front of names, in files of adapters and of weights.

PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "unet.",
    "base_model.model.",
    "unet.base_model.model.",
    "module._orig_mod.unet.base_model.model.",
    "model.module.unet.",
    "base_model.model.unet._orig_mod.",
    "diffusion_model.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(tmp_path, prefix):
    theirs, ours = unet_pair(tmp_path / "unet")
    inputs = Inputs(theirs)
    before = copy.deepcopy(theirs.state_dict())
    attention = found_by_trainers(theirs, ["Attention"], LAYERS)
    tensors = merge(attention)
    pairs = zip(tensors[1::2], tensors[::2], strict=True)
    keys = {}
    for (path, _), (down, up) in zip(attention, pairs, strict=True):
        keys |= {f"{prefix}{path}.lora_A.weight": down, f"{prefix}{path}.lora_B.weight": up}
    save_file(keys, tmp_path / "lora.safetensors")
    assert ours.load_lora_adapter(tmp_path / "lora.safetensors") == len(attention)
    assert relative_error(inputs.ours(ours), inputs.theirs(theirs)) <= 1e-5
    if prefix == "diffusion_model.":
        return
    # The same in front of the weights of a folder, and inside of one of its blocks.
    theirs.load_state_dict(before)
    wrapped = {f"{prefix}{key.replace('mid_block.', 'mid_block._orig_mod.')}": t for key, t in before.items()}
    (weights,) = (tmp_path / "unet").glob("*.safetensors")
    save_file(wrapped, weights)
    again = UNet3DConditionModel.from_pretrained(tmp_path / "unet")
    assert relative_error(inputs.ours(again), inputs.theirs(theirs)) <= 1e-5


def test_two_spellings_of_one_parameter_are_refused(tmp_path):
    theirs, _ = unet_pair(tmp_path / "unet")
    state = theirs.state_dict()
    (weights,) = (tmp_path / "unet").glob("*.safetensors")
    save_file(state | {"module.conv_in.bias": state["conv_in.bias"] + 1}, weights)
    with pytest.raises(CheckpointError, match=r"are both the parameter 'conv_in\.bias'"):
        UNet3DConditionModel.from_pretrained(tmp_path / "unet")


TEXT_SPELLINGS = {
    "diffusers 0.17": lambda p, k: f"text_encoder.{p.replace(f'{k}_proj', f'to_{k}_lora')}.{{}}.weight",
    "kohya": lambda p, k: f"lora_te_{p.replace('.', '_')}.lora_{{}}.weight",
    "kohya of SDXL": lambda p, k: f"lora_te1_{p.replace('.', '_')}.lora_{{}}.weight",
    "lora_linear_layer": lambda p, k: f"text_encoder.{p}.lora_linear_layer.{{}}.weight",
    "PEFT alone": lambda p, k: f"base_model.model.{p}.lora_{{}}.weight",
    "without a prefix": lambda p, k: f"{p}.lora.{{}}.weight",
    "named for the UNet": lambda p, k: f"unet.base_model.model.{p}.lora_{{}}.weight",
}


@pytest.mark.parametrize("bare", [False, True], ids=["text_model", "bare"])
@pytest.mark.parametrize("name", TEXT_SPELLINGS)
def test_text_spellings(tmp_path, name, bare):
    theirs, ours = text_pair(tmp_path / "text")
    layers = [(n, m) for n, m in theirs.named_modules() if "self_attn" in n and isinstance(m, LAYERS)]
    tensors = iter(merge(layers))
    file = {}
    for path, _ in layers:
        path = path.removeprefix("text_model.")
        key = TEXT_SPELLINGS[name](path if bare else f"text_model.{path}", path.split(".")[-1].split("_")[0])
        halves = ("B", "A") if name in ("PEFT alone", "named for the UNet") else ("up", "down")
        for half in halves:
            file[key.format(half)] = next(tensors)
    save_file(file, tmp_path / "text.safetensors")
    assert ours.load_lora_adapter(tmp_path / "text.safetensors") == len(layers)
    assert text_error(ours, theirs) <= 1e-5


def test_changes_in_full(tmp_path):
    """`.diff`, `.diff_b` of ComfyUI and kohya, `.w_norm`, `.b_norm` of LyCORIS are added to parameters."""
    theirs, ours = unet_pair(tmp_path / "unet")
    inputs = Inputs(theirs)
    generator, file = torch.Generator().manual_seed(1), {}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            path, _, kind = name.rpartition(".")
            change = 0.05 * torch.randn(parameter.shape, generator=generator)
            role = {"weight": "diff", "bias": "diff_b"}[kind]
            if "norm" in path:
                role = {"weight": "w_norm", "bias": "b_norm"}[kind]
            file[f"lora_unet_{path.replace('.', '_')}.{role}"] = change
            parameter += change
    save_file(file, tmp_path / "full.safetensors")
    before = inputs.ours(ours)
    ours.load_lora_adapter(tmp_path / "full.safetensors")
    expected = inputs.theirs(theirs)
    assert relative_error(inputs.ours(ours), expected) <= 1e-5
    ours.fuse_lora()
    assert relative_error(inputs.ours(ours), expected) <= 1e-5
    ours.unfuse_lora()
    assert mx.array_equal(inputs.ours(ours, cross_attention_kwargs={"scale": 0}), before)


def test_text_part_of_a_whole_clip(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    part = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vision = dict(part, image_size=8, patch_size=4)
        config = CLIPConfig(text_config=dict(part, vocab_size=64), vision_config=vision, projection_dim=8)
        theirs = CLIPModel(config).eval()
        theirs.save_pretrained(tmp_path)
    ours = CLIPTextModel.from_pretrained(tmp_path)
    assert text_error(ours, theirs.text_model) <= 1e-5


def test_processors_of_diffusers(tmp_path):
    """The forward of a LoRA processor against diffusers' attention with the changes merged, scaled."""
    from mlx_unet3d.layers import attention, attention_adapters

    torch.manual_seed(0)
    theirs = Attention(16, 12, heads=2, dim_head=8, processor=AttnProcessor2_0()).eval()
    ours = attention.Attention(16, 12, heads=2, dim_head=8)
    ours.load_weights([(k, mx.array(v.numpy())) for k, v in theirs.state_dict().items()])
    lora = attention_adapters.LoRAAttnProcessor2_0(16, 12, rank=3, network_alpha=2)
    x, text = torch.randn(2, 9, 16), torch.randn(2, 5, 12)
    with torch.no_grad():
        for name in ("to_q", "to_k", "to_v", "to_out"):
            layer = theirs.to_out[0] if name == "to_out" else getattr(theirs, name)
            up = torch.randn(16, 3)
            lora[f"{name}_lora"].up.weight = mx.array(up.numpy())
            layer.weight += 0.5 * (2 / 3) * up @ torch.tensor(np.array(lora[f"{name}_lora"].down.weight))
        expected = theirs(x, text)
    ours.set_processor(lora)
    made = ours(mx.array(x.numpy()), mx.array(text.numpy()), scale=0.5)
    assert relative_error(made, expected) <= 1e-5
