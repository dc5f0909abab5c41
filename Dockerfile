# Images for every node of a Ray cluster, head and workers alike:
#
#   docker build --target cpu  -t xc-ray:0.1.0 .
#   docker build --target cuda -t xc-ray:0.1.0-cuda .
#
# torch's own packages bring CUDA, so that both have the same base; the driver is the node's. The
# base is pinned by its tag: add the digest that your registry shows where that is not enough.
ARG PYTHON=3.11.14-slim-bookworm

# The dependencies of pyproject.toml, at the versions of constraints.txt.
FROM python:${PYTHON} AS requirements
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY constraints.txt pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*p['dependencies'], sep='\n')" > requirements.txt

FROM requirements AS packages-cpu
RUN pip install --prefix /install -c constraints.txt -r requirements.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu

FROM requirements AS packages-cuda
RUN pip install --prefix /install -c constraints.txt -r requirements.txt

FROM requirements AS package
COPY LICENSE README.md ./
COPY xc_ray xc_ray
RUN pip install --prefix /install --no-deps .

# wget is for the probes, procps for drain-node.
FROM python:${PYTHON} AS runtime
RUN apt-get update \
    && apt-get install -y --no-install-recommends procps wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --user-group --create-home --home-dir /home/xc_ray xc_ray \
    && install -d -o 1000 -g 1000 /var/cache/xc_ray
COPY --chmod=755 docker/drain-node /usr/local/bin/drain-node
ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 XDG_CACHE_HOME=/var/cache/xc_ray
WORKDIR /home/xc_ray
# Of a node, as its raylet sees it; Kubernetes has probes of its own.
HEALTHCHECK --start-period=60s --interval=30s --timeout=5s \
    CMD wget -q -T 4 -O- http://127.0.0.1:52365/api/local_raylet_healthz | grep success
CMD ["xc-ray", "--help"]

# Triton compiles what starts its kernels, with the C compiler of the node that runs them.
FROM runtime AS cuda
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=packages-cuda /install /usr/local
COPY --from=package /install /usr/local
USER 1000:1000

FROM runtime AS cpu
COPY --from=packages-cpu /install /usr/local
COPY --from=package /install /usr/local
USER 1000:1000
