# ScaleGPT in a container, on NVIDIA GPUs or on a CPU. In the repository's folder:
#
#   docker build -t scalegpt .
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD":/work scalegpt \
#       torchrun --nproc_per_node 8 -m scalegpt.train --preset 350M_1024 --input_file data/
#
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t scalegpt-cpu .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD":/work scalegpt-cpu \
#       scalegpt train --preset tiny --input_file my_text.txt
#
# torch's wheels bring CUDA's libraries; the host needs NVIDIA's driver and its container toolkit.
FROM python:3.12-slim-bookworm

# torch.compile needs a C compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ENV DS_BUILD_OPS=0 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /src
COPY constraints.txt ./
# A layer of its own: the code changes more often than its largest dependency.
ARG TORCH_INDEX=https://pypi.org/simple
RUN pip install -c constraints.txt --index-url "$TORCH_INDEX" torch
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY ds_configs ds_configs
COPY scalegpt scalegpt
RUN pip install -c constraints.txt '.[deepspeed,hf,gguf]'

# Data and runs are in /work. Whichever user the container runs as may write there and in the home folder.
RUN install -d -m 1777 /work /home/trainer
ENV HOME=/home/trainer USER=trainer
USER 1000
WORKDIR /work
CMD ["scalegpt", "--help"]
