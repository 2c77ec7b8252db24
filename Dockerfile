# Serves the shipped model, or a bundle that is mounted:
#   docker build -t open-chameleon .
#   docker run -p 8000:8000 -e CHAMELEON_API_KEY=… -v ./my-bundle:/bundle:ro open-chameleon --model /bundle
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY chameleon chameleon
COPY tokenizers tokenizers
COPY train train
# An index of CPU builds of PyTorch (--build-arg PIP_OPTIONS="--index-url …") saves gigabytes where there is no GPU.
ARG PIP_OPTIONS=""
RUN python -m venv /app \
 && /app/bin/pip install --no-cache-dir $PIP_OPTIONS "torch>=2.9" torchvision \
 && /app/bin/pip install --no-cache-dir ".[serve]"

FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 chameleon
COPY --from=build /app /app
USER chameleon
ENV PATH=/app/bin:$PATH CHAMELEON_CACHE=/home/chameleon/.cache/chameleon
EXPOSE 8000
HEALTHCHECK --start-period=30s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready')"]
STOPSIGNAL SIGTERM
# All addresses: without a key the server refuses to start, see CHAMELEON_API_KEY, --api-keys and --open.
ENTRYPOINT ["chameleon", "serve", "--host", "0.0.0.0"]
