"""Ours and lmms-eval's figures of MME, POPE, GQA and ScienceQA on the same questions and answers."""

import random
from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks import gqa, mme, pope, scienceqa
from pipeline.benchmarks.task import Item
from tests.pipeline.benchmarks import test_gqa, test_mme, test_pope, test_scienceqa
from tests.pipeline.benchmarks.conftest import Importer
from tests.pipeline.benchmarks.layouts import figures

SEEDS = range(8)
# Their readings differ from the official scripts' where an answer is one letter or has a full stop in its first four
# letters (MME), or is more than the label (POPE); ours are those of the scripts. These are read alike.
MME_SAID = ["Yes", "no", "YES", "Yes, it is.", "No, it is not", "I cannot say", "", "maybe", "Not at all", "know"]
POPE_SAID = ["yes", "no", "Yes", "No"]
SQA_SAID = ["A", "B", "C", "E", "B. because", "A. yes", "", "(B)", "Answer: B", "yes", "B)"]
GQA_SAID = ["yes", "No", "car", "Left.", "two", "the car", "", "right"]


def drawn(items: list[Item], answers: list[str], seed: int) -> dict[str, str]:
    return {item.id: random.Random(f"{seed}:{item.id}").choice(answers) for item in items}


@pytest.mark.parametrize("seed", SEEDS)
def test_mme_scores_agree(theirs: Importer, tmp_path: Path, seed: int) -> None:
    module = theirs("tasks.mme.utils")
    test_mme.write(tmp_path)
    items = mme.TASK.read(tmp_path)
    given = drawn(items, MME_SAID, seed)
    sums: dict[str, list[Any]] = {"mme_perception_score": [], "mme_cognition_score": []}
    for item in items:
        doc = {"question_id": item.id.split("#")[0], "category": item.group, "answer": item.reference.answer}
        for name, value in module.mme_process_results(doc, [given[item.id]]).items():
            sums[name].append(value)
    found = figures(mme.TASK, items, given)
    for name, mine in (("mme_perception_score", "perception"), ("mme_cognition_score", "cognition")):
        assert found[mine] == pytest.approx(module.mme_aggregate_results(sums[name]))


@pytest.mark.parametrize("seed", SEEDS)
def test_pope_scores_agree_but_for_the_yes_ratio(theirs: Importer, tmp_path: Path, seed: int) -> None:
    """Their ratio counts the labels; ours, as POPE's script, the answers."""
    module = theirs("tasks.pope.utils")
    test_pope.write(tmp_path)
    items = pope.TASK.read(tmp_path)
    given = drawn(items, POPE_SAID, seed)
    found = figures(pope.TASK, items, given)
    for split in pope.SPLITS:
        rows = [
            module.pope_process_results(
                {"question_id": item.id, "answer": "yes" if item.reference else "no"}, [given[item.id]]
            )
            for item in items
            if item.group == split
        ]
        for name in ("accuracy", "precision", "recall", "f1"):
            key = "pope_f1_score" if name == "f1" else f"pope_{name}"
            aggregate = getattr(module, key.replace("pope_", "pope_aggregate_"))
            assert found[f"{split}_{name}"] == pytest.approx(aggregate([row[key] for row in rows])), (split, name)


@pytest.mark.parametrize("seed", SEEDS)
def test_scienceqa_scores_agree(theirs: Importer, tmp_path: Path, seed: int) -> None:
    process = theirs("tasks.scienceqa.utils").sqa_process_results
    test_scienceqa.write(tmp_path)
    items = scienceqa.TASK.read(tmp_path)
    given = drawn(items, SQA_SAID, seed)
    hits = [
        process({"choices": list("ABCDE"), "answer": "ABCDE".index(item.reference)}, [given[item.id]])["exact_match"]
        for item in items
    ]
    assert figures(scienceqa.TASK, items, given)["accuracy"] == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("seed", SEEDS)
def test_gqa_scores_agree(theirs: Importer, tmp_path: Path, seed: int) -> None:
    """Their metric drops all punctuation, the official script full stops at the end: no label has any."""
    score = theirs("api.metrics").exact_match_hf_evaluate
    test_gqa.write(tmp_path)
    items = gqa.TASK.read(tmp_path)
    given = drawn(items, GQA_SAID, seed)
    expected = score(
        [given[item.id] for item in items],
        [item.reference for item in items],
        ignore_case=True,
        ignore_punctuation=True,
    )
    assert figures(gqa.TASK, items, given)["accuracy"] == pytest.approx(expected["exact_match"])
