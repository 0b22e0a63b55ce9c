"""Find objects in images, videos and streams: `python detect.py --weights yolov5s.pt --source data/images`."""

from __future__ import annotations

import argparse
import csv
import os
import re
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from utils.config import ROOT, WORK, ArgumentParser, UserError, check_minimum, display_path, options_from
from utils.files import make_run_dir
from utils.names import counted
from utils.runtime import LOGGER, check_half, keep_freed_memory, run_script, select_device, setup_logging

if TYPE_CHECKING:
    import cv2
    import numpy as np
    import torch
    from torch import Tensor

    from models.backends import Backend
    from utils.boxes import Letterbox
    from utils.inference import Detector
    from utils.sources import Frame, Source

MAX_LINE_THICKNESS = 1000
MAX_STEM_BYTES = 200  # of the name of a file written here, before its number and suffix; most systems hold 255
Prepared = tuple[list["Frame"], "Tensor", list["Letterbox"]]


def build_parser() -> ArgumentParser:
    """The command line; `run` takes the same options with underscores."""
    parser = ArgumentParser(prog="detect.py", description=__doc__)
    add = parser.add_argument
    add("--weights", nargs="+", default=["yolov5s.pt"], help="checkpoint, by path or by name; several form an ensemble")
    add("--source", default=str(ROOT / "data/images"), help="file, folder, glob, list.txt, URL, webcam number, screen")
    add(
        "--data", default=str(ROOT / "data/coco128.yaml"), help="class names for formats without any; a .pt has its own"
    )
    add("--imgsz", "--img", "--img-size", nargs="+", type=int, default=[640], help="network input size, one or h w")
    add("--conf-thres", type=float, default=0.25, help="lowest confidence, 0 to 1")
    add("--iou-thres", type=float, default=0.45, help="IoU above which the weaker of two boxes goes, 0 to 1")
    add("--max-det", type=int, default=1000, help="most detections per image")
    add("--device", default="", help="cpu, mps, or a CUDA number such as 0")
    add("--view-img", action="store_true", help="show the pictures in a window; q ends a stream")
    add("--save-txt", action="store_true", help="write labels/*.txt")
    add("--save-format", type=int, choices=(0, 1), default=0, help="of --save-txt: 0 centre and size, 1 corners")
    add("--save-csv", action="store_true", help="write predictions.csv")
    add("--save-conf", action="store_true", help="add the confidence to --save-txt lines")
    add("--save-crop", action="store_true", help="write every object found as crops/class/*.jpg")
    add("--nosave", action="store_true", help="write no pictures and videos")
    add("--classes", nargs="+", type=int, default=None, help="keep these class numbers only")
    add("--agnostic-nms", action="store_true", help="boxes of different classes suppress each other too")
    add("--augment", action="store_true", help="look at three scales and a flip: slower, finds a little more")
    add("--visualize", action="store_true", help="write the feature maps of every layer")
    add("--update", action="store_true", help="afterwards strip the training state from our own weights file, in place")
    add("--project", default=str(WORK / "runs/detect"), help="results go to project/name")
    add("--name", default="exp", help="results go to project/name")
    add("--exist-ok", action="store_true", help="write into project/name even if it exists")
    add("--line-thickness", type=int, default=None, help="of boxes, in pixels; from the image's size unless given")
    add("--hide-labels", action="store_true", help="draw boxes without labels")
    add("--hide-conf", action="store_true", help="draw labels without the confidence")
    add("--half", action="store_true", help="compute in fp16 (CUDA), or bf16 (a CPU that has it; mAP within 0.002)")
    add("--dnn", action="store_true", help="not available: ONNX files through OpenCV")
    add("--vid-stride", type=int, default=1, help="look at every n-th frame of a video")
    add("--max-megapixels", type=int, default=100, help="image files with more are skipped; 100 take up to 1 GB")
    return parser


def run(**options: Any) -> None:
    """Detect with the options of the command line (underscores for dashes); results go to `project/name`.

    Raises:
        UserError: an unknown option, a source or weights file that is missing or damaged, a device not here.
    """
    _detect(options_from(build_parser(), options))


def main(argv: Sequence[str] | None = None) -> None:
    """Detect as the command line says."""
    _detect(build_parser().parse_args(argv))


# ---------------------------------------------------------------------------------------------------------- the options


def _check(options: argparse.Namespace) -> None:
    """Refuse early what could only fail later."""
    for flag, value in (("--conf-thres", options.conf_thres), ("--iou-thres", options.iou_thres)):
        if not 0 <= value <= 1:
            raise UserError(f"{flag} {value:g}: expected 0 to 1.")
    check_minimum(options, max_det=1, max_megapixels=1)
    if options.line_thickness is not None and not 1 <= options.line_thickness <= MAX_LINE_THICKNESS:
        raise UserError(f"--line-thickness {options.line_thickness}: expected 1 to {MAX_LINE_THICKNESS} pixels.")
    if options.dnn:
        raise UserError(
            "--dnn runs ONNX files through OpenCV, which is not available here. Give the .pt and leave it out."
        )
    if options.visualize and (options.augment or len(options.weights) > 1):
        raise UserError("--visualize shows one pass of one network: leave out --augment and give one --weights.")
    if options.view_img:
        from utils.drawing import can_show

        if not can_show():
            raise UserError(
                "--view-img: no window can be opened here. Leave it out; pictures are saved unless --nosave is given."
            )


# ---------------------------------------------------------------------------------------------------------- the network


def _load(options: argparse.Namespace, device: torch.device) -> Backend:
    """The network, ready on the device; a wrong class number and files that --update may not touch are refused."""
    from models.backends import load
    from models.checkpoints.files import read
    from utils.downloads import find_weights

    if options.update:
        for path in map(find_weights, options.weights):
            if not read(path, training=False).ours:
                raise UserError(f"{path}: --update rewrites only files that train.py here wrote, not foreign ones.")
    if options.half:
        check_half(device)
    network = load(options.weights, device, half=options.half)
    wrong = [index for index in options.classes or () if index not in network.names]
    if wrong:
        raise UserError(f"--classes {wrong[0]}: {options.weights[0]} has classes 0 to {len(network.names) - 1}.")
    return network


def _prepare(source: Source, size_hw: tuple[int, int], network: Backend) -> Generator[Prepared, None, None]:
    """Rounds of frames with the network's input: rectangular where all frames have one shape and it takes any."""
    from utils.inference import fit

    with closing(source.rounds()) as rounds:
        for frames in rounds:
            auto = network.size_hw is None and len({frame.image.shape for frame in frames}) == 1
            yield frames, *fit([frame.image for frame in frames], size_hw, network.stride, auto=auto)


# ---------------------------------------------------------------------------------------------------------- the results


class _Results:
    """Writes what was found: pictures, videos, label files, crops and the CSV. Every file is opened once per frame."""

    WRITABLE = (".bmp", ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")

    def __init__(self, options: argparse.Namespace, save_dir: Path, names: dict[int, str]) -> None:
        from utils.drawing import drawable_names

        self.options, self.save_dir, self.names = options, save_dir, names
        self.pictures = not options.nosave
        self.show = options.view_img
        self.shown_names = drawable_names(names) if self.pictures or self.show else names
        self.num_label_files = 0
        self._owner: dict[tuple[str, str], str] = {}  # (kind, file name) -> the source that has it
        self._crops: Counter[tuple[str, str]] = Counter()
        self._videos: dict[str, tuple[cv2.VideoWriter, tuple[int, int]]] = {}
        self._csv: TextIO | None = None
        if options.save_csv:
            self._csv = (save_dir / "predictions.csv").open("w", newline="", encoding="utf-8")
            self._rows = csv.writer(self._csv)
            self._rows.writerow(("Image Name", "Prediction", "Confidence"))

    def close(self) -> None:
        for writer, _ in self._videos.values():
            writer.release()
        if self._csv is not None:
            self._csv.close()

    def unique(self, kind: str, owner: str, stem: str, suffix: str = "", number: int = 1) -> str:
        """A file name for `owner`: a.jpg, or a2.jpg, a3.jpg where another of this run has it (b/a.jpg, say)."""
        while True:
            name = f"{stem}{number if number > 1 else ''}{suffix}"
            if self._owner.setdefault((kind, name), owner) == owner:
                return name
            number += 1

    def stem(self, frame: Frame) -> str:
        """What the names of this frame's label file, crops and feature maps start with."""
        file_name = Path(frame.path).stem if frame.mode in ("image", "video") else frame.path
        return self.unique("stem", frame.path, _cut(file_name))

    def add(self, frame: Frame, detections: np.ndarray) -> bool:
        """Write one frame's (k, 6) detections [x1, y1, x2, y2, conf, class]; False when the user pressed q."""
        weakest_first = detections[::-1]  # so that the best boxes are drawn on top
        stem = self.stem(frame)
        if self.options.save_txt and len(detections):
            self._write_labels(frame, stem, weakest_first)
        if self._csv is not None:
            name = Path(frame.path).name
            self._rows.writerows((name, self.names[int(row[5])], f"{row[4]:.2f}") for row in weakest_first)
        if self.options.save_crop:
            self._write_crops(frame, stem, weakest_first)
        if not self.pictures and not self.show:
            return True
        image = self._draw(frame.image, weakest_first)
        if self.pictures:
            self._write_picture(frame, image)
        return not self.show or self._show(frame, image)

    def _write_labels(self, frame: Frame, stem: str, detections: np.ndarray) -> None:
        from utils.boxes import xyxy_to_cxcywhn

        height, width = frame.image.shape[:2]
        if self.options.save_format == 0:
            coordinates = xyxy_to_cxcywhn(detections[:, :4], width, height)
        else:
            coordinates = detections[:, :4] / (width, height, width, height)
        lines = []
        for row, values in zip(detections, coordinates):
            numbers = (*values, row[4]) if self.options.save_conf else values
            lines.append(" ".join((f"{int(row[5])}", *(f"{value:g}" for value in numbers))) + "\n")
        numbered = stem if frame.mode == "image" else f"{stem}_{frame.frame_index}"
        name = self.unique("labels", f"{frame.path} {frame.frame_index}", numbered, ".txt")
        (self.save_dir / "labels" / name).write_text("".join(lines), encoding="utf-8")
        self.num_label_files += 1

    def _write_crops(self, frame: Frame, stem: str, detections: np.ndarray) -> None:
        from utils.drawing import save_crop

        for row in detections:
            folder = _cut(re.sub(r'[\x00-\x1f<>:"/\\|?*]', "_", self.names[int(row[5])])).strip(". ") or str(
                int(row[5])
            )
            self._crops[folder, stem] += 1
            number = self._crops[folder, stem]
            name = self.unique(f"crops/{folder}", f"{frame.path} {number}", stem, ".jpg", number)
            save_crop(row[:4], frame.image, self.save_dir / "crops" / folder / name)

    def _draw(self, image: np.ndarray, detections: np.ndarray) -> np.ndarray:
        from utils.drawing import Annotator, color

        annotator = Annotator(image, line_width=self.options.line_thickness)
        for row in detections:
            name = self.shown_names[int(row[5])]
            label = "" if self.options.hide_labels else name if self.options.hide_conf else f"{name} {row[4]:.2f}"
            annotator.box(row[:4], label, color(int(row[5])))
        return annotator.image

    def _write_picture(self, frame: Frame, image: np.ndarray) -> None:
        from utils.drawing import write_image

        if frame.mode != "image":
            self._write_video(frame, image)
            return
        path = Path(frame.path)
        suffix = path.suffix if path.suffix.lower() in self.WRITABLE else ".jpg"
        write_image(self.save_dir / self.unique("picture", frame.path, _cut(path.stem), suffix), image)

    def _write_video(self, frame: Frame, image: np.ndarray) -> None:
        import cv2

        size_wh = image.shape[1], image.shape[0]
        if frame.path not in self._videos:
            stem = Path(frame.path).stem if frame.mode == "video" else frame.path
            file = self.save_dir / self.unique("picture", frame.path, _cut(stem), ".mp4")
            writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"mp4v"), frame.fps, size_wh)
            if not writer.isOpened():
                raise UserError(f"{file}: OpenCV cannot write mp4v video here. Use --nosave, with --save-txt say.")
            self._videos[frame.path] = writer, size_wh
        writer, opened_wh = self._videos[frame.path]
        # a writer silently drops frames of any other size
        writer.write(image if size_wh == opened_wh else cv2.resize(image, opened_wh))

    def _show(self, frame: Frame, image: np.ndarray) -> bool:
        import cv2

        cv2.namedWindow(frame.path, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
        cv2.imshow(frame.path, image)
        return cv2.waitKey(1) != ord("q")


def _cut(stem: str) -> str:
    """The name, or as much of it as leaves room for a number and a suffix."""
    encoded = os.fsencode(stem)
    return stem if len(encoded) <= MAX_STEM_BYTES else encoded[:MAX_STEM_BYTES].decode("utf-8", "ignore")


# -------------------------------------------------------------------------------------------------------------- the run


def _detect(options: argparse.Namespace) -> None:
    setup_logging()
    _check(options)
    from utils.sources import open_source, prefetch

    # a mistyped path is answered before torch is loaded
    source = open_source(options.source, options.vid_stride, options.max_megapixels * 1_000_000)
    import torch

    from utils.drawing import can_show
    from utils.inference import DetectOptions, Detector, input_hw, speed_line

    options.view_img = options.view_img or (source.live and can_show())
    device = select_device(options.device)
    keep_freed_memory(device)
    network = _load(options, device)
    size_hw = input_hw(options.imgsz, network)
    how = DetectOptions(
        conf_thres=options.conf_thres,
        iou_thres=options.iou_thres,
        max_det=options.max_det,
        classes=options.classes,
        agnostic=options.agnostic_nms,
        augment=options.augment,
    )
    detector = Detector(network, how, cpu_chunk=1)
    save_dir = make_run_dir(options, "labels" if options.save_txt else "")

    prepared = _prepare(source, size_hw, network)
    if not source.live:
        prepared = prefetch(prepared)  # reading and resizing overlap the network
    shape = (1, 3, *size_hw)
    with torch.inference_mode(), closing(_Results(options, save_dir, network.names)) as results, closing(prepared):
        detector.warm_up(size_hw)
        for frames, images, letterboxes in prepared:
            shape = (len(images), 3, *images.shape[2:])
            if not _one_round(detector, results, frames, images, letterboxes):
                break
    LOGGER.info(speed_line(detector.times_ms, shape))
    _say_where(options, results, source)
    if options.update:
        from models.checkpoints.files import strip
        from utils.downloads import find_weights

        for name in options.weights:
            strip(find_weights(name))


def _say_where(options: argparse.Namespace, results: _Results, source: Source) -> None:
    """Log the files that could not be read, and where the results lie."""
    if source.skipped:
        LOGGER.warning(f"{len(source.skipped)} of {source.count} files could not be read, or not to the end:")
        for message in source.skipped:
            LOGGER.warning(f"  {message}")
    if options.save_txt:
        folder = display_path(results.save_dir / "labels")
        LOGGER.info(f"{results.num_label_files} label{'s' * (results.num_label_files != 1)} saved to {folder}")
    if options.save_txt or options.save_csv or options.save_crop or options.visualize or not options.nosave:
        LOGGER.info(f"Results saved to {display_path(results.save_dir)}")


def _one_round(
    detector: Detector, results: _Results, frames: Sequence[Frame], images: Tensor, letterboxes: Sequence[Letterbox]
) -> bool:
    """Predict, write and log one round of frames; False when the user pressed q."""
    from utils.inference import restore

    before = detector.inference.seconds
    found = detector(images, visualize=_visualizer(results, frames[0])).detections
    milliseconds = (detector.inference.seconds - before) * 1e3
    go_on = True
    for frame, rows in zip(frames, restore(found, letterboxes)):
        rows[:, :4] = rows[:, :4].round()
        detections = rows.numpy()
        go_on = results.add(frame, detections) and go_on
        said = counted(results.names, detections[:, 5])
        LOGGER.info(f"{frame.prefix}{images.shape[2]}x{images.shape[3]} {said}, {milliseconds:.1f}ms")
    return go_on


def _visualizer(results: _Results, frame: Frame) -> Any:
    """What writes a frame's feature maps into a folder of the frame's own; None without --visualize."""
    if not results.options.visualize:
        return None
    from utils.drawing import feature_maps

    folder = results.stem(frame) if frame.mode == "image" else f"{results.stem(frame)}_{frame.frame_index}"
    return partial(feature_maps, save_dir=results.save_dir / folder)


if __name__ == "__main__":
    run_script(main)
