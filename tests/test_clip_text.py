"""CLIPTextModel without torch: goldens, causality, dtypes, errors."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.models.clip_text import CLIPTextConfig, CLIPTextModel

GOLDEN = Path(__file__).parent / "goldens" / "clip_text"


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
