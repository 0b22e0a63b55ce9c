"""Videos and cameras through OpenCV: frames by stride, rates, and a thread that keeps a stream's newest frame."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import cv2
import numpy as np

from utils.config import UserError
from utils.runtime import LOGGER

MAX_WEBCAM_DIGITS = 4
REOPEN_AFTER = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds to wait before each try to get a lost stream back


def next_frame(capture: cv2.VideoCapture, stride: int) -> tuple[np.ndarray | None, int]:
    """The last of the next `stride` frames (None at the end) and how many could be grabbed."""
    for grabbed in range(stride):
        if not capture.grab():
            return None, grabbed
    done, image = capture.retrieve()
    if not done or image is None:
        return None, stride - 1
    return (cv2.cvtColor(image, cv2.COLOR_GRAY2BGR) if image.ndim == 2 else image), stride


def frames_per_second(capture: cv2.VideoCapture) -> float:
    """Frames per second; 30 where the source does not say, or says something impossible."""
    fps = float(capture.get(cv2.CAP_PROP_FPS))
    return fps if 0 < fps <= 1000 else 30.0


def frame_count(capture: cv2.VideoCapture) -> int:
    """How many frames a video says it has; 0 where it does not say, or says something impossible."""
    count = float(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    return int(count) if 0 < count < 2**53 else 0


class StreamReader:
    """One camera or stream, read by its own thread, which keeps only the newest frame."""

    def __init__(self, index: int, address: str, ready: threading.Condition, vid_stride: int) -> None:
        self.index, self.address, self.name = index, address, stream_name(address)
        self._ready, self._stride = ready, vid_stride
        self._capture = self._open()
        if not self._capture.isOpened():
            kind = "webcam" if address.isdecimal() else "stream"
            raise UserError(
                f"{self.name}: this {kind} cannot be opened. Check the address, and that nobody else has it."
            )
        self.fps = frames_per_second(self._capture)
        # a recording has an end and is not to be raced through; a camera reports no count
        self._recorded = self._capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0
        image, _ = next_frame(self._capture, 1)
        if image is None:
            self._capture.release()
            raise UserError(f"{self.name}: opened, but gives no picture.")
        self.newest: np.ndarray | None = image
        self.number = 1
        self.ended = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name=f"stream {self.name}", daemon=True)
        LOGGER.info(f"stream {index}: {self.name} ({image.shape[1]}x{image.shape[0]} at {self.fps:.2f} FPS)")

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop reading and let the camera go; a thread that hangs in a driver is left to end with the program."""
        self._stop.set()
        if self._thread.ident is None:
            self._capture.release()
        else:
            self._thread.join(timeout=5)

    def take(self) -> tuple[np.ndarray, int]:
        """The newest frame and its number; call with the condition held and `newest` there."""
        image, self.newest = self.newest, None
        assert image is not None
        return image, self.number

    def _open(self) -> cv2.VideoCapture:
        if self.address.isdecimal() and len(self.address) > MAX_WEBCAM_DIGITS:
            raise UserError(f"--source {self.address[:20]}...: webcams have smaller numbers, the first one is 0.")
        return cv2.VideoCapture(int(self.address) if self.address.isdecimal() else self.address)

    def _read(self) -> None:
        period = self._stride / self.fps if self._recorded else 0.0
        due = time.monotonic() + period
        try:
            while not self._stop.is_set():
                if period:
                    self._stop.wait(max(due - time.monotonic(), 0))
                    due = max(due + period, time.monotonic() - 1)
                image, _ = next_frame(self._capture, self._stride)
                if image is None:
                    if self._recorded or not self._reopen():
                        return
                    continue
                with self._ready:
                    self.newest, self.number = image, self.number + 1
                    self._ready.notify_all()
        finally:
            self._capture.release()
            with self._ready:
                self.ended = True
                self._ready.notify_all()

    def _reopen(self) -> bool:
        for seconds in REOPEN_AFTER:
            LOGGER.warning(f"{self.name}: no picture; trying again in {seconds:g} s")
            if self._stop.wait(seconds):
                return False
            self._capture.release()
            self._capture = self._open()
            if self._capture.isOpened():
                return True
        LOGGER.warning(f"{self.name}: lost. Given up after {len(REOPEN_AFTER)} tries.")
        return False


def split_address(address: str) -> SplitResult:
    """The parts of a URL; UserError where it is none."""
    try:
        return urlsplit(address)
    except ValueError as error:
        raise UserError(f"{address}: not an address ({error}).") from None


def stream_name(address: str) -> str:
    """A file name for a stream: without user and password, without the letters file systems and shells mind."""
    if "://" in address:
        parts = split_address(address)
        address = f"{parts.scheme}_{parts.netloc.rpartition('@')[2]}{parts.path}"
    else:
        address = Path(address).stem
    return re.sub(r"[^\w.\-]+", "_", address).strip("_.") or "stream"
