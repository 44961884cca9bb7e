# CPU:   docker build -t first-experiments .
# CUDA:  docker build -t first-experiments --build-arg BASE=pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime .
# Run:   docker run --rm -v "$PWD/runs:/app/runs" first-experiments smoothgrad.py --image sample:cat
ARG BASE=python:3.12-slim
FROM ${BASE}

RUN useradd --create-home --uid 1000 user \
    && mkdir -p /app/runs /app/data \
    && chown -R user /app
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY --chown=user . .
USER 1000
ENTRYPOINT ["python"]
CMD ["smoothgrad.py", "--help"]
