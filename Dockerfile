# The image of examples/cluster/rayjob.yaml, for its head and its workers: docker build -t stemline:0.1.0 .
FROM python:3.11-slim-bookworm

# gcc: Triton compiles the launcher of each kernel when it first runs. wget: KubeRay's probes call it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/stemline
# The dependencies in a layer of their own: it stays when only the code changes.
COPY pyproject.toml constraints.txt README.md ./
RUN pip install --no-cache-dir -c constraints.txt .

COPY kernels kernels
COPY stem_core stem_core
COPY pipeline pipeline
COPY jobs jobs
COPY models models
COPY examples examples
ENV PYTHONPATH=/opt/stemline

RUN useradd --create-home --uid 1000 stemline
USER stemline
CMD ["python", "-m", "jobs"]
