import torch

from detune.attacks.matching import match_heads, match_neurons
from tests.cases import normal, seeded

HIDDEN, WIDTH = 48, 6


def near(generator, matrix, size=0.3):
    """A matrix with a LoRA's change."""
    change = normal(generator, matrix.shape[0], 4) @ normal(generator, 4, matrix.shape[1])
    return matrix + size * matrix.std() * change / change.std()


class TestNeurons:
    def test_every_one_is_found(self):
        generator = seeded(0)
        order = torch.randperm(100, generator=generator)
        rows, columns = normal(generator, 100, HIDDEN), normal(generator, 100, HIDDEN)
        sources = [near(generator, matrix)[order] for matrix in (rows, columns)]
        found = match_neurons([near(generator, rows), near(generator, columns)], sources, [False, False])
        assert torch.equal(order[found], torch.arange(100))

    def test_scaled_ones_by_any_sign(self):
        generator = seeded(1)
        order = torch.randperm(100, generator=generator)
        gate, up, down = (normal(generator, 100, HIDDEN) for _ in range(3))
        scale = normal(generator, 100, 1)
        sources = [matrix[order] for matrix in (up * scale, gate, down / scale)]
        found = match_neurons([up, gate, down], sources, [True, False, True])
        assert torch.equal(order[found], torch.arange(100))

    def test_where_two_want_the_same_the_whole_decides(self):
        """Row by row both places would take the first; the sum is larger the other way round."""
        target = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
        source = torch.tensor([[1.0, 0.05], [0.0, 1.0]])
        assert match_neurons([target], [source], [False]).tolist() == [0, 1]


class TestHeads:
    def test_turned_and_grouped(self):
        generator = seeded(2)
        heads, groups = 8, 4
        parts = [normal(generator, count, WIDTH, HIDDEN) for count in (heads, groups, groups, heads)]
        order = torch.tensor([5, 4, 0, 1, 7, 6, 2, 3])
        turns = [torch.linalg.qr(normal(generator, groups, WIDTH, WIDTH))[0] for _ in range(2)]
        keys, values = turns
        wide = [turn.repeat_interleave(2, dim=0) for turn in turns]
        turned = [wide[0] @ parts[0], keys @ parts[1], values @ parts[2], wide[1] @ parts[3]]
        sources = [
            (part[order] if len(part) == heads else part[order[::2] // 2]) + 0.1 * normal(generator, *part.shape)
            for part in turned
        ]
        found = match_heads(parts, sources)
        assert torch.equal(order[found], torch.arange(heads))
