"""Validate a checkpoint on a dataset: precision, recall, mAP50 and mAP50-95, per class where wanted.

    python val.py --weights yolov5n.pt --data coco128.yaml --img 640

From Python: `val.run(weights="yolov5n.pt", data="coco128.yaml")`; the keywords are the flags with underscores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config import ROOT, WORK, ArgumentParser, UserError, check_minimum, display_path, options_from
from utils.files import make_run_dir
from utils.runtime import LOGGER, check_half, keep_freed_memory, run_script, select_device, setup_logging

if TYPE_CHECKING:
    from torch import Tensor

    from utils.data import DatasetSpec
    from utils.dataloaders import Batch
    from utils.engine import EvalResult, ImageResult

Summary = tuple[tuple[float, ...], Any, tuple[float, float, float]]
STUDY_SIZES = range(256, 1536 + 128, 128)
PLOTTED_BATCHES = 3


def build_parser() -> ArgumentParser:
    """YOLOv5's flags of val.py."""
    parser = ArgumentParser(prog="val.py", description="Validate a checkpoint on a dataset.")
    add = parser.add_argument
    add("--data", default=str(ROOT / "data/coco128.yaml"), help="dataset YAML")
    add("--weights", nargs="+", default=["yolov5s.pt"], help="checkpoint; several are judged together as an ensemble")
    add("--batch-size", type=int, default=32, help="images per batch")
    add("--imgsz", "--img", "--img-size", type=int, default=640, help="image size in pixels")
    add("--conf-thres", type=float, default=0.001, help="lowest confidence of a detection")
    add("--iou-thres", type=float, default=0.6, help="IoU above which NMS drops the weaker box")
    add("--max-det", type=int, default=300, help="most detections per image")
    add("--task", default="val", choices=("train", "val", "test", "speed", "study"), help="split to judge, or a study")
    add("--device", default="", help="cpu, mps, or a CUDA number such as 0")
    add("--workers", type=int, help="most loader processes; default 8, and on a CPU 0: threads")
    add("--single-cls", action="store_true", help="judge as if all classes were one")
    add("--augment", action="store_true", help="test-time augmentation")
    add("--verbose", action="store_true", help="one row per class")
    add("--save-txt", action="store_true", help="write labels/*.txt")
    add("--save-hybrid", action="store_true", help="write labels and detections together; implies --save-txt")
    add("--save-conf", action="store_true", help="confidences in --save-txt files")
    add("--save-json", action="store_true", help="write a COCO results file; scored with pycocotools where installed")
    add("--project", default=str(WORK / "runs/val"), help="folder of the runs")
    add("--name", default="exp", help="name of this run")
    add("--exist-ok", action="store_true", help="write into an existing run folder")
    add("--half", action="store_true", help="compute in fp16 (CUDA), or bf16 (a CPU that has it; mAP within 0.002)")
    add("--dnn", action="store_true", help="not offered: OpenCV DNN inference of ONNX files")
    add("--noplots", action="store_true", help="no pictures")
    add("--skip-bad", action="store_true", help="leave out images that cannot be used even if more than a tenth are")
    add("--max-megapixels", type=int, default=100, help="image files with more are left out; 100 take up to 1 GB")
    return parser


def run(**options: Any) -> Summary:
    """Validate; keywords are the flags with underscores.

    Returns:
        `((precision, recall, mAP50, mAP50-95, box, obj, cls loss), mAP50-95 per class, ms per image of pre-processing,
        inference and NMS)`. The losses are zero here: only training computes them.

    Raises:
        UserError: an unknown keyword, or anything wrong with the files named.
    """
    setup_logging()
    return _run(options_from(build_parser(), options))


def main(argv: list[str] | None = None) -> None:
    """Command line; a user's mistake raises UserError."""
    _run(build_parser().parse_args(argv))


def _run(options: argparse.Namespace) -> Summary:
    if options.dnn:
        raise UserError("--dnn (OpenCV DNN) is not offered. Validate the .pt file itself, without the flag.")
    check_minimum(options, imgsz=1, batch_size=1, workers=0, max_det=1, max_megapixels=1)
    if options.save_hybrid:
        options.save_txt = True
    if str(options.data).endswith("coco.yaml") and options.task in ("val", "test"):
        options.save_json = True
    if options.task == "study":
        return _study(options)
    if options.conf_thres > 0.001 and options.task != "speed":
        LOGGER.warning(
            f"--conf-thres {options.conf_thres:g} above 0.001 cuts the precision-recall curve short: low mAP."
        )
    return _validate(options)


def _validate(options: argparse.Namespace) -> Summary:
    from models.backends import load
    from utils.data import prepare
    from utils.dataloaders import wanted_workers
    from utils.engine import TABLE_HEADER, EvalOptions, judge, table_rows
    from utils.inference import input_hw, speed_line
    from utils.progress import fit_table, terminal_width

    speed = options.task == "speed"
    device = select_device(options.device, options.batch_size)
    keep_freed_memory(device)
    task = options.task if options.task in ("train", "val", "test") else "val"
    spec = prepare(options.data, task=task)
    if options.half:
        check_half(device)
    half = options.half or (speed and device.type == "cuda")
    network = load(options.weights, device, half=half)
    names = _names(options, spec, network.names)
    imgsz = input_hw([options.imgsz], network)[0]
    save_dir = make_run_dir(options, "labels" if options.save_txt else "")
    plots = not options.noplots and not speed
    writer = ResultWriter(options, spec, names, save_dir, plots=plots)
    how = EvalOptions(
        num_classes=1 if options.single_cls else spec.num_classes,
        conf_thres=0.25 if speed else options.conf_thres,
        iou_thres=0.45 if speed else options.iou_thres,
        max_det=options.max_det,
        augment=options.augment,
        single_cls=options.single_cls,
        hybrid=options.save_hybrid,
        confusion=plots,
    )
    loading = {
        "workers": wanted_workers(options.workers, device.type),
        "max_pixels": options.max_megapixels * 1_000_000,
        "skip_bad": options.skip_bad,
    }
    loading |= {"rect": False, "pad": 0.0} if speed else {}
    size = {"imgsz": imgsz, "batch_size": options.batch_size}
    result = judge(network, spec, task, how, on_batch=writer.batch, on_image=writer.image, **size, **loading)
    per_class = (options.verbose or spec.num_classes < 50) and how.num_classes > 1
    table = [TABLE_HEADER, *table_rows(result, names, per_class=per_class)]
    LOGGER.info("\n".join(fit_table(table, terminal_width())))
    LOGGER.info(speed_line(result.times_ms, (options.batch_size, 3, imgsz, imgsz)))
    summary = writer.finish(result)
    LOGGER.info(f"Results saved to {display_path(save_dir)}")
    return summary, result.maps, result.times_ms


def _names(options: argparse.Namespace, spec: DatasetSpec, known: Mapping[int, str]) -> dict[int, str]:
    """The class names of the tables and files: the dataset's, as many as the network knows."""
    if len(known) != spec.num_classes and not options.single_cls:
        raise UserError(
            f"{options.weights[0]}: knows {len(known)} classes, but {display_path(spec.path)} names "
            f"{spec.num_classes}. Give the dataset it was trained for, or --single-cls."
        )
    return {0: "item"} if options.single_cls and spec.num_classes != 1 else dict(spec.names)


# ------------------------------------------------------------------------------------------------------ what is written


class ResultWriter:
    """Writes what the flags ask for while images are judged: label files, COCO JSON, pictures."""

    def __init__(
        self, options: argparse.Namespace, spec: DatasetSpec, names: dict[int, str], save_dir: Path, *, plots: bool
    ) -> None:
        self.options, self.spec, self.names, self.save_dir, self.plots = options, spec, names, save_dir, plots
        self.predictions: list[dict[str, Any]] = []
        self.image_ids: list[int | str] = []
        self.is_coco = any(path.as_posix().endswith("coco/val2017.txt") for path in spec.val)
        from utils.data import coco_categories

        self.categories = coco_categories() if self.is_coco else list(range(max(1000, spec.num_classes)))

    def batch(self, index: int, batch: Batch, detections: list[Tensor]) -> None:
        """Pictures of the labels and the detections of the first batches."""
        if self.plots and index < PLOTTED_BATCHES:
            from utils import plots

            plots.plot_evaluation_batch(index, batch, detections, self.names, self.save_dir)

    def image(self, image: ImageResult) -> None:
        """The detections of one image, as text or JSON."""
        if self.options.save_txt:
            self._write_txt(image)
        if self.options.save_json:
            self._collect_json(image)

    def _write_txt(self, image: ImageResult) -> None:
        from utils.boxes import xyxy_to_cxcywhn

        height, width = image.shape_hw
        boxes = xyxy_to_cxcywhn(image.detections[:, :4], width, height).tolist()
        lines = []
        for box, (confidence, class_index) in zip(boxes, image.detections[:, 4:6].tolist()):
            values = (class_index, *box, confidence) if self.options.save_conf else (class_index, *box)
            lines.append(" ".join(f"{value:g}" for value in values) + "\n")
        if lines:
            with open(self.save_dir / "labels" / f"{Path(image.path).stem}.txt", "a", encoding="utf-8") as file:
                file.writelines(lines)

    def _collect_json(self, image: ImageResult) -> None:
        stem = Path(image.path).stem
        image_id = int(stem) if stem.isnumeric() else stem
        self.image_ids.append(image_id)
        for x1, y1, x2, y2, confidence, class_index in image.detections.tolist():
            self.predictions.append(
                {
                    "image_id": image_id,
                    "category_id": self.categories[int(class_index)],
                    "bbox": [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)],
                    "score": round(confidence, 5),
                }
            )

    def finish(self, result: EvalResult) -> tuple[float, ...]:
        """Curves, confusion matrix and JSON; the summary, with COCO's own mAP where it could be computed."""
        summary = result.summary
        if self.plots:
            from utils import plots

            plots.plot_evaluation(result, self.names, self.save_dir)
        if self.options.save_txt:
            count = len(list((self.save_dir / "labels").glob("*.txt")))
            LOGGER.info(f"{count} label files in {display_path(self.save_dir / 'labels')}")
        if self.options.save_json and self.predictions:
            file = self.save_dir / f"{Path(self.options.weights[0]).stem}_predictions.json"
            file.write_text(json.dumps(self.predictions), encoding="utf-8")
            LOGGER.info(f"{len(self.predictions)} detections in {display_path(file)}")
            official = coco_map(file, self.spec, self.image_ids)
            if official is not None:
                summary = (*summary[:2], *official, *summary[4:])
        return summary


def coco_map(predictions: Path, spec: DatasetSpec, image_ids: list[int | str]) -> tuple[float, float] | None:
    """pycocotools' (mAP50, mAP50-95) of a results file; None, with the reason logged, where it cannot be computed."""
    annotations = spec.root / "annotations" / "instances_val2017.json"
    if not annotations.is_file():
        LOGGER.info(f"no {display_path(annotations)}: not scored with pycocotools")
        return None
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        LOGGER.warning("pycocotools is not installed: not scored. `pip install pycocotools`")
        return None
    truth = COCO(str(annotations))
    evaluation = COCOeval(truth, truth.loadRes(str(predictions)), "bbox")
    evaluation.params.imgIds = image_ids  # a dataset may be a part of the annotated images
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[1]), float(evaluation.stats[0])


def _study(options: argparse.Namespace) -> Summary:
    """mAP and speed at every size of STUDY_SIZES; one `study_<data>_<weights>.txt` per checkpoint."""
    from utils import plots

    save_dir = make_run_dir(options)
    files = []
    data = "data" if isinstance(options.data, Mapping) else Path(options.data).stem
    summary: Summary = ((), None, (0.0, 0.0, 0.0))
    for weights in options.weights:
        rows = []
        for size in STUDY_SIZES:
            once = argparse.Namespace(**vars(options))
            once.task, once.weights, once.imgsz, once.noplots = "val", [weights], size, True
            once.project, once.name = str(save_dir), str(size)
            LOGGER.info(f"\n{weights} at {size}:")
            summary = _validate(once)
            rows.append((*summary[0], *summary[2]))
        file = save_dir / f"study_{data}_{Path(weights).stem}.txt"
        file.write_text("".join(" ".join(f"{v:10.4g}" for v in row) + "\n" for row in rows), encoding="utf-8")
        files.append(file)
    if not options.noplots:
        plots.plot_study(files, STUDY_SIZES, save_dir / "study.png")
    LOGGER.info(f"Results saved to {display_path(save_dir)}")
    return summary


if __name__ == "__main__":
    run_script(main)
