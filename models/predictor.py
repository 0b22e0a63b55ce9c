"""The object that `torch.hub` returns: any image in, `Detections` out.

model = torch.hub.load(".", "custom", "best.pt", source="local")
results = model(["zidane.jpg", array], size=640)
results.print()              # image 1/2: 720x1280 2 persons, 1 tie ...
results.pandas().xyxy[0]     # xmin ymin xmax ymax confidence class name
"""

from __future__ import annotations

import copy
import io
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.backends import Backend, PyTorch
from utils.boxes import xyxy_to_cxcywh
from utils.config import UserError
from utils.downloads import download
from utils.drawing import Annotator, color, drawable_names, save_crop, write_image
from utils.files import make_new_dir
from utils.images import ImageError, read_image
from utils.inference import DetectOptions, Detector, fit, restore, round_up, speed_line
from utils.names import counted
from utils.runtime import LOGGER
from utils.sources import open_source

CHANNELS_FIRST = 5  # an array whose first side is shorter than this is (channels, H, W)
CORNERS = ("xmin", "ymin", "xmax", "ymax", "confidence", "class")
CENTRES = ("xcenter", "ycenter", "width", "height", "confidence", "class")


class AutoShape(nn.Module):
    """A network that takes images as people have them.

    The attributes below may be set at any time. Images of one shape share a batch; a result does not depend on the
    other images of a call, and is what detect.py finds, before it rounds boxes to pixels.
    """

    conf = 0.25  # lowest confidence
    iou = 0.45  # IoU above which the weaker of two boxes goes
    agnostic = False  # boxes of different classes suppress each other too
    multi_label = False  # a box may count for several classes
    classes: Sequence[int] | None = None  # keep these only
    max_det = 1000  # per image
    amp = False  # autocast, on an accelerator

    def __init__(self, model: nn.Module, verbose: bool = True) -> None:
        super().__init__()
        if verbose:
            LOGGER.info("Adding AutoShape...")
        model = getattr(model, "backend", model)  # of a DetectMultiBackend
        self.model = model if isinstance(model, Backend) else PyTorch([model])
        self.names: dict[int, str] = dict(self.model.names)  # type: ignore[arg-type]
        self.stride = int(torch.as_tensor(self.model.stride).max())
        inner = getattr(self.model, "model", None)
        for name in ("yaml", "nc", "hyp"):
            if hasattr(inner, name):
                setattr(self, name, copy.deepcopy(getattr(inner, name)))
        self.eval()

    def forward(self, ims: Any, size: int | tuple[int, int] = 640, augment: bool = False, profile: bool = False) -> Any:
        """`Detections` of images; for a tensor the network's own output.

        Args:
            ims: a path, an http(s) address, `screen`, a PIL image, an array uint8 RGB `(H, W, 3)` or `(3, H, W)` (grey
                and alpha too), or a list of any of these. A tensor float `(B, 3, h, w)` in 0..1 goes to the network as
                it is, without NMS.
            size: of the network's input: the longer side, or height and width; in pixels.
            augment: look at three scales and a flip.
            profile: accepted; the times are always taken.

        Raises:
            UserError: something that is no image, or that cannot be read.
        """
        network: Any = self.model
        with torch.inference_mode(), torch.autocast(network.device.type, enabled=self.amp and self._accelerated()):
            if isinstance(ims, Tensor):
                return network(ims.to(network.device).type(network.dtype), augment=augment)
            pictures, files = _pictures(ims)
            found, times, shape = self._detect([picture[..., ::-1] for picture in pictures], size, augment)
        return Detections(pictures, found, files, times, self.names, shape)

    def _accelerated(self) -> bool:
        return self.model.device.type != "cpu"  # type: ignore[union-attr, return-value]

    def _detect(
        self, images: Sequence[np.ndarray], size: int | tuple[int, int], augment: bool
    ) -> tuple[list[Tensor], tuple[float, float, float], tuple[int, ...]]:
        """Detections of BGR images, seconds of the three steps, and the shape of the largest batch."""
        network: Any = self.model
        sides = (size, size) if isinstance(size, int) else size
        size_hw = network.size_hw or (round_up(sides[0], network.stride), round_up(sides[1], network.stride))
        how = DetectOptions(
            conf_thres=self.conf,
            iou_thres=self.iou,
            max_det=self.max_det,
            classes=[self.classes] if isinstance(self.classes, int) else self.classes,
            agnostic=self.agnostic,
            multi_label=self.multi_label,
            augment=augment,
        )
        detector = Detector(network, how, cpu_chunk=1)
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, image in enumerate(images):
            groups.setdefault(image.shape, []).append(number)
        found: list[Tensor] = [torch.zeros(0, 6)] * len(images)
        shape: tuple[int, ...] = (0, 3, *size_hw)
        for numbers in groups.values():
            with detector.pre:
                members = [images[number] for number in numbers]
                batch, letterboxes = fit(members, size_hw, network.stride, auto=network.size_hw is None)
            for number, rows in zip(numbers, restore(detector(batch).detections, letterboxes)):
                found[number] = rows
            shape = max(shape, tuple(batch.shape), key=np.prod)
        return found, (detector.pre.seconds, detector.inference.seconds, detector.nms.seconds), shape


# ----------------------------------------------------------------------------------------------------------- what comes


def _pictures(ims: Any) -> tuple[list[np.ndarray], list[str]]:
    """Every image as uint8 RGB `(H, W, 3)`, and a file name for its result."""
    if (isinstance(ims, np.ndarray) and ims.ndim == 4) or isinstance(ims, list | tuple):
        entries = list(ims)
    else:
        entries = [ims]
    if not entries:
        raise UserError("there is no image in the list: give at least one.")
    read = [_picture(entry, number) for number, entry in enumerate(entries)]
    return [picture for picture, _ in read], [f"{Path(name).stem}.jpg" for _, name in read]


def _picture(entry: Any, number: int) -> tuple[np.ndarray, str]:
    name = f"image{number}.jpg"
    if isinstance(entry, str | os.PathLike):
        text = str(entry)
        if text.startswith(("http://", "https://")):
            return _fetched(text)[..., ::-1].copy(), text.split("?")[0]
        if text.lower().split(" ")[0] == "screen":
            return next(iter(open_source(text))).image[..., ::-1].copy(), name
        return read_image(text)[..., ::-1].copy(), text
    if hasattr(entry, "convert"):  # a PIL image
        from PIL import ImageOps

        name = getattr(entry, "filename", "") or name
        return np.asarray(ImageOps.exif_transpose(entry).convert("RGB")), name
    if isinstance(entry, Tensor):
        entry = entry.detach().cpu()
        entry = ((entry * 255).round().to(torch.uint8) if entry.is_floating_point() else entry).numpy()
    if not isinstance(entry, np.ndarray):
        raise UserError(
            f"image {number + 1}: a {type(entry).__name__}; expected a path, an address, an image or an array."
        )
    return _from_array(entry, number), name


def _from_array(array: np.ndarray, number: int) -> np.ndarray:
    """An array of grey, RGB or RGBA, channels first or last, as uint8 `(H, W, 3)`."""
    shape = array.shape
    if array.ndim == 3 and shape[0] < CHANNELS_FIRST:
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "uifb":
        raise UserError(
            f"image {number + 1}: an array {shape} of {array.dtype}; expected uint8 (height, width, 3) in RGB."
        )
    array = np.repeat(array[..., :1], 3, 2) if array.shape[2] < 3 else array[..., :3]
    if array.dtype != np.uint8:
        if array.dtype.kind == "f" and 0 < array.max() <= 1:
            raise UserError(f"image {number + 1}: numbers of 0..1; expected 0..255. Multiply the array by 255.")
        array = array.clip(0, 255).round().astype(np.uint8)
    return np.ascontiguousarray(array)


def _fetched(address: str) -> np.ndarray:
    """The image BGR at an http(s) address; it is not kept."""
    from urllib.request import urlopen

    with tempfile.NamedTemporaryFile(suffix=Path(address.split("?")[0]).suffix[:10]) as file:
        try:
            download(address, file, label=address, opener=lambda url: urlopen(url, timeout=30))
            return read_image(file.name)
        except ImageError as error:
            raise UserError(f"{address}: {str(error).removeprefix(file.name).lstrip(': ')}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(f"{address}: not fetched ({reason}). Save the file yourself and give its path.") from None


# ---------------------------------------------------------------------------------------------------------- what leaves


class Detections:
    """What was found in `n` images.

    `ims` are the images uint8 RGB `(H, W, 3)`. `xyxy`, `xywh`, `xyxyn`, `xywhn` are lists of tensors `(k, 6)`, one per
    image: corners, or centre and size, in pixels or as fractions of the image; then confidence and class. `t` are the
    milliseconds per image of pre-processing, inference and NMS, `s` is the shape of the network's input.
    """

    def __init__(
        self,
        ims: list[np.ndarray],
        pred: list[Tensor],
        files: list[str],
        times: tuple[float, float, float] = (0.0, 0.0, 0.0),
        names: Mapping[int, str] | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self.ims, self.pred, self.files, self.times = ims, pred, files, times
        self.names = dict(names or {})
        sizes = [rows.new_tensor([*im.shape[1::-1], *im.shape[1::-1], 1, 1]) for im, rows in zip(ims, pred)]
        self.xyxy: list[Any] = pred
        self.xywh: list[Any] = [xyxy_to_cxcywh(rows) for rows in pred]
        self.xyxyn: list[Any] = [rows / size for rows, size in zip(self.xyxy, sizes)]
        self.xywhn: list[Any] = [rows / size for rows, size in zip(self.xywh, sizes)]
        self.n = len(pred)
        self.t = tuple(1000 * seconds / max(self.n, 1) for seconds in times)
        self.s = shape

    def print(self) -> None:
        """Log what `str` gives."""
        LOGGER.info(str(self))

    def render(self, labels: bool = True) -> list[np.ndarray]:
        """The images with boxes drawn, which also take the places of `ims`."""
        self.ims = [self._drawn(number, labels) for number in range(self.n)]
        return self.ims

    def show(self, labels: bool = True) -> None:
        """Open the images with boxes: in the notebook, else in the system's viewer."""
        from PIL import Image

        for number in range(self.n):
            picture = Image.fromarray(self._drawn(number, labels))
            display = _notebook_display()
            if display is None:
                picture.show()
            else:
                display(picture)

    def display(self, labels: bool = True) -> None:
        """The text and the images with boxes, in a notebook."""
        print(self)
        self.show(labels)

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows for a cell that ends in one image's detections."""
        from PIL import Image

        if self.n != 1:
            return None
        file = io.BytesIO()
        Image.fromarray(self._drawn(0, True)).save(file, "PNG")
        return file.getvalue()

    def save(self, labels: bool = True, save_dir: str | Path = "runs/detect/exp", exist_ok: bool = False) -> Path:
        """Write the images with boxes into a new folder (or `save_dir` itself), and return the folder."""
        folder = _folder(save_dir, exist_ok)
        taken: set[str] = set()
        for number, file in enumerate(self.files):
            name = _free(file, taken)
            write_image(folder / name, self._drawn(number, labels)[..., ::-1])
        LOGGER.info(f"Saved {self.n} image{'s' * (self.n > 1)} to {folder}")
        return folder

    def crop(
        self, save: bool = True, save_dir: str | Path = "runs/detect/exp", exist_ok: bool = False
    ) -> list[dict[str, Any]]:
        """Every object as a dict of `box` (4,), `conf`, `cls`, `label` and `im`, the BGR part of the image.

        With `save` the parts are written to `crops/CLASS/` in a new folder (or `save_dir` itself).
        """
        folder = _folder(save_dir, exist_ok) if save else None
        taken: dict[str, set[str]] = {}  # file names, by class
        crops = []
        for image, rows, name in zip(self.ims, self.pred, self.files):
            for *box, confidence, index in reversed(rows.tolist()):
                label = f"{self.names[int(index)]} {confidence:.2f}"
                file = None
                if folder is not None:
                    place = self.names[int(index)].replace("/", "_")
                    file = folder / "crops" / place / _free(name, taken.setdefault(place, set()))
                part = save_crop(box, image[..., ::-1], file)
                crops.append({"box": box, "conf": confidence, "cls": index, "label": label, "im": part})
        if folder is not None:
            LOGGER.info(f"Saved results to {folder}")
        return crops

    def pandas(self) -> Detections:
        """A copy whose `xyxy`, `xyxyn`, `xywh` and `xywhn` are lists of DataFrames.

        Columns are `xmin ymin xmax ymax` or `xcenter ycenter width height`, then `confidence class name`.
        """
        try:
            import pandas
        except ImportError:
            raise UserError("pandas() needs the package pandas: pip install pandas") from None
        new = copy.copy(self)
        for kind, columns in {"xyxy": CORNERS, "xyxyn": CORNERS, "xywh": CENTRES, "xywhn": CENTRES}.items():
            tables = []
            for rows in getattr(self, kind):
                table = pandas.DataFrame(rows.cpu().numpy().astype(float), columns=list(columns))
                table["class"] = table["class"].astype(int)
                table["name"] = [self.names[index] for index in table["class"]]
                tables.append(table)
            setattr(new, kind, tables)
        return new

    def numpy(self) -> Detections:
        """A copy whose tensors are arrays."""
        new = copy.copy(self)
        for kind in ("pred", "xyxy", "xyxyn", "xywh", "xywhn"):
            setattr(new, kind, [rows.cpu().numpy() for rows in getattr(self, kind)])
        return new

    def tolist(self) -> list[Detections]:
        """`Detections` of one image each."""
        return [self[number] for number in range(self.n)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int | slice) -> Detections:
        chosen = range(self.n)[index]
        numbers = chosen if isinstance(chosen, range) else [chosen]
        share = len(numbers) / max(self.n, 1)
        seconds = (self.times[0] * share, self.times[1] * share, self.times[2] * share)
        return Detections(
            [self.ims[i] for i in numbers],
            [self.pred[i] for i in numbers],
            [self.files[i] for i in numbers],
            seconds,
            self.names,
            self.s,
        )

    def __iter__(self) -> Iterator[Detections]:
        return iter(self.tolist())

    def __str__(self) -> str:
        lines = []
        for number, (image, rows) in enumerate(zip(self.ims, self.pred), 1):
            said = counted(self.names, rows[:, 5])
            lines.append(f"image {number}/{self.n}: {image.shape[0]}x{image.shape[1]} {said}")
        return "\n".join([*lines, speed_line(self.t, self.s or ())])  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"YOLOv5 {type(self)} instance\n{self}"

    def _drawn(self, number: int, labels: bool) -> np.ndarray:
        """An image RGB with its boxes, the weakest first."""
        annotator = Annotator(self.ims[number][..., ::-1])
        names = drawable_names(self.names)
        for *box, confidence, index in reversed(self.pred[number].tolist()):
            annotator.box(box, f"{names[int(index)]} {confidence:.2f}" if labels else "", color(int(index)))
        return annotator.image[..., ::-1]


def _free(file: str, taken: set[str]) -> str:
    """`a.jpg`, or `a2.jpg`, `a3.jpg`, ... where it is taken; it is taken then."""
    name = next(n for k in itertools.count(1) if (n := f"{Path(file).stem}{k if k > 1 else ''}.jpg") not in taken)
    taken.add(name)
    return name


def _folder(save_dir: str | Path, exist_ok: bool) -> Path:
    return make_new_dir(Path(save_dir), exist_ok=exist_ok)


def _notebook_display() -> Any:
    """IPython's `display` inside a notebook; None elsewhere."""
    import sys

    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython.display import display

    return display
