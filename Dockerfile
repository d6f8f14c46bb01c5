# The worker and the command line in one image. Not exercised by the tests.
FROM python:3.11-slim AS build
RUN python -m venv /opt/headgate
COPY dev/locks /build/dev/locks
WORKDIR /build
RUN /opt/headgate/bin/pip install --no-cache-dir --require-hashes -r dev/locks/uv.txt \
    && VIRTUAL_ENV=/opt/headgate /opt/headgate/bin/uv pip sync --no-cache --require-hashes dev/locks/run.txt
COPY . .
RUN VIRTUAL_ENV=/opt/headgate /opt/headgate/bin/uv pip install --no-cache --no-deps --no-build-isolation .

FROM python:3.11-slim
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/headgate headgate
COPY --from=build /opt/headgate /opt/headgate
ENV PATH=/opt/headgate/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /var/lib/headgate
EXPOSE 8080
# exec form: the worker is process 1 and gets the SIGTERM on which it drains
ENTRYPOINT ["headgate"]
CMD ["worker"]
