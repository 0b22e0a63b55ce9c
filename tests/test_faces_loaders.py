"""YOLOv5's loaders, for programs that read images, videos, streams and labelled sets through them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import TinyDataset
from utils import dataloaders, datasets, general
from utils.augmentations import letterbox
from utils.config import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of 96 x 128 and a video of seven frames, each of one grey."""
    place = tmp_path_factory.mktemp("media")
    cv2.imwrite(str(place / "still.png"), np.full((96, 128, 3), (10, 20, 30), np.uint8))
    writer = cv2.VideoWriter(str(place / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 7, (64, 48))
    for number in range(7):
        writer.write(np.full((48, 64, 3), 30 * number, np.uint8))
    writer.release()
    return place


def test_load_images_yields_five_things_for_images_and_videos(folder: Path) -> None:
    dataset = dataloaders.LoadImages(str(folder), 64, 32, True, None, 2)
    assert len(dataset) == dataset.nf == 2 and dataset.video_flag == [False, True]
    assert [Path(file).name for file in dataset.files] == ["still.png", "film.avi"]
    seen = []
    for path, im, im0, capture, text in dataset:
        seen.append((Path(path).name, dataset.mode, dataset.count, dataset.frame, dataset.frames))
        assert (im == letterbox(im0, 64, stride=32)[0].transpose(2, 0, 1)[::-1]).all()
        assert im.flags.c_contiguous and im.dtype == np.uint8
        if dataset.mode == "image":
            assert capture is None and text == f"image 1/2 {path}: "
            assert im0[0, 0].tolist() == [10, 20, 30] and im[:, 24, 0].tolist() == [30, 20, 10]
        else:
            assert capture.get(cv2.CAP_PROP_FPS) == 7 and capture.get(cv2.CAP_PROP_FRAME_WIDTH) == 64
            assert text.startswith("video 2/2 (")
    assert seen == [("still.png", "image", 1, 0, 0), *(("film.avi", "video", 2, i, 3) for i in (1, 2, 3))]
    assert next(iter(dataset))[0].endswith("still.png")  # it begins anew
    assert next(dataset)[3] is not None


def test_load_images_takes_lists_and_transforms(folder: Path) -> None:
    files = [folder / "still.png"] * 2
    dataset = datasets.LoadImages(files, transforms=lambda im: im.shape)
    assert [(im, dataset.count) for _, im, *_ in dataset] == [((96, 128, 3), 1), ((96, 128, 3), 2)]
    with pytest.raises(UserError, match="LoadStreams"):
        datasets.LoadImages("screen")


@pytest.mark.slow
def test_load_streams_gives_the_newest_frame_of_each(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "two.streams").write_text(f"{folder / 'film.avi'}\n" * 2)
    dataset = datasets.LoadStreams(tmp_path / "two.streams", 64, 32, True)
    assert dataset.mode == "stream" and len(dataset) == 2 and len(set(dataset.sources)) == 2
    assert dataset.fps == [7, 7] and dataset.rect
    counts = []
    for names, im, im0s, capture, text in dataset:
        counts.append(dataset.count)
        assert names == dataset.sources and capture is None and text == ""
        assert im.shape == (2, 3, 64, 64) and im.dtype == np.uint8 and [i.shape for i in im0s] == [(48, 64, 3)] * 2
        assert (im[0] == letterbox(im0s[0], 64, stride=32)[0].transpose(2, 0, 1)[::-1]).all()
    assert counts == list(range(len(counts))) and counts
    assert im0s[0].mean() > 150  # a recording is read to its end


def test_a_loader_gives_images_targets_paths_and_shapes(tiny_dataset: TinyDataset) -> None:
    loader, dataset = dataloaders.create_dataloader(
        str(tiny_dataset.root / "images" / "val"), 128, 3, 32, False, None, False, False, 0.5, True, workers=0
    )
    assert len(loader) == 2 and len(dataset) == dataset.n == 4
    assert dataset.shapes.tolist() == [[128, 96]] * 2 + [[96, 128]] * 2 and len(dataset.labels) == 4
    assert dataset.batch.tolist() == [0, 0, 0, 1] and dataset.batch_shapes.tolist() == [[160, 160], [160, 128]]
    assert all(Path(file).is_file() for file in (*dataset.im_files, *dataset.label_files))
    images, targets, paths, shapes = next(iter(loader))
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 160, 160)
    assert targets[:, 0].tolist() == [0, 0, 1, 1, 2, 2] and list(paths) == dataset.im_files[:3]
    boxes = general.xywh2xyxy(targets[targets[:, 0] == 0, 2:] * 160)
    (height, width), ratio_pad = shapes[0]
    general.scale_boxes((160, 160), boxes, (height, width), ratio_pad)
    expected = general.xywhn2xyxy(torch.from_numpy(dataset.labels[0][:, 1:]), width, height)
    torch.testing.assert_close(boxes, expected, atol=0.05, rtol=0)


def test_augmented_items_change_and_have_no_way_back(tiny_dataset: TinyDataset) -> None:
    hyp = {"mosaic": 1.0, "fliplr": 0.5, "hsv_h": 0.1}
    dataset = datasets.LoadImagesAndLabels(tiny_dataset.train[:3], 64, 2, True, hyp)
    torch.manual_seed(0)
    (first, labels, path, shapes), (second, *_) = dataset[0], dataset[0]
    assert first.shape == (3, 64, 64) and labels.shape[1] == 6 and shapes is None
    assert path == dataset.im_files[0] and not torch.equal(first, second)
    dataset.indices = [2, 2, 2]
    assert dataset[0][2] == dataset.im_files[2]
    with pytest.raises(UserError, match="quad"):
        datasets.create_dataloader(tiny_dataset.train[:3], 64, 2, 32, quad=True)


def test_small_loader_helpers() -> None:
    assert {"jpg", "png", "webp"} <= set(dataloaders.IMG_FORMATS) and {"mp4", "avi"} <= set(dataloaders.VID_FORMATS)
    assert datasets.img2label_paths(["a/images/b.jpg"]) == [str(Path("a/labels/b.txt"))]
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    assert datasets.exif_size(image) == (2, 4) and datasets.exif_transpose(image).size == (2, 4)
