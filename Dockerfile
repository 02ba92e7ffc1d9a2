# The daemon in a container. docs/docker.md tells how to run it, and how to add Pythons and compilers for workloads.
#
#   docker build -t studio-runner .
#   docker run -d --name studio-runner --env-file runner.env -p 9090:9090 -v studio-state:/var/lib/studio-runner studio-runner

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY requirements.lock ./
# uv itself, and after it every package, is pinned by its hash.
RUN sed -n '/^uv==/,/[^\\]$/p' requirements.lock > uv.lock \
    && pip install --no-cache-dir --require-hashes --requirement uv.lock
COPY LICENSE README.md pyproject.toml ./
COPY runner runner
# As the README installs it.
RUN uv build --wheel \
    && uv venv /opt/studio-runner \
    && uv pip install --python /opt/studio-runner/bin/python --constraint requirements.lock --compile-bytecode dist/*.whl

FROM python:3.11-slim-bookworm
# git: for requirement lines that name a repository. tini: as process 1 it collects what a killed supervisor leaves behind.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/studio-runner --shell /usr/sbin/nologin studio-runner \
    && install -d -m 0700 -o studio-runner -g studio-runner /var/lib/studio-runner /var/cache/studio-runner
COPY --from=build /opt/studio-runner /opt/studio-runner
# Not on PATH: this is the daemon's Python, not one for workloads.
RUN ln -s /opt/studio-runner/bin/studio-runner /usr/local/bin/studio-runner

USER 10001
# /var/lib: attempts, dead letters, environments; must survive. /var/cache: the directories of runs; may be lost.
ENV STATE_DIR=/var/lib/studio-runner \
    WORKING_DIR=/var/cache/studio-runner
VOLUME ["/var/lib/studio-runner", "/var/cache/studio-runner"]
WORKDIR /var/lib/studio-runner
EXPOSE 9090
# TERM drains: give `docker stop` the time that runs need (--time), or bound it with GRACE.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s CMD ["python3", "-c", "import json, os, urllib.request as web; told = json.load(open(os.environ['WORKING_DIR'] + '/studio-runner.json')); web.urlopen('http://' + told['address'] + '/healthz', timeout=5)"]
ENTRYPOINT ["tini", "--", "studio-runner", "serve"]
