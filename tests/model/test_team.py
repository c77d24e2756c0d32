"""What a worker computes of a batch is its rows of what one process computes; the randomness is the whole batch's."""

import pytest
import torch
from torch import Tensor, nn

from pennyweight.distribute.split import Drawn
from pennyweight.model import layers, losses, team
from pennyweight.model.placement import span
from pennyweight.model.team import Part


class Fixed:
    """One of some workers, with nobody to talk to."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def share(self, n: int) -> tuple[int, int]:
        return span(n, self.size, self.rank)

    def counted(self, n: int) -> Part:
        return Part(((10 * self.rank, 10 * self.rank + n),), 40)

    def gathered(self, rows: Tensor) -> Tensor:
        return rows


def parts(n: int, size: int) -> list[Part]:
    return [Part((span(n, size, k),), n) for k in range(size)]


@pytest.mark.parametrize("module", [layers.Dropout(0.3), nn.Dropout(0.3)], ids=["ours", "PyTorch's"])
@pytest.mark.parametrize("shape", [(13, 7), (12, 3, 5)])
def test_dropout_of_parts_is_that_of_the_whole(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.manual_seed(4)
    whole, after = module(x), torch.rand(1)
    found = []
    for part in parts(shape[0], 4):
        torch.manual_seed(4)
        with team.working(Fixed(0, 4)), team.computing(part), Drawn():
            found.append(module(part.of(x)))
        assert torch.equal(torch.rand(1), after)
    assert torch.equal(torch.cat(found), whole)


def test_dropout_inside_pytorchs_attention_too() -> None:
    query, keys, values = (torch.randn(6, 2, 5, 4) for _ in range(3))

    def attend(rows: slice) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query[rows], keys[rows], values[rows], dropout_p=0.5)

    torch.manual_seed(1)
    whole = attend(slice(0, 6))
    for part in parts(6, 3):
        torch.manual_seed(1)
        with team.working(Fixed(0, 3)), team.computing(part), Drawn():
            assert torch.allclose(attend(slice(*part.spans[0])), part.of(whole), atol=1e-6)


def test_shares_of_a_mean_add_up_also_where_one_has_no_rows() -> None:
    output, label = torch.randn(5), torch.ones(5)
    loss = losses.ROWS["bce"]
    with team.working(Fixed(0, 3)):
        shares = []
        for part in (Part(((0, 2),), 5), Part(((2, 2),), 5), Part(((2, 5),), 5)):
            with team.computing(part):
                shares.append(team.mean(loss(part.of(output), part.of(label)), part.rows))
    assert sum(shares).item() == pytest.approx(loss(output, label).item(), rel=1e-6)  # type: ignore[union-attr]


def test_what_is_drawn_for_all_is_drawn_once_and_parted() -> None:
    asked = []

    def draw(n: int) -> Tensor:
        asked.append(n)
        return torch.arange(n)

    assert team.drawn(3, draw).tolist() == [0, 1, 2]
    with team.working(Fixed(2, 4)):
        assert team.drawn(3, draw).tolist() == [0, 1, 2]  # the same on all, where nothing is parted
        with team.computing(Part(((0, 3),), 40)):
            assert team.drawn(3, draw).tolist() == [20, 21, 22]
    assert asked == [3, 3, 40]
    assert Part(((4, 6),), 10).twice().of(torch.arange(20)).tolist() == [4, 5, 14, 15]


def test_outside_a_team_nothing_is_parted() -> None:
    with team.computing(Part(((0, 1),), 9)):
        assert team.part() is None and team.share(7) == (0, 7) and team.counted(3) == Part(((0, 3),), 3)
