"""What the figures of an evaluation promise."""

from pipeline.evaluation import proportion


def test_interval_holds_its_proportion_also_at_the_ends() -> None:
    for n in range(1, 200):
        for hits in {0, 1, n // 2, n - 1, n}:
            found = proportion(hits, n)
            low, high = found["ci95"]
            assert 0 <= low <= found["value"] <= high <= 1
