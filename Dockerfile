# check, fix, explain, advise and reports: docker run --rm -v "$PWD:/w" checkpoint-doctor check /w/model
# With --build-arg EXTRA=[quantize] also quantize, verify and kvcache.
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM python:3.12-slim
ARG EXTRA=""
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(ls /wheels/*.whl)$EXTRA" && rm -rf /wheels
RUN useradd --create-home doctor
USER doctor
WORKDIR /w
ENTRYPOINT ["doctor"]
