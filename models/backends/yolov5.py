"""YOLOv5's own checkpoints: `best-yolov5.pt`, which ultralytics/yolov5 opens."""

from __future__ import annotations

from pathlib import Path

from models.backends.base import Bounds, Exported, ExportOptions
from models.checkpoints.upstream import write_yolov5
from models.yolo import DetectionModel
from utils.config import UserError, display_path
from utils.runtime import LOGGER


class YOLOv5(Exported):
    """Written by `models.checkpoints.upstream`; read and run here as every checkpoint is."""

    include = "yolov5"
    suffix = "-yolov5.pt"

    @classmethod
    def export(cls, network: DetectionModel, stem: Path, options: ExportOptions) -> Path:
        if options.source is None:
            raise UserError("--include yolov5: needs the checkpoint's file.")
        path, *code = write_yolov5(stem.with_name(stem.name + cls.suffix), options.source, with_code=options.with_code)
        for file in code:
            LOGGER.info(f"{display_path(file)}: save it as models/attention.py of YOLOv5; its first lines say how")
        return path

    @classmethod
    def bounds(cls, options: ExportOptions) -> Bounds:
        return Bounds(8.0, 0.03, 0.003)  # of weights in half precision
