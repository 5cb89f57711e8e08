# Two stages, so that the image contains no build tools.
FROM python:3.11-slim-bookworm AS build

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

RUN apt-get update && apt-get install -y --no-install-recommends tini
# Without pip, because nothing is installed in a running container.
RUN python3 -m venv --without-pip /opt/forkvm
WORKDIR /build
COPY LICENSE README.md constraints.txt pyproject.toml ./
COPY tasks tasks
COPY worker worker
# Extras of the package, for example [flower].
ARG EXTRAS=
# The constraints apply to the build requirements too: older versions of pip read the first variable
# for them, newer ones the second.
RUN PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
    pip --python /opt/forkvm/bin/python install ".${EXTRAS}"


FROM python:3.11-slim-bookworm

LABEL org.opencontainers.image.title="forkvm" \
      org.opencontainers.image.description="Worker that clones the directories of virtual machines by reflink or sparse copy" \
      org.opencontainers.image.licenses="MIT"

COPY --from=build /usr/bin/tini /usr/bin/tini
COPY --from=build /opt/forkvm /opt/forkvm

# A fixed uid, so that it can own guest directories on the host. A new volume on /guests gets the
# owner of this directory. The heartbeat directory is writable for all, because the worker may run
# as the owner of the guests instead.
RUN groupadd --gid 10001 forkvm \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin forkvm \
    && install -d -o forkvm -g forkvm -m 0755 /guests \
    && install -d -m 1777 /run/forkvm
USER 10001:10001
WORKDIR /

ENV PATH=/opt/forkvm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    FORKVM_ROOTS=/guests \
    FORKVM_HEARTBEAT_FILE=/run/forkvm/heartbeat
VOLUME /guests
# The worker touches the file every 2 s while it consumes. A container that runs another command has
# no such file, and counts as unhealthy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD test -n "$(find "$FORKVM_HEARTBEAT_FILE" -newermt '30 seconds ago')"
# PID 1 must reap orphans of killed processes. Celery does not, tini does. `-s` makes it work below
# another init too (`docker run --init`, a shared PID namespace).
ENTRYPOINT ["tini", "-s", "--"]
CMD ["forkvm", "worker"]
