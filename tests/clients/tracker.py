"""Follows objects through a video: detections per frame, joined over frames by their overlap, as trackers do.

python tracker.py --weights WEIGHTS --source VIDEO --project FOLDER
"""

import argparse
from pathlib import Path

import torch

from models.common import DetectMultiBackend
from utils.dataloaders import VID_FORMATS, LoadImages, LoadStreams
from utils.general import (
    LOGGER,
    Profile,
    check_file,
    check_img_size,
    check_imshow,
    colorstr,
    cv2,
    increment_path,
    non_max_suppression,
    print_args,
    scale_boxes,
    xyxy2xywh,
)
from utils.metrics import box_iou
from utils.plots import Annotator, colors, save_one_box
from utils.torch_utils import select_device, smart_inference_mode


class IouTracker:
    def __init__(self, threshold=0.3):
        self.threshold, self.tracks, self.next_id = threshold, {}, 1

    def update(self, det):
        ids = []
        free = dict(self.tracks)
        for row in det:
            best = None
            same = {k: v for k, v in free.items() if v[5] == row[5]}
            if same:
                iou = box_iou(row[None, :4], torch.stack(list(same.values()))[:, :4])[0]
                if iou.max() > self.threshold:
                    best = list(same)[int(iou.argmax())]
            if best is None:
                best, self.next_id = self.next_id, self.next_id + 1
            else:
                free.pop(best)
            self.tracks[best] = row
            ids.append(best)
        return ids


@smart_inference_mode()
def run(weights, source, project, name="exp", imgsz=(640, 640), device="", classes=None, vid_stride=1, half=False):
    source = str(source)
    webcam = source.isnumeric() or source.endswith(".streams")
    if Path(source).suffix[1:] in VID_FORMATS:
        source = check_file(source)
    save_dir = increment_path(Path(project) / name, exist_ok=False)
    (save_dir / "tracks").mkdir(parents=True, exist_ok=True)

    device = select_device(device)
    model = DetectMultiBackend(weights, device=device, dnn=False, data=None, fp16=half)
    stride, names, pt = model.stride, model.names, model.pt
    imgsz = check_img_size(imgsz, s=stride)
    if webcam:
        check_imshow(warn=True)
        dataset = LoadStreams(source, img_size=imgsz, stride=stride, auto=pt, vid_stride=vid_stride)
    else:
        dataset = LoadImages(source, img_size=imgsz, stride=stride, auto=pt, vid_stride=vid_stride)
    vid_path, vid_writer = None, None
    model.warmup(imgsz=(1 if pt or model.triton else 1, 3, *imgsz))
    tracker, seen, dt = IouTracker(), 0, (Profile(), Profile(), Profile())
    for path, im, im0s, vid_cap, s in dataset:
        with dt[0]:
            im = torch.from_numpy(im).to(model.device)
            im = im.half() if model.fp16 else im.float()
            im /= 255
            if len(im.shape) == 3:
                im = im[None]
        with dt[1]:
            pred = model(im, augment=False)
        with dt[2]:
            pred = non_max_suppression(pred, 0.25, 0.45, classes, False, max_det=1000)
        for i, det in enumerate(pred):
            seen += 1
            p, im0, frame = (path[i], im0s[i].copy(), dataset.count) if webcam else (
                path, im0s.copy(), getattr(dataset, "frame", 0))  # fmt: skip
            p = Path(p)
            s += "%gx%g " % im.shape[2:]
            annotator = Annotator(im0, line_width=2, example=str(names))
            imc = im0.copy()
            if len(det):
                det[:, :4] = scale_boxes(im.shape[2:], det[:, :4], im0.shape).round()
                for c in det[:, 5].unique():
                    n = (det[:, 5] == c).sum()
                    s += f"{n} {names[int(c)]}{'s' * (n > 1)}, "
                rows = []
                for (*xyxy, conf, cls), track in zip(det, tracker.update(det.clone())):
                    c = int(cls)
                    x, y, w, h = xyxy2xywh(torch.tensor(xyxy).view(1, 4)).view(-1).tolist()
                    rows.append(f"{frame} {track} {x - w / 2:g} {y - h / 2:g} {w:g} {h:g} {conf:.3f} {c}\n")
                    annotator.box_label(xyxy, f"{track} {names[c]} {conf:.2f}", color=colors(track, True))
                    if frame == 1:
                        save_one_box(xyxy, imc, file=save_dir / "crops" / names[c] / f"{p.stem}.jpg", BGR=True)
                with open(save_dir / "tracks" / f"{p.stem}.txt", "a") as file:
                    file.writelines(rows)
            im0 = annotator.result()
            if vid_path != str(p):
                vid_path = str(p)
                if isinstance(vid_writer, cv2.VideoWriter):
                    vid_writer.release()
                if vid_cap:
                    fps = vid_cap.get(cv2.CAP_PROP_FPS)
                    w = int(vid_cap.get(cv2.CAP_PROP_FRAME_WIDTH))
                    h = int(vid_cap.get(cv2.CAP_PROP_FRAME_HEIGHT))
                else:
                    fps, w, h = 30, im0.shape[1], im0.shape[0]
                file = str(save_dir / p.with_suffix(".mp4").name)
                vid_writer = cv2.VideoWriter(file, cv2.VideoWriter_fourcc(*"mp4v"), fps, (w, h))
            vid_writer.write(im0)
        LOGGER.info(f"{s}{'' if len(det) else '(no detections), '}{dt[1].dt * 1e3:.1f}ms")
    vid_writer.release()
    t = tuple(x.t / seen * 1e3 for x in dt)
    LOGGER.info("Speed: %.1fms pre-process, %.1fms inference, %.1fms NMS per image at shape " % t + f"{(1, 3, *imgsz)}")
    LOGGER.info(f"Results saved to {colorstr('bold', save_dir)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", nargs="+", type=str)
    parser.add_argument("--source", type=str)
    parser.add_argument("--project", type=str)
    parser.add_argument("--imgsz", nargs="+", type=int, default=[640])
    parser.add_argument("--classes", nargs="+", type=int)
    parser.add_argument("--device", default="cpu")
    opt = parser.parse_args()
    opt.imgsz *= 2 if len(opt.imgsz) == 1 else 1
    print_args(vars(opt))
    run(**vars(opt))
