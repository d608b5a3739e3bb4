"""Adapters that PEFT and diffusers trained and wrote, against those libraries' own outputs, in fp32."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from diffusers.models.attention_processor import CustomDiffusionAttnProcessor  # noqa: E402
from diffusers.utils import convert_state_dict_to_kohya  # noqa: E402
from mlx_unet3d.errors import CheckpointError  # noqa: E402
from reference import Inputs, relative_error, unet_pair  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TARGETS = {
    "attention": r".*\.(to_q|to_k|to_v|to_out\.0)$",
    "all kinds": r".*(to_q|to_out\.0|proj_in|net\.0\.proj|net\.2|resnets\.\d+\.conv[12]|conv_shortcut"
    r"|temp_convs\.\d+\.(conv1\.2|conv[234]\.3)|time_emb_proj|linear_1|conv_in|conv_out|downsamplers\.0\.conv)$",
}


def trained(theirs, inputs, **config):
    """The network with a LoRA after two steps of training towards zero."""
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, **config))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(2):
        loss = model(inputs.sample, inputs.timestep, inputs.text).sample.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def scaled(model, factor):
    """diffusers' way of a `scale`: on every LoRA layer."""
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.set_scale("default", factor)
    return model


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("targets", TARGETS)
def test_peft(tmp_path, targets, rslora):
    theirs, ours = unet_pair(tmp_path / "unet")
    inputs = Inputs(theirs)
    base = inputs.theirs(theirs)
    model = trained(theirs, inputs, target_modules=TARGETS[targets], use_rslora=rslora)
    model.save_pretrained(tmp_path / "lora")
    count = ours.load_lora_adapter(tmp_path / "lora")
    kinds = peft.tuners.tuners_utils.BaseTunerLayer
    assert count == sum(isinstance(m, kinds) for m in model.modules())
    for factor in (0.0, 0.5, 1.0):
        expected = inputs.theirs(scaled(model, factor))
        assert (relative_error(expected, base) > 1e-2) == (factor > 0)
        keywords = {"cross_attention_kwargs": {"scale": factor}}
        assert relative_error(inputs.ours(ours, **keywords), expected) <= 1e-5
        ours.set_adapters("default", factor)
        assert relative_error(inputs.ours(ours), expected) <= 1e-5
        ours.fuse_lora()
        assert relative_error(inputs.ours(ours), expected) <= 1e-5
        ours.unfuse_lora()
        ours.set_adapters("default")


def test_kohya(tmp_path):
    theirs, ours = unet_pair(tmp_path / "unet")
    inputs = Inputs(theirs)
    model = trained(theirs, inputs, target_modules=TARGETS["attention"])
    state = {f"unet.{k.removeprefix('base_model.model.')}": v for k, v in peft_state(model).items()}
    kohya = convert_state_dict_to_kohya(state)
    assert all(key.startswith("lora_unet_") for key in kohya)
    assert any(key.endswith(".alpha") for key in kohya)
    save_file({key: value.contiguous() for key, value in kohya.items()}, tmp_path / "kohya.safetensors")
    ours.load_lora_adapter(tmp_path / "kohya.safetensors")
    # That converter writes the rank as alpha, whatever it was: a factor of 1 instead of 6 / 4.
    assert relative_error(inputs.ours(ours), inputs.theirs(scaled(model, 4 / 6))) <= 1e-5


def test_list_without_names(tmp_path):
    """cloneofsimo's files: an up and a down of every layer, in the order of torch's modules."""
    theirs, ours = unet_pair(tmp_path / "unet")
    inputs = Inputs(theirs)
    generator = torch.Generator().manual_seed(0)
    tensors = []
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)):
                out, *rest = module.weight.shape
                rank = min(4, out, rest[0])
                up = torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator)
                down = torch.randn(rank, *rest, generator=generator) / 50
                tensors += [up, down]
                module.weight += (up.flatten(1) @ down.flatten(1)).view(module.weight.shape)
    torch.save(tensors, tmp_path / "1000_unet.pt")
    base = inputs.ours(ours)
    assert ours.load_lora_adapter(tmp_path / "1000_unet.pt") == len(tensors) // 2
    assert relative_error(inputs.ours(ours), inputs.theirs(theirs)) <= 1e-5
    assert relative_error(base, inputs.theirs(theirs)) > 1e-2
    torch.save(tensors[2:], tmp_path / "less.pt")
    with pytest.raises(CheckpointError, match="must be an up and a down of each layer"):
        ours.load_lora_adapter(tmp_path / "less.pt", "less")


def peft_state(model):
    return peft.get_peft_model_state_dict(model)


def test_diffusers_metadata(tmp_path):
    """The file of diffusers' own `save_lora_adapter`, as its other networks have it."""
    theirs, ours = unet_pair(tmp_path / "unet")
    inputs = Inputs(theirs)
    model = trained(theirs, inputs, target_modules=TARGETS["attention"])
    ours.load_lora_adapter(written_by_diffusers(model, tmp_path))
    assert relative_error(inputs.ours(ours), inputs.theirs(model)) <= 1e-5


def written_by_diffusers(model, folder):
    from diffusers.loaders.lora_base import LoraBaseMixin

    config = {f"unet.{k}": v for k, v in model.peft_config["default"].to_dict().items()}
    config["unet.target_modules"] = []
    config = {k: v for k, v in config.items() if isinstance(v, (int, float, str, bool, dict, list))}
    layers = {f"unet.{k.removeprefix('base_model.model.')}": v for k, v in peft_state(model).items()}
    LoraBaseMixin.write_lora_layers(
        layers, folder, True, "lora.safetensors", None, True, lora_adapter_metadata=config
    )
    return folder / "lora.safetensors"


@pytest.mark.parametrize("train_q_out", [False, True])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_custom_diffusion(tmp_path, train_q_out, safe):
    theirs, ours = unet_pair(tmp_path / "unet")
    inputs = Inputs(theirs)
    torch.manual_seed(0)
    processors = {}
    for name in theirs.attn_processors:
        attn = theirs.get_submodule(name.removesuffix(".processor"))
        crossing = attn.to_k.in_features != attn.to_q.in_features
        processors[name] = CustomDiffusionAttnProcessor(
            train_kv=crossing,
            train_q_out=crossing and train_q_out,
            hidden_size=attn.to_q.in_features,
            cross_attention_dim=attn.to_k.in_features,
        )
    theirs.set_attn_processor(processors)
    base = inputs.ours(ours)
    theirs.save_attn_procs(tmp_path / "custom", safe_serialization=safe)
    ours.load_attn_procs(tmp_path / "custom")
    expected = inputs.theirs(theirs)
    assert relative_error(base, expected) > 1e-2
    assert relative_error(inputs.ours(ours), expected) <= 1e-5
