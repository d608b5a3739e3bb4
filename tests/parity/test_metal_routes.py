"""FLOPs issued against diffusers' own, counted by torch."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
from diffusers.models.attention_processor import AttnProcessor  # noqa: E402
from metal.predict import hoisted, predict  # noqa: E402
from metal.trace import trace  # noqa: E402
from reference import Inputs, to_mlx, unet_pair  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("frames", [1, 3])
def test_flops_are_diffusers_less_what_it_repeats(tmp_path, frames):
    """diffusers projects the text and the time embedding once for each frame."""
    theirs, ours = unet_pair(tmp_path)
    theirs.set_attn_processor(AttnProcessor())  # torch does not count its fused attention
    inputs = Inputs(ours, batch=2, frames=frames)
    with FlopCounterMode(display=False) as counter:
        inputs.theirs(theirs)
    arguments = (to_mlx(inputs.sample), mx.array(float(inputs.timestep)), to_mlx(inputs.text))
    mx.eval(arguments)
    graph = trace(lambda unet, *arrays: unet(*arrays).sample, *arguments, model=ours)
    step, once = map(predict, hoisted(graph, graph.inputs[2]))
    projections = [r.time_emb_proj.weight.size for _, r in ours.named_modules() if "time_emb_proj" in r]
    time_embedding = 2 * 2 * sum(projections)
    repeated = frames * once.flops + (frames - 1) * time_embedding
    assert step.flops == counter.get_total_flops() - repeated
    assert once.flops > 0
