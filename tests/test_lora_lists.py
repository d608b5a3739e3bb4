"""Lists of LoRA without names, at the sizes of ModelScope's networks; nothing is computed."""

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_unet3d import CLIPTextModel, UNet3DConditionModel
from mlx_unet3d.checkpoints.adapters import AdapterFile
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.layers.adapted import layout_of, walk, weight_shape
from mlx_unet3d.models.adapters import networks_of

KERNELS = {"linear": (), "conv2d": (3, 3), "conv3d_temporal": (3, 1, 1)}


@pytest.fixture(scope="module")
def unet():
    return UNet3DConditionModel()


@pytest.fixture(scope="module")
def text():
    """ModelScope's: OpenCLIP's ViT-H without its last layer."""
    return CLIPTextModel(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16
    )


def inside(model, classes, kinds=tuple(KERNELS)):
    """The layers of these kinds inside all modules of some classes, in the order of registration."""
    roots = [path for path, module in walk(model) if type(module).__name__ in classes]
    return {
        path: layer
        for path, layer in model._adaptable().items()
        if torch_kind(path, layer) in kinds and any(path.startswith(f"{root}.") for root in roots)
    }


def torch_kind(path, layer):
    return "conv2d" if path.endswith("conv_shortcut") else layout_of(layer)


def as_list(layers, name=None, rank=4):
    """The file that a trainer writes for these layers."""
    arrays = []
    for path, layer in layers.items():
        out, *_, channels = weight_shape(layer)
        kernel = (1, 1) if path.endswith("conv_shortcut") else KERNELS[layout_of(layer)]
        arrays += [mx.zeros((out, rank, *(1 for _ in kernel))), mx.zeros((rank, channels, *kernel))]
    return AdapterFile(name and Path(name), {str(i): array for i, array in enumerate(arrays)}, {})


LINEAR, PLANE, CONVOLUTIONS = ("linear",), ("linear", "conv2d"), ("conv2d", "conv3d_temporal")
EVERY = tuple(KERNELS)
# All that are there, found by trying all sets of classes of diffusers' network and all kinds of layers.
OF_158 = [
    (("FeedForward", "UpBlock3D"), PLANE),
    (("DownBlock3D", "ResnetBlock2D", "UpBlock3D"), CONVOLUTIONS),
    (("ResnetBlock2D", "UNetMidBlock3DCrossAttn", "UpBlock3D"), CONVOLUTIONS),
    (("DownBlock3D", "TimestepEmbedding", "UNetMidBlock3DCrossAttn", "UpBlock3D"), EVERY),
    (("DownBlock3D", "UNetMidBlock3DCrossAttn", "UpBlock3D", "Upsample2D"), EVERY),
    (("GEGLU", "ResnetBlock2D", "TimestepEmbedding", "UNetMidBlock3DCrossAttn"), LINEAR),
    (("Downsample2D", "GEGLU", "TimestepEmbedding", "UNetMidBlock3DCrossAttn", "UpBlock3D"), PLANE),
    (("Downsample2D", "GEGLU", "UNetMidBlock3DCrossAttn", "UpBlock3D", "Upsample2D"), PLANE),
    (("DownBlock3D", "Downsample2D", "GEGLU", "TimestepEmbedding", "UpBlock3D", "Upsample2D"), EVERY),
]
OF_176 = [
    (("TemporalConvLayer",), EVERY),
    (("DownBlock3D", "ResnetBlock2D"), EVERY),
    (("FeedForward", "ResnetBlock2D"), LINEAR),
    (("FeedForward", "UNetMidBlock3DCrossAttn"), LINEAR),
    (("CrossAttnDownBlock3D", "ResnetBlock2D", "Upsample2D"), CONVOLUTIONS),
    (("DownBlock3D", "Downsample2D", "FeedForward", "UpBlock3D"), PLANE),
    (("Downsample2D", "ResnetBlock2D", "TimestepEmbedding", "Upsample2D"), PLANE),
    (("DownBlock3D", "Downsample2D", "FeedForward", "TimestepEmbedding", "Upsample2D"), EVERY),
    (("DownBlock3D", "Downsample2D", "GEGLU", "TimestepEmbedding", "UNetMidBlock3DCrossAttn"), EVERY),
    (("DownBlock3D", "GEGLU", "TimestepEmbedding", "UNetMidBlock3DCrossAttn", "Upsample2D"), EVERY),
]
OTHERS = [
    (160, ("ResnetBlock2D",), EVERY),
    (408, ("TransformerTemporalModel",), EVERY),
    (384, ("Transformer2DModel",), EVERY),
    (594, ("Attention", "GEGLU"), LINEAR),
    (754, ("ResnetBlock2D", "Attention", "GEGLU"), PLANE),
]


@pytest.mark.parametrize(
    ("count", "classes", "kinds"),
    [*((158, *one) for one in OF_158), *((176, *one) for one in OF_176), *OTHERS],
)
def test_lists_of_the_unet(unet, text, count, classes, kinds):
    """The number and the shapes give one list of layers, whatever the classes are."""
    layers = inside(unet, classes, kinds)
    file = as_list(layers)
    assert len(file.tensors) == count
    (found,) = unet.layers_of_list(file)
    assert found == tuple(layers)
    assert networks_of(file, {"unet": unet, "text_encoder": text}) == ["unet"]


@pytest.mark.parametrize(
    ("count", "classes"), [(276, ("CLIPEncoderLayer",)), (184, ("CLIPAttention",)), (92, ("CLIPMLP",))]
)
def test_lists_of_the_text_encoder(unet, text, count, classes):
    layers = inside(text, classes)
    file = as_list(layers)
    assert len(file.tensors) == count
    (found,) = text.layers_of_list(file)
    assert found == tuple(layers)
    assert networks_of(file, {"unet": unet, "text_encoder": text}) == ["text_encoder"]
    with pytest.raises(CheckpointError, match="of the unet"):
        unet.load_lora_adapter(file)


def test_a_file_is_not_for_the_network_that_its_name_excludes(unet, text):
    layers = inside(unet, ("ResnetBlock2D",))
    with pytest.raises(CheckpointError, match=r"300_text_encoder\.pt is a list of 160 tensors"):
        unet.load_lora_adapter(as_list(layers, "300_text_encoder.pt"))
    assert unet.layers_of_list(as_list(layers, "300_unet.pt"))
    assert not text.layers_of_list(as_list(inside(text, ("CLIPMLP",)), "300_unet.pt"))


def test_lists_that_no_classes_give(unet, text):
    """The residual blocks without their first or last layer: the count of other sets, with other shapes."""
    layers = list(inside(unet, ("ResnetBlock2D",)).items())
    for fewer in (layers[1:], layers[:-1]):
        file = as_list(dict(fewer), "fine_tune.pt")
        assert len(file.tensors) == 158
        with pytest.raises(CheckpointError, match=r"158 tensors without names.* no set of classes"):
            unet.load_lora_adapter(file)
        with pytest.raises(CheckpointError, match="fits the layers of no network of this pipeline"):
            networks_of(file, {"unet": unet, "text_encoder": text})
    assert not unet.list_adapters()
