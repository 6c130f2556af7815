"""Trains the demo teacher from scratch: ``python -m jobs.demo.train_teacher --out FOLDER --minutes 8`` on one GPU.

Owns the teacher's training data stream, its optimisation and its exact match per family. Writes a transformers folder
(bf16 safetensors, configuration, processor) and ``training.json`` with what was measured.
"""

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from jobs.demo import scenes, teacher_model

# Longest question plus longest reading plus the image; measured on 100,000 samples: 90.
LENGTH = 92
# Drawn more often where a first trial was weakest.
FAMILY_WEIGHTS = {"reading": 2.0, "counting": 1.0, "colour": 1.5, "neighbour": 2.0, "largest": 1.0, "sum": 2.5}


class SampleStream(IterableDataset[dict[str, torch.Tensor]]):
    """Endless batches of freshly drawn training samples: images [B, 64, 64, 3] uint8, ids [B, LENGTH], labels."""

    def __init__(self, batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        torch.set_num_threads(1)
        info = torch.utils.data.get_worker_info()
        rng = random.Random(f"train/{self.seed}/{info.id if info else 0}")
        strokes, tokenizer = scenes.Strokes("train"), teacher_model.build_tokenizer()
        names, weights = list(FAMILY_WEIGHTS), list(FAMILY_WEIGHTS.values())
        while True:
            drawn = [
                scenes.draw_sample(strokes, rng, family, augment=True)
                for family in rng.choices(names, weights, k=self.batch)
            ]
            yield encode(tokenizer, drawn)


def encode(
    tokenizer: PreTrainedTokenizerFast, drawn: list[tuple[scenes.Scene, scenes.Question]]
) -> dict[str, torch.Tensor]:
    """Right-padded ids with the image token repeated per patch, and labels that are -100 outside the answer."""
    image_id = teacher_model.SPECIAL.index(teacher_model.IMAGE)
    ids = np.zeros((len(drawn), LENGTH), np.int64)
    labels = np.full((len(drawn), LENGTH), -100, np.int64)
    for row, (_, question) in enumerate(drawn):
        prompt = tokenizer.encode(f"USER: <image>\n{question.text} ASSISTANT:")
        answer = [*tokenizer.encode(question.answer), tokenizer.eos_token_id]
        at = prompt.index(image_id)
        prompt = prompt[:at] + [image_id] * teacher_model.IMAGE_TOKENS + prompt[at + 1 :]
        ids[row, : len(prompt) + len(answer)] = prompt + answer
        labels[row, len(prompt) : len(prompt) + len(answer)] = answer
    images = np.stack([np.asarray(scene.image) for scene, _ in drawn])
    return {"images": torch.from_numpy(images), "ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def pixels(images: torch.Tensor) -> torch.Tensor:
    """[B, 64, 64, 3] uint8 to the processor's [B, 3, 64, 64] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


@torch.no_grad()
def exact_match(
    model: LlavaForConditionalGeneration, split: scenes.Split, per_family: int, seed: int = 0
) -> dict[str, float]:
    """Greedy exact match per family on unbent strokes of the split."""
    device = next(model.parameters()).device
    strokes, tokenizer = scenes.Strokes(split), teacher_model.build_tokenizer()
    image_id = teacher_model.SPECIAL.index(teacher_model.IMAGE)
    model.eval()
    result = {}
    for family in scenes.FAMILIES:
        drawn = [
            scenes.draw_sample(strokes, scenes.sample_rng(split, seed, i), family, augment=False)
            for i in range(per_family)
        ]
        prompts = [f"USER: {'<image>' * teacher_model.IMAGE_TOKENS}\n{q.text} ASSISTANT:" for _, q in drawn]
        batch = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
        assert int((batch["input_ids"] == image_id).sum()) == per_family * teacher_model.IMAGE_TOKENS
        images = torch.from_numpy(np.stack([np.asarray(s.image) for s, _ in drawn])).to(device)
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=pixels(images).to(model.dtype),
            max_new_tokens=8,
            do_sample=False,
        )
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        result[family] = sum(t.strip() == q.answer for t, (_, q) in zip(texts, drawn, strict=True)) / per_family
    result["overall"] = sum(result.values()) / len(result)
    return result


def train(args: argparse.Namespace) -> None:
    """The whole training; the schedule follows whichever of steps and minutes runs out first."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = len(teacher_model.build_tokenizer())
    model = teacher_model.build_model(vocabulary)
    if args.start:
        model = LlavaForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
    model.to(device).train()
    if device.type == "cuda":
        for layer in [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    stream = SampleStream(args.batch, args.seed)
    loader = DataLoader(stream, batch_size=None, num_workers=args.workers, pin_memory=device.type == "cuda")
    start, step, log = time.monotonic(), 0, []
    for batch in loader:
        elapsed = time.monotonic() - start
        done = max(step / args.steps, elapsed / (60 * args.minutes))
        if done >= 1:
            break
        lr = args.lr * min(1.0, (step + 1) / 400) * (0.5 + 0.5 * math.cos(math.pi * done) + 0.005)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = step_loss(model, {k: v.to(device, non_blocking=True) for k, v in batch.items()})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % args.every == 0:
            value = float(loss)
            scores = exact_match(model, "val", 64)
            model.train()
            log.append({"step": step, "seconds": round(time.monotonic() - start), "loss": value, "val": scores})
            rounded = {k: round(v, 3) for k, v in scores.items()}
            print(
                f"step {step} {step * args.batch / (time.monotonic() - start):.0f}/s loss {value:.4f} {rounded}",
                flush=True,
            )
    finish(model, args, {"steps": step, "seconds": round(time.monotonic() - start), "log": log})


def step_loss(model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens."""
    with torch.autocast(batch["ids"].device.type, torch.bfloat16):
        hidden = model.model(input_ids=batch["ids"], pixel_values=pixels(batch["images"])).last_hidden_state
        keep = batch["labels"][:, 1:] != -100
        logits = model.lm_head(hidden[:, :-1][keep])
    return torch.nn.functional.cross_entropy(logits.float(), batch["labels"][:, 1:][keep])


def finish(model: LlavaForConditionalGeneration, args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Rounds to bf16, measures what is shipped (in float32 arithmetic on the rounded weights) and saves."""
    out = Path(args.out)
    model.to(torch.bfloat16).save_pretrained(out)
    teacher_model.build_processor().save_pretrained(out)
    shipped = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).to(model.device)
    record["test"] = exact_match(shipped, "test", 400)
    record["hardware"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    record["arguments"] = {k: v for k, v in vars(args).items() if k not in ("out", "start")}
    (out / "training.json").write_text(json.dumps(record, indent=1))
    print("test", record["test"], "steps", record["steps"])


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--start", help="folder of a teacher to go on from")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
