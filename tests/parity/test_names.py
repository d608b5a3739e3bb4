"""Public names of diffusers' pipelines: each is here, or says what to write."""

import inspect

import pytest

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import mlx_unet3d  # noqa: E402
from mlx_unet3d.diffusers_names import ADVICE, RENAMED, USELESS  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

PIPELINES = (
    "TextToVideoSDPipeline",
    "VideoToVideoSDPipeline",
    "AnimateDiffPipeline",
    "AnimateDiffSDXLPipeline",
    "AnimateDiffVideoToVideoPipeline",
    "StableVideoDiffusionPipeline",
    "I2VGenXLPipeline",
)


def named(function) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind != p.VAR_KEYWORD and p.name != "self"]


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines(name):
    theirs, ours = getattr(diffusers, name), getattr(mlx_unet3d, name)
    methods = [attribute for attribute in dir(theirs) if not attribute.startswith("_")]
    assert len(methods) > 40
    silent = []
    for method in (*methods, "__init__", "__call__"):
        if not hasattr(ours, method):
            with pytest.raises(AttributeError) as caught:
                getattr(ours, method)
            if f"has no {method}: " not in str(caught.value):
                silent.append(method)
            continue
        if not callable(getattr(theirs, method)):
            continue
        takes = inspect.signature(ours if method == "__init__" else getattr(ours, method)).parameters
        if any(p.kind == p.VAR_KEYWORD for p in takes.values()):
            assert method != "__call__"  # whose signature lists its options
            takes = {*takes, *named(getattr(theirs, method))}
        known = {*takes, *(key for table in (RENAMED, USELESS, ADVICE) for key in table.get(method, {}))}
        silent += [f"{method}({key})" for key in named(getattr(theirs, method)) if key not in known]
    assert not silent


def test_the_exports_take_the_same_arguments():
    for name in ("export_to_video", "export_to_gif"):
        ours, theirs = (getattr(module, name) for module in (mlx_unet3d, diffusers.utils))
        takes = inspect.signature(ours).parameters
        for parameter in inspect.signature(theirs).parameters.values():
            if parameter.name in ADVICE.get(name, {}):
                continue
            assert takes[parameter.name].default == parameter.default
