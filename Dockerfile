FROM python:3.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /app
COPY LICENSE README.md constraints.txt pyproject.toml ./
COPY tasks tasks
COPY worker worker
# The pins hold for what builds the package too: older versions of pip read the first variable
# there, newer ones the second.
RUN PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt pip install .

# A fixed uid, so that guest directories on the host can be given to it. A new volume on /guests
# takes this owner over. The heartbeat's directory is for any uid, since the worker may be told to
# run as the guests' owner instead.
RUN groupadd --gid 10001 forkvm \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin forkvm \
    && install -d -o forkvm -g forkvm -m 0755 /guests \
    && install -d -m 1777 /run/forkvm
USER 10001:10001
WORKDIR /

ENV FORKVM_ROOTS=/guests \
    FORKVM_HEARTBEAT_FILE=/run/forkvm/heartbeat
VOLUME /guests
CMD ["forkvm", "worker"]
