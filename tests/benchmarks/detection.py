"""Mean average precision of detectors, from float to int8 on ONNX Runtime, and on the way to a TI device.

    python -m tests.benchmarks.detection --directory out

RT-DETR on a ResNet, and YOLOS, are trained in float, from scratch, on shapes on clutter; then `QATTrainer` calibrates
and trains each for each target with the class's own loss. What is measured is written to `results.json`, and printed
as a table. `boxes.png` has detections of the files as ONNX Runtime gives them, `AM68A/bundle` is what TI's compiler
takes, and `AM68A/tidl.txt` what it should make of it. What the directory has already is not done again.

Fails where a trained int8 net is, on ONNX Runtime, more than half a point worse than the float one, or not better than
after calibration alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import Trainer

from hf_qat import QATConfig, QATTrainer, check_tidl, export_onnx, export_tidl
from hf_qat.cli.demo.run import quiet
from hf_qat.cli.demo.shapes import IMAGE_SIZE, KINDS, shapes_dataset
from tests.detectors import DETECTORS, Detector, arguments, encoded, on_runtime, runtime, trainer_arguments


#: Points of mAP, of 100, that a trained int8 net may lose on ONNX Runtime.
ALLOWED_LOSS = 0.5

TARGETS = ("int8", "AM68A")

#: Of the images.
TRAIN_SEED, TEST_SEED = 0, 1

#: Boxes with a lower score are not drawn.
DRAWN_SCORE = 0.5

#: So many images are drawn, twice as large.
DRAWN, SCALE = 8, 2

#: So many images go into a bundle, to calibrate by.
FRAMES = 8


@dataclass(frozen=True)
class Row:
    """Points of mAP, of 100: in torch, and on ONNX Runtime with its optimizations off and on."""

    model: str
    target: str
    stage: str
    torch: float
    plain: float
    optimized: float
    torch_50: float
    optimized_50: float


class Boxes(nn.Module):
    """Of a detector's outputs, the two that are detections."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and boxes."""
        outputs = self.model(pixel_values=pixel_values)
        return outputs.logits, outputs.pred_boxes


@dataclass(frozen=True)
class Case:
    """A detector with its data, and where what comes of it lies.

    Attributes:
        name, detector: which.
        train, test: rows as it takes them.
        directory: of this detector.
        qat_steps: of each training after the float one.
    """

    name: str
    detector: Detector
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    directory: Path
    qat_steps: int

    def trainer_arguments(self) -> dict[str, Any]:
        """What Trainer and QATTrainer take alike."""
        return trainer_arguments(self.detector.processor, self.train, self.test)

    def float_model(self, steps: int) -> nn.Module:
        """Trained, or read where an earlier run has left it."""
        torch.manual_seed(0)
        model, made = self.detector.make(), self.directory / "float"
        if (made / "config.json").is_file():
            return type(model).from_pretrained(made).eval()
        if self.detector.begin is not None:
            self.detector.begin(model, self.train, steps)
        args = arguments(made, max_steps=steps, warmup_steps=min(100, steps // 10), **self.detector.options)
        Trainer(model, args, **self.trainer_arguments()).train()
        model.save_pretrained(made)
        return model.eval()

    def row(self, target: str, stage: str, in_torch: Mapping[str, float], file: Path) -> Row:
        """A row of the table, with what ONNX Runtime gives."""
        plain, optimized = (on_runtime(file, self.detector.processor, self.test, on) for on in (False, True))
        figures = (in_torch["eval_map"], plain["map"], optimized["map"], in_torch["eval_map_50"], optimized["map_50"])
        return Row(self.name, target, stage, *(round(100 * figure, 2) for figure in figures))


def in_float(case: Case, steps: int) -> Row:
    """The float model, in torch and as torch exports it."""
    model = case.float_model(steps)
    measured = Trainer(model, arguments(case.directory), **case.trainer_arguments()).evaluate()
    file = case.directory / "float.onnx"
    pixels, names = case.test[0]["pixel_values"][None], ["logits", "pred_boxes"]
    torch.onnx.export(Boxes(model), (pixels,), file, input_names=["pixel_values"], output_names=names, verbose=False)
    return case.row("float", "float", measured, file)


def quantized(case: Case, target: str) -> Iterator[Row]:
    """After calibration, and after training."""
    detector = case.detector
    options = {**detector.options, "learning_rate": detector.options["learning_rate"] * detector.qat_share}
    directory = case.directory / target
    args = arguments(directory, max_steps=case.qat_steps, **options)
    trainer = QATTrainer(case.float_model(0), args, qat_config=QATConfig(target), **case.trainer_arguments())
    example = {"pixel_values": case.test[0]["pixel_values"][None]}
    trainer.calibrate()
    for stage in ("calibrated", "QAT"):
        if stage == "QAT":
            trainer.train()
        file = directory / f"{stage}.onnx"
        converted = trainer.convert()
        export_onnx(converted, file, example)
        if stage == "QAT" and target != "int8":
            frames = [{"pixel_values": row["pixel_values"][None]} for row in case.train[:FRAMES]]
            export_tidl(converted, directory / "bundle", target, frames, case.detector.processor)
            (directory / "tidl.txt").write_text(str(check_tidl(file, target)), encoding="utf-8")
        yield case.row(target, stage, trainer.evaluate(), file)


def run(cases: Sequence[Case], steps: int | None, results: Path) -> list[Row]:
    """All rows, those of an earlier run included."""
    rows = [Row(**one) for one in json.loads(results.read_text())] if results.is_file() else []

    def add(new: Row) -> None:
        rows[:] = [row for row in rows if _name(row) != _name(new)] + [new]
        results.write_text(json.dumps([asdict(row) for row in rows], indent=1))
        print(table([new]).splitlines()[-1], flush=True)

    for case in cases:
        done = {_name(row) for row in rows}
        if (case.name, "float", "float") not in done:
            add(in_float(case, steps or case.detector.steps))
        for target in TARGETS:
            if (case.name, target, "QAT") not in done:
                for new in quantized(case, target):
                    add(new)
        draw(case, [case.directory / target / "QAT.onnx" for target in TARGETS])
    return rows


def _name(row: Row) -> tuple[str, str, str]:
    return row.model, row.target, row.stage


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [f"{'mAP':<30}{'torch':>8}{'plain':>8}{'optimized':>11}{'mAP@50: torch':>17}{'optimized':>11}"]
    for row in rows:
        name = f"{row.model:<9}{row.target:<9}{'' if row.target == 'float' else row.stage:<12}"
        figures = f"{row.torch:>8.2f}{row.plain:>8.2f}{row.optimized:>11.2f}{row.torch_50:>17.2f}"
        lines.append(f"{name}{figures}{row.optimized_50:>11.2f}")
    return "\n".join(lines)


def failures(rows: Sequence[Row]) -> list[str]:
    """What int8 should have reached on ONNX Runtime, and has not."""
    by_name = {_name(row): row for row in rows}
    failed = []
    for model in dict.fromkeys(row.model for row in rows):
        stages = [by_name[(model, *stage)] for stage in (("float", "float"), ("int8", "calibrated"), ("int8", "QAT"))]
        for setting in ("plain", "optimized"):
            wanted, before, after = (getattr(row, setting) for row in stages)
            if after < wanted - ALLOWED_LOSS or after <= before:
                failed.append(f"{model}, {setting}: float {wanted}, calibrated {before}, trained {after}")
    return failed


def draw(case: Case, files: Sequence[Path]) -> None:
    """`boxes.png`: images with the truth, and below them a row for each file with what ONNX Runtime finds."""
    images = shapes_dataset(DRAWN, TEST_SEED)["image"]
    side = SCALE * IMAGE_SIZE
    sheet = Image.new("RGB", (side * len(images), side * (1 + len(files))))
    rows = [[_truth(row["labels"]) for row in case.test[:DRAWN]]]
    for file in files:
        ask = runtime(file, optimized=True)
        rows.append([_found(case, ask(row["pixel_values"][None])) for row in case.test[:DRAWN]])
    for line, boxes in enumerate(rows):
        for column, objects in enumerate(boxes):
            sheet.paste(_with_boxes(images[column].resize((side, side)), objects), (column * side, line * side))
    sheet.save(case.directory / "boxes.png")


def _with_boxes(image: Image.Image, objects: Sequence[tuple[str, list[float]]]) -> Image.Image:
    pen = ImageDraw.Draw(image)
    for label, corners in objects:
        left, top, right, bottom = (SCALE * value for value in corners)
        pen.rectangle([left, top, right, bottom], outline="white", width=2)
        pen.text((left + 4, top + 2), label, fill="white", stroke_width=1, stroke_fill="black")
    return image


def _truth(label: Mapping[str, Tensor]) -> list[tuple[str, list[float]]]:
    """Names and corners of what is there."""
    centre, size = label["boxes"].split(2, 1)
    corners = torch.cat([centre - size / 2, centre + size / 2], 1) * IMAGE_SIZE
    return [(KINDS[kind], box) for kind, box in zip(label["class_labels"].tolist(), corners.tolist(), strict=True)]


def _found(case: Case, outputs: tuple[Tensor, Tensor]) -> list[tuple[str, list[float]]]:
    """Names with scores, and corners, of what was detected."""
    (detected,) = case.detector.processor.post_process_object_detection(
        SimpleNamespace(logits=outputs[0], pred_boxes=outputs[1]),
        threshold=DRAWN_SCORE,
        target_sizes=torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]]),
    )
    kinds, scores = detected["labels"].tolist(), detected["scores"].tolist()
    labels = [f"{KINDS[kind]} {score:.2f}" for kind, score in zip(kinds, scores, strict=True)]
    return list(zip(labels, detected["boxes"].tolist(), strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not done yet, and print the table.

    Raises:
        SystemExit: int8 has not reached what it should.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("detection"), help="where to; default: detection")
    parser.add_argument("--detectors", nargs="+", default=list(DETECTORS), choices=list(DETECTORS))
    parser.add_argument("--train_images", type=int, help="instead of the detector's own number")
    parser.add_argument("--test_images", type=int, default=400)
    parser.add_argument("--steps", type=int, help="of the float training, instead of the detector's own")
    parser.add_argument("--qat_steps", type=int, help="instead of the detector's own number")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    cases = [
        Case(
            name,
            DETECTORS[name],
            encoded(DETECTORS[name].processor, options.train_images or DETECTORS[name].images, TRAIN_SEED),
            encoded(DETECTORS[name].processor, options.test_images, TEST_SEED),
            options.directory / name,
            options.qat_steps or DETECTORS[name].qat_steps,
        )
        for name in options.detectors
    ]
    with quiet():
        rows = run(cases, options.steps, options.directory / "results.json")
    print(f"\n{table(rows)}")
    failed = failures(rows)
    if failed:
        sys.exit("\n".join(["", "int8 on ONNX Runtime has not reached what it should:", *failed]))


if __name__ == "__main__":
    main()
