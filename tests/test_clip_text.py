"""CLIPTextModel and CLIPTextModelWithProjection without torch: goldens, causality, dtypes, errors."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import CLIPTextModelWithProjection
from mlx.utils import tree_flatten
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.models.clip_text import CLIPTextConfig, CLIPTextModel

GOLDEN = Path(__file__).parent / "goldens" / "clip_text"
PROJECTED = GOLDEN.with_name("clip_text_2")


@pytest.fixture
def model():
    return CLIPTextModel.from_pretrained(GOLDEN)


@pytest.fixture
def cases():
    return mx.load(str(GOLDEN / "cases.safetensors"))


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_golden(model, cases, skip):
    """Outputs of transformers, dumped by tests/goldens/make_clip_text.py."""
    np.testing.assert_allclose(model(cases["ids"], clip_skip=skip), cases[f"skip.{skip}"], rtol=0, atol=2e-5)


def test_no_skip_is_zero(model, cases):
    assert mx.array_equal(model(cases["ids"]), model(cases["ids"], clip_skip=0))


def test_a_token_does_not_see_later_ones(model, cases):
    ids = np.array(cases["ids"])
    changed = ids.copy()
    changed[:, 6] = (changed[:, 6] + 1) % 40
    a, b = np.array(model(ids)), np.array(model(changed))
    np.testing.assert_allclose(a[:, :6], b[:, :6], atol=1e-6)
    assert (np.abs(a[:, 6:] - b[:, 6:]).max(axis=(0, 2)) > 1e-3).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_dtype_is_kept(dtype, cases):
    model = CLIPTextModel.from_pretrained(GOLDEN, dtype=dtype)
    assert model(cases["ids"]).dtype == dtype


def test_activations_differ():
    outputs = []
    for act in ("gelu", "quick_gelu"):
        mx.random.seed(0)
        model = CLIPTextModel(
            vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, hidden_act=act,
        )  # fmt: skip
        outputs.append(model(np.arange(8)[None]))
    assert 1e-5 < mx.abs(outputs[0] - outputs[1]).max().item() < 0.1


def test_parameter_names_of_the_hub(model):
    names = [name for name, _ in tree_flatten(model.parameters())]
    assert all(name.startswith("text_model.") for name in names)
    assert "text_model.encoder.layers.2.self_attn.out_proj.bias" in names
    assert len(names) == 2 + 3 * 16 + 2


def test_both_spellings_of_keys_load(tmp_path, model, cases):
    weights = mx.load(str(GOLDEN / "model.safetensors"))
    assert not any(key.startswith("text_model.") for key in weights)
    prefixed = {f"text_model.{key}": value for key, value in weights.items()}
    prefixed["text_model.embeddings.position_ids"] = mx.arange(12)[None]
    mx.save_safetensors(str(tmp_path / "model.safetensors"), prefixed, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    other = CLIPTextModel.from_pretrained(tmp_path)
    assert mx.array_equal(other(cases["ids"]), model(cases["ids"]))


def test_rename_key_is_idempotent():
    for key in ("embeddings.token_embedding.weight", "text_model.final_layer_norm.bias"):
        once = CLIPTextModel.rename_key(key, ())
        assert once.startswith("text_model.")
        assert CLIPTextModel.rename_key(once, ()) == once


@pytest.mark.parametrize("layout", ["mlx", "diffusers"])
def test_save_and_load(tmp_path, model, cases, layout):
    model.save_pretrained(tmp_path, layout=layout)
    assert (tmp_path / "model.safetensors").is_file()
    again = CLIPTextModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert mx.array_equal(again(cases["ids"]), model(cases["ids"]))


def test_a_missing_weight_is_named(tmp_path):
    weights = mx.load(str(GOLDEN / "model.safetensors"))
    del weights["encoder.layers.1.mlp.fc1.bias"]
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"text_model\.encoder\.layers\.1\.mlp\.fc1\.bias"):
        CLIPTextModel.from_pretrained(tmp_path)


def test_parameters_of_vit_h():
    """The text encoder of ModelScope; the arrays are never computed."""
    model = CLIPTextModel(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
        hidden_act="gelu",
    )  # fmt: skip
    assert model.num_parameters() == 340_387_840
    assert len(tree_flatten(model.parameters())) == 372


@pytest.mark.parametrize("clip_skip", [-1, 3, 100])
def test_clip_skip_out_of_range(model, cases, clip_skip):
    with pytest.raises(ValueError, match=rf"clip_skip={clip_skip} must be 0 to 2"):
        model(cases["ids"], clip_skip=clip_skip)


@pytest.mark.parametrize("clip_skip", [True, 1.0, "1"])
def test_clip_skip_of_another_type(model, cases, clip_skip):
    with pytest.raises(TypeError, match="clip_skip"):
        model(cases["ids"], clip_skip=clip_skip)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (np.zeros((1, 13), int), ValueError, r"13 tokens .* 12 positions; truncate to max_length=12"),
        (np.array([[1, 40]]), ValueError, r"input_ids holds 40, .*vocab_size=40"),
        (np.array([[-1, 3]]), ValueError, r"input_ids holds -1"),
        (np.zeros((1, 3)), TypeError, "integers"),
        (np.zeros(3, int), ValueError, r"shape \(3,\)"),
        (np.zeros((0, 3), int), ValueError, "empty"),
    ],
)
def test_wrong_ids(model, ids, error, message):
    with pytest.raises(error, match=message):
        model(ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, r"hidden_act='relu' is not known; use one of"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 does not divide hidden_size=512"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"vocab_size": 1.5}, "vocab_size=1.5"),
    ],
)
def test_wrong_configs(change, message):
    with pytest.raises(ValueError, match=message):
        CLIPTextModel(**change)


def test_unknown_config_keys_are_reported():
    with pytest.warns(UserWarning, match="use_attention_mask"):
        CLIPTextConfig.from_dict({"use_attention_mask": True, "projection_dim": 512})


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_hidden_states_beside_the_last(model, cases, clip_skip):
    output = model(cases["ids"], clip_skip=clip_skip, output_hidden_states=True)
    assert output.keys() == ["last_hidden_state", "hidden_states"]
    assert mx.array_equal(output.last_hidden_state, model(cases["ids"], clip_skip=clip_skip))
    assert len(output.hidden_states) == 4
    before = output.hidden_states[-1 - (clip_skip or 0)]
    assert mx.array_equal(output.last_hidden_state, model.text_model.final_layer_norm(before))


@pytest.fixture
def projected():
    return CLIPTextModelWithProjection.from_pretrained(PROJECTED)


@pytest.fixture
def projected_cases():
    return mx.load(str(PROJECTED / "cases.safetensors"))


@pytest.mark.parametrize("eos", [39, 2])
def test_golden_with_projection(projected, projected_cases, eos):
    """Outputs of transformers; 2 is the rule of older configs."""
    projected.config.eos_token_id = eos
    output = projected(projected_cases["ids"], output_hidden_states=True)
    for name, value in [("embeds", output[0]), *((f"states.{i}", s) for i, s in enumerate(output[2]))]:
        expected = projected_cases[f"embeds.{eos}" if name == "embeds" else name]
        np.testing.assert_allclose(value, expected, rtol=0, atol=2e-5)
    assert mx.abs(projected_cases["embeds.39"] - projected_cases["embeds.2"]).max().item() > 0.1


@pytest.mark.parametrize("layout", ["mlx", "diffusers"])
def test_save_and_load_with_projection(tmp_path, projected, projected_cases, layout):
    projected.set_dtype(mx.float16)
    projected.save_pretrained(tmp_path, layout=layout)
    again = CLIPTextModelWithProjection.from_pretrained(tmp_path)
    assert again.config == projected.config
    output = again(projected_cases["ids"], output_hidden_states=True)
    assert {a.dtype for a in (output[0], output[1], *output[2])} == {mx.float16}
    assert mx.array_equal(output.text_embeds, projected(projected_cases["ids"]).text_embeds)


def test_a_file_without_projection_is_refused(tmp_path, model):
    model.save_pretrained(tmp_path, layout="diffusers")
    config = (tmp_path / "config.json").read_text().replace("CLIPTextModel", "CLIPTextModelWithProjection")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"text_projection\.weight"):
        CLIPTextModelWithProjection.from_pretrained(tmp_path)


def test_quantized_with_projection(tmp_path):
    model = CLIPTextModelWithProjection(
        vocab_size=20,
        projection_dim=32,
        eos_token_id=19,
        **tiny.TEXT | {"hidden_size": 32, "intermediate_size": 64},
    )
    tiny.randomize(model)
    ids = np.array([[3, 4, 19, 0]])
    truth = model(ids).text_embeds
    model.quantize(8, group_size=32).save_pretrained(tmp_path)
    again = CLIPTextModelWithProjection.from_pretrained(tmp_path)
    result = again(ids).text_embeds
    assert mx.array_equal(result, model(ids).text_embeds)
    assert 0 < mx.abs(result - truth).max().item() < 0.05 * mx.abs(truth).max().item()


def test_parameters_of_bigg():
    """SDXL's second text encoder; the arrays are never computed."""
    model = CLIPTextModelWithProjection(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
        hidden_act="gelu", projection_dim=1280, eos_token_id=2,
    )  # fmt: skip
    assert model.num_parameters() == 694_659_840
    assert model.lora_component == "text_encoder_2"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"eos_token_id": None}, "eos_token_id=None must be int"), ({"projection_dim": 0}, "projection_dim=0")],
)
def test_wrong_configs_with_projection(change, message):
    with pytest.raises(ValueError, match=message):
        CLIPTextModelWithProjection(**change)
