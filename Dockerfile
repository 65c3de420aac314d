# An image for GPU nodes: `docker build -t sorsa-ds .`, then
#   docker run --gpus all --ipc host -v /big/disk:/data sorsa-ds launch/multi_gpu.sh --config launch/recipes/llama3_8b_1gpu.yaml
# See docs/clusters.md. PyTorch's wheels bring CUDA's libraries in the version that the driver has to know (13.0).
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# gcc and Python's headers are for the kernels that Triton compiles; the rest is for InfiniBand and RoCE.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        gcc g++ git ibverbs-providers libibverbs1 librdmacm1t64 make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 sorsa \
    && mkdir -p /opt/sorsa_ds /data/runs \
    && chown -R sorsa:sorsa /opt/sorsa_ds /data
USER sorsa
WORKDIR /opt/sorsa_ds

COPY --chown=sorsa:sorsa . .
RUN make install && rm -rf /home/sorsa/.cache

# Models, data and decompositions are kept on the mounted disk, not in the container.
ENV PATH=/opt/sorsa_ds/.venv/bin:$PATH \
    HF_HOME=/data/huggingface \
    SORSA_CACHE=/data/sorsa_ds \
    PYTHONUNBUFFERED=1
VOLUME /data
CMD ["python", "launch/train.py", "--help"]
