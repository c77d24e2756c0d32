"""Numbers in fewer bits come back as near as the bits allow, and what they lose is not lost for good."""

import pytest
import torch

from pennyweight.distribute.codec import BLOCK, Codec


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize(
    ("kind", "width", "error"), [("fp32", 4, 0.0), ("fp16", 2, 1e-3), ("bf16", 2, 8e-3), ("int8", 68, 8e-3)]
)
def test_numbers_go_and_come(kind: str, width: int, error: float, n: int) -> None:
    codec = Codec(kind)  # type: ignore[arg-type]
    numbers = torch.randn(n, generator=torch.Generator().manual_seed(n))
    packed = codec.pack(numbers)
    assert packed.dtype == torch.uint8 and packed.shape == (codec.size(n), width)
    back = codec.unpack(packed, n)
    assert back.shape == numbers.shape
    assert (back - numbers).abs().max() <= error * numbers.abs().max() if n else True


def test_zeros_and_huge_numbers_survive() -> None:
    for kind in ("fp16", "bf16", "int8"):
        codec = Codec(kind)  # type: ignore[arg-type]
        assert codec.unpack(codec.pack(torch.zeros(70)), 70).eq(0).all()
        assert codec.unpack(codec.pack(torch.tensor([1e30, 0.0])), 2).isfinite().all()


def test_rounding_by_chance_is_right_in_the_mean() -> None:
    codec, generator = Codec("int8"), torch.Generator().manual_seed(0)
    numbers = torch.linspace(-1, 1, BLOCK)
    mean = torch.stack([codec.unpack(codec.pack(numbers, generator), BLOCK) for _ in range(2000)]).mean(0)
    assert (mean - numbers).abs().max() < 4 / 127 / 2000**0.5
    assert (codec.unpack(codec.pack(numbers), BLOCK) - numbers).abs().max() <= 0.51 / 127
