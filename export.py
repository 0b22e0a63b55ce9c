"""Export a checkpoint for other programs, and prove that each file computes what the checkpoint computes.

    python export.py --weights best.pt --include torchscript onnx openvino
    python export.py --weights best.pt --include openvino --int8 --data data/my.yaml    # compares mAP, too
    python export.py --weights best.pt --include engine --half --device 0               # TensorRT, on its GPU
    python export.py --weights best.pt --include yolov5                                 # back to ultralytics/yolov5

Exit status: 0 where every file that this machine can run computes what its checkpoint computes, 1 where one does not, 2
for a user's mistake. Core ML packages run on macOS only: elsewhere a warning says that one was not compared.

From Python: `export.run(weights="best.pt", include=["onnx"])`; the keywords are the flags with underscores.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config import ROOT, ArgumentParser, UserError, check_minimum, display_path, options_from
from utils.runtime import LOGGER, run_script, select_device, setup_logging

if TYPE_CHECKING:
    from torch import Tensor

    from models.backends import Backend, ExportOptions

FORMATS = ("torchscript", "onnx", "openvino", "engine", "coreml", "yolov5")
INSTEAD = {  # YOLOv5's other values of --include, and what to do about them
    "saved_model": "export onnx, and run: onnx2tf -i best.onnx",
    "pb": "export onnx, and run: onnx2tf -i best.onnx",
    "tflite": "export onnx, and run: onnx2tf -i best.onnx (it writes .tflite files)",
    "edgetpu": "export onnx, and run: onnx2tf -i best.onnx -oiqt, then edgetpu_compiler on the int8 .tflite file",
    "tfjs": "export onnx, which onnxruntime-web runs in a browser",
    "paddle": "export onnx, and run: x2paddle --framework=onnx --model=best.onnx --save_dir=best_paddle_model",
}
COMPARED_IMAGES = 8
CALIBRATION_IMAGES = 128
SURE = 0.25  # boxes are compared where the checkpoint's score is at least this


class Mismatch(Exception):
    """An exported file computes something else than its checkpoint."""


def build_parser() -> ArgumentParser:
    """YOLOv5's flags of export.py."""
    parser = ArgumentParser(prog="export.py", description="Export a checkpoint, and compare what comes out.")
    add = parser.add_argument
    add("--data", default="", help="dataset YAML: compare mAP on its val images; its train images calibrate --int8")
    add("--weights", nargs="+", default=["yolov5s.pt"], help="checkpoint; of several each is exported")
    add("--imgsz", "--img", "--img-size", type=int, nargs="+", default=[640, 640], help="input height and width")
    add("--batch-size", type=int, default=1, help="images per batch")
    add("--device", default="cpu", help="cpu, or a CUDA number such as 0")
    add("--include", nargs="+", type=str.lower, default=["torchscript"], help=", ".join(FORMATS))
    add("--half", action="store_true", help="fp16: openvino's weights, coreml, engine; others with a CUDA --device")
    add("--int8", action="store_true", help="openvino: 8-bit integers, calibrated on --data")
    add("--dynamic", action="store_true", help="any image size and batch; engine: up to those of the export")
    add("--simplify", action="store_true", help="onnx: fewer operators, by onnxslim")
    add("--opset", type=int, default=17, help="onnx: version of its operators")
    add("--workspace", type=int, default=4, help="engine: GiB of GPU memory for building it")
    add("--nms", action="store_true", help="onnx: final detections (batch, most, 6) as output")
    add("--conf-thres", type=float, default=0.25, help="--nms: lowest confidence")
    add("--iou-thres", type=float, default=0.45, help="--nms: IoU above which the weaker box is dropped")
    add("--topk-all", type=int, default=100, help="--nms: most detections per image")
    add("--topk-per-class", type=int, default=100, help="--nms: most detections per class")
    add("--with-code", action="store_true", help="yolov5: write beside the file the gates that YOLOv5 does not have")
    for flag, why in (
        ("--inplace", "boxes are decoded as each format needs"),
        ("--keras", "belongs to TensorFlow"),
        ("--optimize", "belongs to TorchScript on phones"),
        ("--per-tensor", "belongs to TensorFlow Lite"),
        ("--mlmodel", "coreml writes the newer .mlpackage"),
        ("--agnostic-nms", "--nms works class by class"),
    ):
        add(flag, action="store_true", help=f"not offered: {why}")
    return parser


def run(**options: Any) -> list[str]:
    """Export; keywords are the flags with underscores. Returns the paths of the files and folders written.

    Raises:
        UserError: an unknown keyword or format, a package that is not installed, or a file that is not as it should be.
        Mismatch: a file computes something else than its checkpoint; all files are written.

    >>> export.run(weights="yolov5n.pt", include=["onnx"], imgsz=320)
    ['yolov5n.onnx']
    """
    setup_logging()
    return _run(options_from(build_parser(), options))


def main(argv: list[str] | None = None) -> None:
    """Command line; a user's mistake raises UserError, a file that differs too much ends with status 1."""
    try:
        _run(build_parser().parse_args(argv))
    except Mismatch as error:
        LOGGER.error(f"error: {error}")
        raise SystemExit(1) from None


def _run(options: argparse.Namespace) -> list[str]:
    _check(options)
    from models.backends import FORMATS as KINDS
    from models.backends import load
    from utils.data import prepare
    from utils.downloads import find_weights
    from utils.inference import input_hw

    device = select_device(options.device)
    if "engine" in options.include and device.type != "cuda":
        raise UserError("--include engine: TensorRT builds on the GPU that runs it. Add --device 0, or export onnx.")
    usable: list[str] = []
    written: list[str] = []
    faults: list[str] = []
    for weights in options.weights:
        source = Path(find_weights(weights))
        # a file that was found by its name lies where it is shared with others: what comes from it is written here
        stem = (source if Path(weights).exists() else Path(source.name)).with_suffix("")
        if not os.access(stem.parent, os.W_OK):
            raise UserError(f"{display_path(stem.parent)}: may not be written to. Copy {source.name} elsewhere first.")
        reference = load(source, device)
        reference.size_hw = size_hw = input_hw(options.imgsz, reference)
        how = export_options(options, source, size_hw, reference)
        for name in options.include:
            KINDS[name].check(how)
        if options.data and len(reference.names) != (count := prepare(options.data).num_classes):
            raise UserError(
                f"--data {options.data}: names {count} classes, but the network knows {len(reference.names)}."
            )
        images = load_images(options, size_hw, "val", COMPARED_IMAGES)
        for name in options.include:
            path = KINDS[name].export(reference.model, stem, how)
            LOGGER.info(f"{name}: {display_path(path)} ({size_mb(path):.1f} MB)")
            written.append(str(path))
            if reason := KINDS[name].cannot_run():
                LOGGER.warning(f"{display_path(path)}: written, not compared: {reason}.")
                continue
            usable.append(str(path))
            bounds = KINDS[name].bounds(how)
            faults += _compared(options, load(path, device), reference, images, bounds, how, display_path(path))
    if usable:
        _say_usage(usable[-1], options)
    if faults:
        raise Mismatch(" ".join(faults))
    return written


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not go together, and formats that are not offered."""
    check_minimum(options, batch_size=1, topk_all=1, topk_per_class=1, opset=12, workspace=1)
    for name in options.include:
        if name in INSTEAD:
            raise UserError(f"--include {name}: not offered. Instead {INSTEAD[name]}")
        if name not in FORMATS:
            raise UserError(f"--include {name}: unknown format; expected {', '.join(FORMATS)}.")
    for flag in ("keras", "optimize", "per_tensor", "mlmodel", "agnostic_nms"):
        if getattr(options, flag):
            raise UserError(f"--{flag.replace('_', '-')}: not offered. Leave it out; see --help for why.")
    for flag, format in (("nms", "onnx"), ("simplify", "onnx"), ("int8", "openvino"), ("with_code", "yolov5")):
        if getattr(options, flag) and format not in options.include:
            raise UserError(f"--{flag.replace('_', '-')} belongs to {format}: add it to --include, or leave it out.")
    if options.int8 and not options.data:
        raise UserError("--int8: needs images to measure the ranges on. Name the dataset with --data.")
    if options.half and str(options.device).lower() in ("", "cpu") and {"torchscript", "onnx"} & set(options.include):
        raise UserError("--half: torchscript and onnx need a CUDA --device for it; openvino and coreml do not.")
    if options.dynamic and "coreml" in options.include:
        raise UserError("--dynamic: a Core ML package is made for one size. Leave it out, or export coreml by itself.")
    if options.half and options.int8:
        raise UserError("--half and --int8 are two precisions: choose one.")


def export_options(
    options: argparse.Namespace, source: Path, size_hw: tuple[int, int], reference: Backend
) -> ExportOptions:
    from models.backends import ExportOptions

    if options.nms and reference.num_masks:
        raise UserError("--nms: not for segmentation networks, whose rows also hold mask coefficients.")
    calibration = load_images(options, size_hw, "train", CALIBRATION_IMAGES) if options.int8 else []
    same = ("batch_size", "half", "int8", "dynamic", "simplify", "opset", "nms", "conf_thres", "iou_thres", "topk_all",
            "topk_per_class", "with_code", "workspace")  # fmt: skip
    chosen = {key: getattr(options, key) for key in same}
    return ExportOptions(size_hw=size_hw, source=source, calibration=calibration, **chosen)


def load_images(options: argparse.Namespace, size_hw: tuple[int, int], task: str, most: int) -> list[Tensor]:
    """Images of the dataset, or of the repository, as a network takes them: float (1, 3, h, w) in 0..1."""
    import torch

    from utils.data import prepare
    from utils.images import read_image
    from utils.inference import fit, to_float
    from utils.labels import image_files

    if options.data:
        sources: Sequence[Path] = prepare(options.data, task=task).split(task)
    else:
        sources = [ROOT / "data/images"]
    fitted = [fit([read_image(file)], size_hw, 32, auto=False)[0] for file in image_files(sources)[:most]]
    return [to_float(image, torch.device("cpu")) for image in fitted]


def size_mb(path: Path) -> float:
    """The size of a file, or of all files in a folder, in MB of 1e6 bytes."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


# ----------------------------------------------------------------------------------------------------------- comparing


def _compared(
    options: argparse.Namespace,
    network: Backend,
    reference: Backend,
    images: Sequence[Tensor],
    bounds: Any,
    how: ExportOptions,
    name: str,
) -> list[str]:
    """Log by how much a file differs from its checkpoint; a sentence for each bound that it exceeds."""
    if how.dynamic:  # a second size, which is neither square nor the one that was traced
        height = how.size_hw[0] // 2 // reference.stride * reference.stride or reference.stride
        images = [*images, images[0][:, :, :height]]
    box, score = difference(network, reference, images, how)
    found = {"pixels": (box, bounds.box), "score": (score, bounds.score)}
    if options.data:
        is_final = getattr(network, "is_final", False)
        network.size_hw = how.size_hw  # of a dynamic one, too: the same images for both
        judged = [mean_ap(each, options.data, how if is_final else None) for each in (network, reference)]
        found["mAP50-95"] = (abs(judged[0] - judged[1]), bounds.map)
        LOGGER.info(f"  mAP50-95 {judged[0]:.4f}, of the checkpoint {judged[1]:.4f}")
    said = ", ".join(f"{value:.2g} {what} (at most {most:g})" for what, (value, most) in found.items())
    LOGGER.info(f"  largest difference on {len(images)} images: {said}")
    return [
        f"{name} differs from its checkpoint by {value:.3g} {what}, more than {most:g}: do not use it."
        for what, (value, most) in found.items()
        if not value <= most  # NaN, too
    ]


def difference(
    network: Backend, reference: Backend, images: Sequence[Tensor], how: ExportOptions
) -> tuple[float, float]:
    """By how many pixels boxes, and by how much scores, differ at most between two networks over images."""
    import torch

    is_final = getattr(network, "is_final", False)
    boxes, scores = 0.0, 0.0
    # a convolution in TF32, torch's default on CUDA, moves boxes by more than full precision is allowed
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for image in images:
            batch = image.expand(network.batch_size or 1, -1, -1, -1)
            found = network(batch.to(network.device)).predictions[:1].cpu()
            wanted = reference(batch[:1].to(reference.device, reference.dtype)).predictions.float().cpu()
            compare = _final_difference if is_final else _row_difference
            box, score = compare(found, wanted, len(reference.names), how)
            boxes, scores = max(boxes, box), max(scores, score)
    return boxes, scores


def _row_difference(found: Tensor, wanted: Tensor, num_classes: int, how: ExportOptions) -> tuple[float, float]:
    """Between predictions (1, N, 5 + classes): boxes of rows with a sure score, or else of the 100 best; all scores."""
    scores = [rows[0, :, 4:5] * rows[0, :, 5 : 5 + num_classes] for rows in (found, wanted)]
    best = scores[1].amax(1)
    sure = best >= min(SURE, float(best.topk(min(100, len(best))).values[-1]))
    return float((found - wanted)[0, sure, :4].abs().max()), float((scores[0] - scores[1]).abs().max())


def _final_difference(found: Tensor, wanted: Tensor, num_classes: int, how: ExportOptions) -> tuple[float, float]:
    """Between a file's final detections and ours; one without a counterpart counts by its height over the threshold."""
    from utils.nms import non_max_suppression

    limits = {"iou_thres": how.iou_thres, "multi_label": True, "max_det": how.topk_all}
    ours, theirs = (non_max_suppression(rows, how.conf_thres, **limits)[0] for rows in (wanted, found))
    box, score = 0.0, 0.0
    for ones, others in ((ours, theirs), (theirs, ours)):
        for one in ones[ones[:, 4] >= SURE]:  # what stands at the threshold, or is the last that fits, may differ
            same = others[others[:, 5] == one[5]]
            gaps = (same[:, :4] - one[:4]).abs().amax(1)
            if len(gaps) and float(gaps.min()) < how.size_hw[0] / 20:
                nearest = same[gaps.argmin()]
                box, score = max(box, float(gaps.min())), max(score, abs(float(nearest[4] - one[4])))
            else:
                score = max(score, float(one[4]) - max(SURE, how.conf_thres))
    return box, score


def mean_ap(network: Backend, data: str, final: ExportOptions | None = None) -> float:
    """mAP50-95 on a dataset's val images, at the protocol's thresholds or at those of a file's own suppression."""
    from utils.data import prepare
    from utils.engine import EvalOptions, judge

    spec = prepare(data, task="val")
    protocol = EvalOptions(num_classes=spec.num_classes, progress=False)
    if final is not None:
        limits = {"conf_thres": final.conf_thres, "iou_thres": final.iou_thres, "max_det": final.topk_all}
        protocol = replace(protocol, **limits)
    imgsz = network.size_hw[0] if network.size_hw else 640
    return float(judge(network, spec, "val", protocol, imgsz=imgsz, batch_size=16).ap.map)


def _say_usage(file: str, options: argparse.Namespace) -> None:
    """How to use a file."""
    path = display_path(file)
    size = " ".join(map(str, options.imgsz))
    data = f" --data {options.data}" if options.data else ""
    lines = [
        f"Detect:    python detect.py --weights {path} --imgsz {size}",
        f"Validate:  python val.py --weights {path} --imgsz {options.imgsz[0]}{data}",
        f"Python:    model = torch.hub.load('.', 'custom', '{path}', source='local')",
    ]
    LOGGER.info("\n".join(lines))


if __name__ == "__main__":
    run_script(main)
