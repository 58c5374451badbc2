import torch

from dlm_tune.diffusion import NoiseStream, counter_uniform

WORD = 0xFFFFFFFFFFFFFFFF


def reference_uniform(*keys: int) -> float:
    """The same hash in Python's big integers."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
        return z ^ (z >> 31)

    state = 0
    for key in keys:
        state = mix((state + 0x9E3779B97F4A7C15 + mix((key + 0x9E3779B97F4A7C15) & WORD)) & WORD)
    return (state >> 11) * 2.0**-53


def test_equals_big_integer_arithmetic():
    rows, positions = torch.tensor([0, 7, 2**40]), torch.arange(5)
    drawn = counter_uniform(123456789, NoiseStream.MASK, 3, rows[:, None], positions[None])
    for i, row in enumerate(rows.tolist()):
        for j in range(5):
            assert drawn[i, j].item() == reference_uniform(123456789, NoiseStream.MASK, 3, row, j)


def test_negative_and_large_seeds_are_accepted():
    assert counter_uniform(-1, 0).item() == reference_uniform(WORD, 0)
    assert counter_uniform(2**64 - 1, 0).item() == reference_uniform(WORD, 0)


def test_uniform_by_kolmogorov_smirnov():
    drawn = (
        counter_uniform(1, NoiseStream.MASK, torch.arange(2000)[:, None], torch.arange(1000)).flatten().sort().values
    )
    n = len(drawn)
    distance = (drawn - torch.arange(n, dtype=torch.float64) / n).abs().max()
    assert distance * n**0.5 < 1.63, "1 % critical value of the Kolmogorov-Smirnov statistic"


def test_neighbouring_keys_are_independent():
    """Correlation of 1e6 pairs has standard deviation 1e-3; five of them are the limit."""
    base = counter_uniform(5, 2, torch.arange(1000)[:, None], torch.arange(1000))
    others = {
        "seed": counter_uniform(6, 2, torch.arange(1000)[:, None], torch.arange(1000)),
        "stream": counter_uniform(5, 3, torch.arange(1000)[:, None], torch.arange(1000)),
        "row": counter_uniform(5, 2, torch.arange(1, 1001)[:, None], torch.arange(1000)),
        "position": counter_uniform(5, 2, torch.arange(1000)[:, None], torch.arange(1, 1001)),
        "swapped": counter_uniform(5, 2, torch.arange(1000)[None], torch.arange(1000)[:, None]),
    }
    for name, other in others.items():
        pair = torch.stack([base.flatten(), other.flatten()])
        if name == "swapped":
            pair = pair[:, ~torch.eye(1000, dtype=torch.bool).flatten()]
        assert abs(torch.corrcoef(pair)[0, 1]) < 5e-3, name
