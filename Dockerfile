# docker build -t yolov5-attention .
# docker build -t yolov5-attention --build-arg TORCH=https://download.pytorch.org/whl/cu130 .     (CUDA)
# docker run --rm --ipc=host -v "$PWD:/work" yolov5-attention train --data coco128.yaml           (CUDA: --gpus all)
# --ipc=host: loader processes hand over their batches in shared memory, of which a container has 64 MB.
FROM python:3.12-slim

# What OpenCV needs of the system
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

# The index of torch's wheels: CPU here, cu126, cu130, ... for CUDA. A layer of its own, since it changes rarely.
ARG TORCH=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir "torch>=2.11" "torchvision>=0.26" --index-url "$TORCH"

COPY . /tmp/yolov5-attention
RUN pip install --no-cache-dir /tmp/yolov5-attention && rm -rf /tmp/yolov5-attention

# Mount your folder here: datasets are looked for in it, and runs/ is written to it.
WORKDIR /work
ENTRYPOINT ["yolov5-attention"]
CMD ["--help"]
