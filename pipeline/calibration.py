"""Calibration: whether a model is right as often as it is confident (Guo et al. 2017, arXiv 1706.04599).

Tokens are counted by bins of equal width; bin m of M holds the confidences in ((m − 1) / M, m / M]. Counts of several
parts add up, so that no token has to be kept.
"""

import numpy as np


def bin_sums(confidence_P: np.ndarray, right_P: np.ndarray, bins: int) -> np.ndarray:
    """float64[bins, 3]: each bin's number of tokens, sum of their confidences in [0, 1], and how many are right."""
    bin_P = np.clip(np.ceil(confidence_P * bins).astype(np.int64) - 1, 0, bins - 1)
    columns = (np.ones(len(bin_P)), confidence_P, right_P)
    return np.stack([np.bincount(bin_P, column, bins) for column in columns], 1)


def calibration_error(sums_M3: np.ndarray) -> float:
    """The expected calibration error: |accuracy − mean confidence|, averaged over the tokens' bins; in [0, 1]."""
    tokens, confidence, right = sums_M3.T
    return float(np.abs(right - confidence).sum() / tokens.sum())


def reliability(sums_M3: np.ndarray) -> list[dict[str, float]]:
    """The points of a reliability diagram, by rising confidence: mean ``confidence``, ``accuracy``, tokens' ``share``.

    Bins without tokens are left out: they have neither confidence nor accuracy.
    """
    total = sums_M3[:, 0].sum()
    return [
        {"confidence": float(confidence / tokens), "accuracy": float(right / tokens), "share": float(tokens / total)}
        for tokens, confidence, right in sums_M3
        if tokens
    ]
