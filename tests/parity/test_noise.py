"""noise_source(seed) against torch.randn with a CPU generator, live."""

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from mlx_unet3d.noise import noise_source  # noqa: E402

pytestmark = pytest.mark.parity

SEEDS = [0, 1, 7, 42, 1234, 2**31, 2**32 - 1, 2**32 + 5, 2**63, 2**64 - 1, -1, -2, -(2**63)]
SHAPES = [
    (1,),
    (15,),
    (16,),
    (),
    (2,),
    (17,),
    (0, 3),
    (5,),
    (1000,),
    (1, 4, 16, 32, 32),
    (4,),
    (2, 4, 3, 5, 7),
    (7,),
    (31,),
    (65_536 + 9,),
    (1,),
]
EXACT = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def compare(drawn: mx.array, expected: torch.Tensor) -> None:
    drawn, expected = np.array(drawn), expected.numpy()
    assert drawn.shape == expected.shape
    if EXACT:
        assert drawn.tobytes() == expected.tobytes()
    else:  # torch takes the platform's log, sine and cosine there
        np.testing.assert_allclose(drawn, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_stream_of_mixed_draws(seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    source = noise_source(seed)
    for shape in SHAPES:
        compare(source(shape), torch.randn(shape, generator=generator))


def test_a_million_numbers():
    compare(noise_source(9)((1 << 20,)), torch.randn(1 << 20, generator=torch.manual_seed(9)))


def test_half_precision_draws_are_cast_ones_in_multiples_of_16():
    for theirs, ours in ((torch.float16, mx.float16), (torch.bfloat16, mx.bfloat16)):
        expected = torch.randn(96, generator=torch.Generator().manual_seed(4), dtype=theirs)
        drawn = noise_source(4)((96,)).astype(ours)
        np.testing.assert_allclose(
            np.array(drawn.astype(mx.float32)),
            expected.float().numpy(),
            rtol=0 if EXACT else 1e-2,
        )


def test_latents_of_diffusers():
    from diffusers.utils.torch_utils import randn_tensor

    shape = (1, 4, 6, 8, 8)
    generator = torch.Generator().manual_seed(21)
    compare(noise_source(21)(shape), randn_tensor(shape, generator, torch.device("cpu")))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_torch_refuses_what_we_refuse(seed):
    with pytest.raises((ValueError, RuntimeError)):
        torch.Generator().manual_seed(seed)
    with pytest.raises(ValueError, match="64 bits"):
        noise_source(seed)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_permutations_between_draws(seed):
    source, generator = noise_source(seed), torch.Generator().manual_seed(seed)
    for length in (4, 0, 1, 2, 16, 5, 1000, 3):
        assert source.permutation(length).tolist() == torch.randperm(length, generator=generator).tolist()
        compare(source((5,)), torch.randn(5, generator=generator))
        compare(source((40,)), torch.randn(40, generator=generator))
