"""The arrays of IP-Adapter files for small networks, none of them trivial."""

from video_networks import KINDS, draw

WIDTH = KINDS["motion"].config["cross_attention_dim"]
CHANNELS = 10  # of the image encoder


def plain(randn):
    return {
        "proj.weight": randn(4 * WIDTH, CHANNELS),
        "proj.bias": randn(4 * WIDTH),
        "norm.weight": 1 + 0.1 * randn(WIDTH),
        "norm.bias": randn(WIDTH),
    }


def full(randn):
    return {
        "proj.0.weight": randn(CHANNELS, CHANNELS) / 3,
        "proj.0.bias": randn(CHANNELS),
        "proj.2.weight": randn(WIDTH, CHANNELS),
        "proj.2.bias": randn(WIDTH),
        "proj.3.weight": 1 + 0.1 * randn(WIDTH),
        "proj.3.bias": randn(WIDTH),
    }


def face(randn):
    return {
        "proj.0.weight": randn(2 * CHANNELS, CHANNELS) / 3,
        "proj.0.bias": randn(2 * CHANNELS),
        "proj.2.weight": randn(4 * WIDTH, 2 * CHANNELS) / 4,
        "proj.2.bias": randn(4 * WIDTH),
        "norm.weight": 1 + 0.1 * randn(WIDTH),
        "norm.bias": randn(WIDTH),
    }


def plus(randn, hidden=20, inner=128, queries=3):
    made = {
        "latents": randn(1, queries, hidden),
        "proj_in.weight": randn(hidden, CHANNELS) / 3,
        "proj_in.bias": randn(hidden),
        "proj_out.weight": randn(WIDTH, hidden) / 4,
        "proj_out.bias": randn(WIDTH),
        "norm_out.weight": 1 + 0.1 * randn(WIDTH),
        "norm_out.bias": randn(WIDTH),
    }
    for i in range(4):  # diffusers takes no other number
        for norm in ("0.norm1", "0.norm2", "1.0"):
            made[f"layers.{i}.{norm}.weight"] = 1 + 0.1 * randn(hidden)
            made[f"layers.{i}.{norm}.bias"] = 0.1 * randn(hidden)
        made[f"layers.{i}.0.to_q.weight"] = randn(inner, hidden) / 4
        made[f"layers.{i}.0.to_kv.weight"] = randn(2 * inner, hidden) / 4
        made[f"layers.{i}.0.to_out.weight"] = randn(hidden, inner) / 11
        made[f"layers.{i}.1.1.weight"] = randn(4 * hidden, hidden) / 4
        made[f"layers.{i}.1.3.weight"] = randn(hidden, 4 * hidden) / 9
    return made


PROJECTIONS = {"plain": plain, "full": full, "plus": plus, "face": face}


def adapter(theirs, kind, seed=3):
    """The arrays of an original file, none of them trivial, for the layers of `theirs`."""
    randn = draw(seed)
    layers = [
        theirs.get_submodule(name.removesuffix(".processor"))
        for name in theirs.attn_processors
        if name.endswith("attn2.processor") and "motion_modules" not in name
    ]
    weights = {}
    for i, attn in enumerate(layers):
        for letter in "kv":
            shape = attn.to_k.weight.shape
            weights[f"{2 * i + 1}.to_{letter}_ip.weight"] = randn(*shape) * shape[1] ** -0.5
    return {"image_proj": PROJECTIONS[kind](randn), "ip_adapter": weights}


def flat(state):
    return {f"{part}.{key}": a.contiguous() for part, its in state.items() for key, a in its.items()}
