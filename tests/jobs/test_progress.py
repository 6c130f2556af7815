import pytest

from jobs import progress


def test_a_log_gets_lines_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 4.0, 20.0, 40.0, 41.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.Progress("cache", 100, "samples") as shown:
        for done in (20, 30, 60, 100, 100):  # a resumed stage begins at 20
            shown.update(done, "loss 1")
    assert capsys.readouterr().err.splitlines() == [
        "cache: 60/100 samples, 2.0/s, 20 s left loss 1",
        "cache: 100/100 samples, 2.0/s, 0 s left loss 1",
    ]
