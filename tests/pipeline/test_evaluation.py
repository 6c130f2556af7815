"""What the figures of an evaluation promise."""

from pipeline.evaluation import proportion
from pipeline.report.charts import exact_match_chart


def test_interval_holds_its_proportion_also_at_the_ends() -> None:
    for n in range(1, 200):
        for hits in {0, 1, n // 2, n - 1, n}:
            found = proportion(hits, n)
            low, high = found["ci95"]
            assert 0 <= low <= found["value"] <= high <= 1


def test_perfect_scores_of_any_count_can_be_drawn() -> None:
    scores = {f"{n} questions": proportion(n, n) for n in range(1, 40)}
    assert exact_match_chart({"teacher": scores}).startswith("<svg")
