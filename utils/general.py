"""YOLOv5's `utils.general`, for other people's code: its names, arguments and side effects over what we have.

Nothing of ours imports this file.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import importlib.metadata
import inspect
import logging
import math
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version
from torch import Tensor, nn

from models.checkpoints.files import strip
from utils import augmentations, nms, runtime
from utils.boxes import (
    Boxes,
    Letterbox,
    clip_xyxy,
    cxcywh_to_xyxy,
    cxcywhn_to_xyxy,
    undo_letterbox,
    xyxy_to_cxcywh,
    xyxy_to_cxcywhn,
)
from utils.config import ROOT, UserError, display_path, find_file, read_yaml
from utils.data import coco_categories, datasets_dir, load_dataset, prepare
from utils.drawing import can_show, save_crop
from utils.files import free_path, write_yaml
from utils.inference import round_up
from utils.plots import save_one_box
from utils.sources import fetch_media

__all__ = [  # what others find here besides the definitions below
    "ROOT",
    "cv2",
    "save_one_box",
]

NUM_THREADS = min(8, max(1, (os.cpu_count() or 2) - 1))
ANSI = {
    "black": "\033[30m",
    "red": "\033[31m",
    "green": "\033[32m",
    "yellow": "\033[33m",
    "blue": "\033[34m",
    "magenta": "\033[35m",
    "cyan": "\033[36m",
    "white": "\033[37m",
    "bright_black": "\033[90m",
    "bright_red": "\033[91m",
    "bright_green": "\033[92m",
    "bright_yellow": "\033[93m",
    "bright_blue": "\033[94m",
    "bright_magenta": "\033[95m",
    "bright_cyan": "\033[96m",
    "bright_white": "\033[97m",
    "end": "\033[0m",
    "bold": "\033[1m",
    "underline": "\033[4m",
}


def __getattr__(name: str) -> Any:
    """`LOGGER`, set up when it is first used, and `DATASETS_DIR`, from the environment."""
    if name == "LOGGER":
        runtime.setup_logging()
        return runtime.LOGGER
    if name == "DATASETS_DIR":
        return datasets_dir() or ROOT.parent / "datasets"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# --------------------------------------------------------------------------------------------------------------- boxes


def non_max_suppression(
    prediction: Tensor | Sequence[Tensor],
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    multi_label: bool = False,
    labels: Sequence[Tensor] = (),
    max_det: int = 300,
    nm: int = 0,
) -> list[Tensor]:
    """See `utils.nms`; per image (k, 6 + nm): x1, y1, x2, y2, confidence, class, mask coefficients."""
    return nms.non_max_suppression(
        prediction,
        conf_thres,
        iou_thres,
        classes=classes,
        agnostic=agnostic,
        multi_label=multi_label,
        labels=labels,
        max_det=max_det,
        num_masks=nm,
    )


def scale_boxes(
    img1_shape: Sequence[int], boxes: Boxes, img0_shape: Sequence[int], ratio_pad: Sequence[Any] | None = None
) -> Boxes:
    """Move boxes (n, 4+) from a letterboxed image to the original and clip them to it, in place; the same array.

    Shapes are (height, width, ...). `ratio_pad` is ((scale, scale), (pad x, pad y)), else taken from the shapes.
    """
    if ratio_pad is None:
        scale = min(img1_shape[0] / img0_shape[0], img1_shape[1] / img0_shape[1])
        pad = (img1_shape[1] - img0_shape[1] * scale) / 2, (img1_shape[0] - img0_shape[0] * scale) / 2
    else:
        scale, pad = ratio_pad[0][0], (ratio_pad[1][0], ratio_pad[1][1])
    box = Letterbox(scale, pad, (img0_shape[0], img0_shape[1]), (img1_shape[0], img1_shape[1]))
    boxes[..., :4] = undo_letterbox(boxes[..., :4], box)
    return boxes


def clip_boxes(boxes: Boxes, shape: Sequence[int]) -> Boxes:
    """Clip boxes (n, 4+) to an image of (height, width, ...), in place; the same array."""
    boxes[..., :4] = clip_xyxy(boxes[..., :4], (shape[0], shape[1]))
    return boxes


scale_coords, clip_coords = scale_boxes, clip_boxes  # their names up to v6.2


def xyxy2xywh(x: Boxes) -> Boxes:
    """Corners as centre and size."""
    return xyxy_to_cxcywh(x)


def xywh2xyxy(x: Boxes) -> Boxes:
    """Centre and size as corners."""
    return cxcywh_to_xyxy(x)


def xywhn2xyxy(x: Boxes, w: float = 640, h: float = 640, padw: float = 0, padh: float = 0) -> Boxes:
    """Centre and size in 0..1 of an image of `w` x `h` pixels as corners in pixels, moved by (padw, padh)."""
    return cxcywhn_to_xyxy(x, w, h, padw, padh)


def xyxy2xywhn(x: Boxes, w: float = 640, h: float = 640, clip: bool = False, eps: float = 0.0) -> Boxes:
    """Corners in pixels as centre and size in 0..1; with `clip` corners are first moved into the image. `x` stays."""
    return xyxy_to_cxcywhn(x, w, h, clip=clip, eps=eps)


def xyn2xy(x: Boxes, w: float = 640, h: float = 640, padw: float = 0, padh: float = 0) -> Boxes:
    """Points (n, 2) in 0..1 as pixels, moved by (padw, padh)."""
    y = x.clone() if isinstance(x, Tensor) else np.array(x, float)
    y[..., 0], y[..., 1] = x[..., 0] * w + padw, x[..., 1] * h + padh
    return y


def segment2box(segment: np.ndarray, width: int = 640, height: int = 640) -> np.ndarray:
    """The box (4,) around those points (n, 2) of an outline that lie inside the image; zeros without any."""
    x, y = segment.T
    inside = (x >= 0) & (y >= 0) & (x <= width) & (y <= height)
    points = segment[inside]
    return np.concatenate((points.min(0), points.max(0))) if len(points) else np.zeros(4)


def segments2boxes(segments: Sequence[np.ndarray]) -> np.ndarray:
    """The boxes (n, 4) around outlines (k, 2), as centre and size."""
    corners = [np.concatenate((points.min(0), points.max(0))) for points in segments]
    return xyxy_to_cxcywh(np.array(corners).reshape(-1, 4))


def resample_segments(segments: Sequence[np.ndarray], n: int = 1000) -> list[np.ndarray]:
    """Closed outlines (k, 2) as `n` points each, spread evenly over their corners."""
    return list(augmentations.resample(segments, n).astype(np.float32)) if len(segments) else []


def apply_classifier(x: list[Tensor], model: nn.Module, img: Tensor, im0: Any) -> list[Tensor]:
    """Detections of which a classifier (224 x 224 RGB in 0..1 -> logits) gives the same class; `x` is changed.

    `x` holds per image (k, 6) in pixels of `img` (B, 3, h, w), `im0` the original BGR image or images.
    """
    originals = [im0] if isinstance(im0, np.ndarray) else im0
    for index, found in enumerate(x):
        if not len(found):
            continue
        original = originals[index]
        boxes = scale_boxes(img.shape[2:], found[:, :4].clone(), original.shape).tolist()
        crops = [cv2.resize(save_crop(box, original, None, gain=1.3, pad=30, square=True), (224, 224)) for box in boxes]
        batch = np.ascontiguousarray(np.stack(crops)[..., ::-1].transpose(0, 3, 1, 2), np.float32) / 255
        classes = model(torch.from_numpy(batch).to(found.device)).argmax(1)
        x[index] = found[classes == found[:, 5].long()]
    return x


# -------------------------------------------------------------------------------------------------------------- checks


def make_divisible(x: float, divisor: int | Tensor) -> int:
    """The next multiple of `divisor` that is not below `x`."""
    step = int(divisor.max()) if isinstance(divisor, Tensor) else int(divisor)
    return math.ceil(x / step) * step


def check_img_size(imgsz: int | Sequence[int], s: int | Tensor = 32, floor: int = 0) -> Any:
    """Image size, or list of height and width, raised to multiples of the stride `s` and to `floor`; changes logged."""
    stride = int(s.max()) if isinstance(s, Tensor) else int(s)
    if isinstance(imgsz, Sequence):
        return [round_up(side, stride, floor=floor) for side in imgsz]
    return round_up(int(imgsz), stride, floor=floor)


def check_suffix(file: Any = "yolov5s.pt", suffix: str | Sequence[str] = (".pt",), msg: str = "") -> None:
    """Raise UserError for a file, or one of a list, whose suffix is not among `suffix`; one without a suffix passes."""
    wanted = tuple(known for known in ([suffix] if isinstance(suffix, str) else suffix) if known)
    for name in [file] if isinstance(file, (str, Path)) else file or ():
        found = Path(name).suffix.lower()
        if wanted and found and found not in wanted:
            raise UserError(f"{msg}{name}: expected a file ending in {' or '.join(wanted)}.")


def check_file(file: str | Path, suffix: str | Sequence[str] = "") -> str:
    """The file that a path or a bare name such as `coco128.yaml` stands for; an empty name stays.

    An https address of an image or video is fetched into the working directory.
    """
    check_suffix(file, suffix)
    text = str(file)
    if not text or os.path.exists(text):
        return text
    if text.lower().startswith(("http://", "https://")) and not text.lower().endswith((".yaml", ".yml")):
        return str(fetch_media(text))
    return str(find_file(text, ("data", "models", "utils")))


def check_yaml(file: str | Path, suffix: Sequence[str] = (".yaml", ".yml")) -> str:
    """`check_file` for a YAML file."""
    return check_file(file, suffix)


def check_dataset(data: str | Path | Mapping[str, Any], autodownload: bool = True) -> dict[str, Any]:
    """A dataset YAML as a dict: paths as whole text (a list where the file has several), `names` by number, `nc`.

    With `autodownload` images that are missing are fetched or drawn where the file says how; see `utils.data`.
    """
    spec = prepare(data) if autodownload else load_dataset(data)
    places = {"train": spec.train, "val": spec.val, "test": spec.test}
    texts = {task: [str(path) for path in paths] for task, paths in places.items() if paths}
    splits = {task: paths[0] if len(paths) == 1 else paths for task, paths in texts.items()}
    return {**spec.file.data, "path": spec.root, **splits, "names": dict(spec.names), "nc": spec.num_classes}


def check_requirements(
    requirements: str | Path | Iterable[str] = ROOT / "requirements.txt",
    exclude: Sequence[str] = (),
    install: bool = True,
    cmds: str = "",
) -> bool:
    """Whether all packages are here, as `name>=1.0` lines of a file or texts; those that are not are logged.

    Nothing is installed, whatever `install` says: the line that is logged does it.
    """
    if isinstance(requirements, Path) or (isinstance(requirements, str) and requirements.endswith(".txt")):
        lines = Path(requirements).read_text(encoding="utf-8").splitlines()
    else:
        lines = [requirements] if isinstance(requirements, str) else list(requirements)
    missing = []
    for line in lines:
        text = line.partition("#")[0].strip()
        with contextlib.suppress(InvalidRequirement):  # options of pip such as --extra-index-url
            wanted = Requirement(text)
            if wanted.name not in exclude and not _is_installed(wanted):
                missing.append(f"'{text}'")
    if missing:
        more = f" {cmds}" if cmds else ""
        runtime.LOGGER.warning(
            f"missing packages, which are not installed from here: pip install {' '.join(missing)}{more}"
        )
    return not missing


def _is_installed(wanted: Requirement) -> bool:
    if wanted.marker is not None and not wanted.marker.evaluate():
        return True
    try:
        return wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def check_version(
    current: str = "0.0.0",
    minimum: str = "0.0.0",
    name: str = "version ",
    pinned: bool = False,
    hard: bool = False,
    verbose: bool = False,
) -> bool:
    """Whether a version is at least `minimum`, or with `pinned` just that; `hard` raises UserError, `verbose` warns."""
    have, need = Version(current), Version(minimum)
    fine = have == need if pinned else have >= need
    problem = f"{name}{current}: expected {minimum}{'' if pinned else ' or newer'}."
    if hard and not fine:
        raise UserError(problem)
    if verbose and not fine:
        runtime.LOGGER.warning(problem)
    return fine


def check_python(minimum: str = "3.10") -> bool:
    """`check_version` of Python, hard."""
    return check_version(platform.python_version(), minimum, name="Python ", hard=True)


def check_imshow(warn: bool = False) -> bool:
    """Whether windows can be shown: OpenCV was built with them, and there is a display; `warn` logs where not."""
    works = can_show()
    if warn and not works:
        runtime.LOGGER.warning("no window can be shown here: this OpenCV has none, or there is no display.")
    return works


def is_ascii(s: Any = "") -> bool:
    """Whether a text, or the text of anything else, holds ASCII only."""
    return str(s).isascii()


def is_chinese(s: Any = "人工智能") -> bool:
    """Whether a text holds a Chinese character."""
    return any("\u4e00" <= character <= "\u9fff" for character in str(s))


# --------------------------------------------------------------------------------------------------------------- files


def increment_path(path: str | Path, exist_ok: bool = False, sep: str = "", mkdir: bool = False) -> Path:
    """`path` where it is free or `exist_ok`, else the first free of `path{sep}2`, `path{sep}3`, ...; see `free_path`.

    With `mkdir` the folder is made.
    """
    found = Path(path) if exist_ok else free_path(Path(path), sep)
    if mkdir:
        found.mkdir(parents=True, exist_ok=True)
    return found


def get_latest_run(search_dir: str = ".") -> str:
    """The newest `last*.pt` below a folder, or an empty text."""
    found = glob.glob(f"{search_dir}/**/last*.pt", recursive=True)
    return max(found, key=os.path.getctime) if found else ""


def file_size(path: str | Path) -> float:
    """The size of a file, or of all files in a folder, in MB of 2^20 bytes."""
    place = Path(path)
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**20


def yaml_load(file: str | Path = "data.yaml") -> dict[str, Any]:
    """The mapping in a YAML file, read safely."""
    return read_yaml(file).data


def yaml_save(file: str | Path = "data.yaml", data: Mapping[str, Any] | None = None) -> None:
    """Write a mapping as YAML, in its order; paths as text."""
    write_yaml(Path(file), data or {})


def url2file(url: str) -> str:
    """The file name at the end of an address, without what follows a `?`."""
    return Path(url.partition("?")[0]).name


def clean_str(s: str) -> str:
    """A text with the letters that file names and shells mind as `_`."""
    return re.sub(r"[|@#!¡·$€%&()=?¿^*;:,¨´><+]", "_", s)


def strip_optimizer(f: str | Path = "best.pt", s: str | Path = "") -> None:
    """Reduce a checkpoint to what running it needs, in place or into `s`: EMA weights in fp16, as a file of ours."""
    written = strip(f, s or None)
    saved = f" saved as {display_path(written)}," if s else ""
    runtime.LOGGER.info(f"Optimizer stripped from {f},{saved} {written.stat().st_size / 1e6:.1f}MB")


# ------------------------------------------------------------------------------------------------------------- running


def colorstr(*input: Any) -> str:
    """A text in a terminal's colours: `colorstr("blue", "bold", "text")`; a text alone is blue and bold."""
    *words, text = input if len(input) > 1 else ("blue", "bold", input[0])
    return "".join(ANSI[word] for word in words) + str(text) + ANSI["end"]


def set_logging(name: str | None = None, verbose: bool = True) -> logging.Logger:
    """Show the log, or with `verbose` False warnings only; the logger."""
    runtime.setup_logging()
    if not verbose:
        runtime.LOGGER.setLevel(logging.WARNING)
    return runtime.LOGGER


def print_args(args: Any = None, show_file: bool | argparse.Namespace = True, show_func: bool = False) -> None:
    """Log options, by default the arguments of the calling function; `print_args(name, options)` is v6's way."""
    runtime.setup_logging()
    frame = inspect.currentframe()
    caller = frame.f_back if frame is not None else None
    assert caller is not None  # this is a Python function, called from Python
    if isinstance(args, str):
        title, values = args, dict(vars(show_file))
    else:
        names, _, _, local = inspect.getargvalues(caller)
        values = {name: local[name] for name in names} if args is None else dict(args)
        parts = ([Path(caller.f_code.co_filename).stem] if show_file else []) + [caller.f_code.co_name] * show_func
        title = ": ".join(parts)
    listed = ", ".join(f"{key}={value}" for key, value in values.items())
    runtime.LOGGER.info(f"{colorstr(f'{title}: ') if title else ''}{listed}")


def init_seeds(seed: int = 0, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch; with `deterministic`, ask torch for reproducible kernels."""
    runtime.init_seeds(seed, deterministic)


class Profile(contextlib.ContextDecorator):
    """Seconds spent inside `with profile:`, or in a function it decorates: `t` of all blocks, `dt` of the last.

    It waits for the device, or without one for CUDA where there is any, before it reads the clock.
    """

    def __init__(self, t: float = 0.0, device: torch.device | None = None) -> None:
        self.t, self.dt, self.device = t, 0.0, device
        waits_for = device or (torch.device("cuda") if torch.cuda.is_available() else None)
        self._watch = runtime.Stopwatch(waits_for)

    def __enter__(self) -> Profile:
        self._watch.seconds = 0.0
        self._watch.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._watch.__exit__(*exc)
        self.dt = self._watch.seconds
        self.t += self.dt

    def time(self) -> float:
        """The clock, once the device is done."""
        return self._watch._now()


def methods(instance: Any) -> list[str]:
    """The names of an object's methods, without those of two underscores."""
    return [name for name in dir(instance) if callable(getattr(instance, name)) and not name.startswith("__")]


def one_cycle(y1: float = 0.0, y2: float = 1.0, steps: int = 100) -> Callable[[float], float]:
    """A function that goes from `y1` to `y2` along half a cosine in `steps`."""
    return lambda x: (1 - math.cos(x * math.pi / steps)) / 2 * (y2 - y1) + y1


def intersect_dicts(da: Mapping[str, Any], db: Mapping[str, Any], exclude: Sequence[str] = ()) -> dict[str, Any]:
    """The entries of `da` whose key is in `db` with a value of equal shape, unless part of the key is in `exclude`."""
    kept = (key for key in da if key in db and not any(part in key for part in exclude))
    return {key: da[key] for key in kept if da[key].shape == db[key].shape}


def labels_to_class_weights(labels: Sequence[np.ndarray], nc: int = 80) -> Tensor:
    """Weights (nc,) that add up to 1 and fall with how often a class occurs in labels (k, 5); never as if once."""
    if not len(labels):
        return torch.empty(0)
    counts = np.bincount(np.concatenate(labels)[:, 0].astype(int), minlength=nc).astype(float)
    weights = 1 / np.where(counts == 0, 1, counts)
    return torch.from_numpy(weights / weights.sum()).float()


def labels_to_image_weights(
    labels: Sequence[np.ndarray], nc: int = 80, class_weights: np.ndarray | None = None
) -> np.ndarray:
    """Each image's sum (n,) of the weights of its labels' classes."""
    weights = np.ones(nc) if class_weights is None else np.asarray(class_weights)
    counts = np.array([np.bincount(rows[:, 0].astype(int), minlength=nc) for rows in labels])
    return (weights.reshape(1, nc) * counts).sum(1)


def coco80_to_coco91_class() -> list[int]:
    """COCO's category id of each of its 80 classes."""
    return coco_categories()
