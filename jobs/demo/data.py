"""Writes the demo's data set in the LLaVA conversation format: one JSON list a split, images as PNG."""

import json
from pathlib import Path

from jobs.demo.scenes import FAMILIES, Split, Strokes, draw_sample, sample_rng


def write_split(path: Path, split: Split, count: int, seed: int) -> None:
    """Writes ``count`` records to the JSON file ``path``, families in turn, images beside it.

    A file that holds so many records already is kept.

    Training strokes are bent at random, as in the teacher's training; validation and test strokes stay as written.
    """
    if path.exists() and len(json.loads(path.read_text())) == count:
        return
    folder = path.parent
    images = folder / "images" / split
    images.mkdir(parents=True, exist_ok=True)
    strokes, families, records = Strokes(split), list(FAMILIES), []
    for index in range(count):
        family = families[index % len(families)]
        rng = sample_rng(split, seed, index)
        scene, question = draw_sample(strokes, rng, family, augment=split == "train")
        name = f"images/{split}/{index:06d}.png"
        scene.image.save(folder / name)
        turns = [
            {"from": "human", "value": f"<image>\n{question.text}"},
            {"from": "gpt", "value": question.answer},
        ]
        records.append({"id": f"{split}-{index:06d}", "image": name, "family": family, "conversations": turns})
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(records, indent=0))
    temporary.replace(path)
