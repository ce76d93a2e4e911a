# For GPU users: NVIDIA's PyTorch image brings torch, Transformer Engine and apex built for its CUDA.
# They stay as they are; everything else comes in the versions of constraints/cpu.txt.
ARG IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${IMAGE}

# The image constrains pip to the packages of its own build; ours replace that list.
ENV PIP_CONSTRAINT= \
    PIP_NO_CACHE_DIR=1

WORKDIR /workspace/symbiotic
COPY . .

# The last line fails the build if torch, Transformer Engine or apex changed on the way.
RUN python scripts/image_constraints.py write /tmp/constraints.txt \
    && python -m pip install --constraint /tmp/constraints.txt --editable '.[data,dev]' \
    && python scripts/image_constraints.py check /tmp/constraints.txt
