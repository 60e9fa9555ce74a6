# The page, without a root user: docker build -t gradinv . && docker run --rm -p 7860:7860 gradinv
#
# requirements.txt is made from pyproject.toml, torch and torchvision left to their own index:
#   printf 'torch\ntorchvision\n' | uv pip compile pyproject.toml --extra app --excludes - --generate-hashes \
#       --python-version 3.11 --python-platform linux --custom-compile-command 'see Dockerfile' -o requirements.txt
FROM python:3.11-slim

RUN useradd --create-home --uid 1000 user
USER 1000
RUN python -m venv /home/user/venv
ENV PATH=/home/user/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1
WORKDIR /home/user/app

COPY requirements.txt ./
RUN python -m pip install --no-cache-dir --require-hashes --requirement requirements.txt

# Left out, TORCH_INDEX means the package index's own build, which brings CUDA; for the small one give the address that
# PyTorch's installation page shows for "CPU": --build-arg TORCH_INDEX=<address>
ARG TORCH_INDEX
# hadolint ignore=DL3013
RUN python -m pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
    "torch>=2.4" "torchvision>=0.19"

# Owned by root: the app never writes beside its own code, only to its user's cache folder.
COPY .streamlit .streamlit
COPY assets assets
COPY gradinv gradinv
COPY app.py LICENSE ./

# What a public host needs: a run of at most some minutes on two cores. gradinv/jobs.py lists every limit.
ENV GRADINV_MAX_COST=1e8 \
    STREAMLIT_SERVER_ADDRESS=0.0.0.0 \
    STREAMLIT_SERVER_PORT=7860 \
    STREAMLIT_SERVER_SCRIPT_HEALTH_CHECK_ENABLED=true
EXPOSE 7860
# This opens the first page as a visitor would, for at most 60 s; /_stcore/health answers even where the app cannot be
# imported. A Streamlit without this check answers it with its start page, so only the word itself counts.
HEALTHCHECK --interval=1m --timeout=70s --start-period=2m \
    CMD ["python", "-c", "import urllib.request; assert urllib.request.urlopen('http://127.0.0.1:7860/_stcore/script-health-check', timeout=65).read() == b'ok'"]

# A Space shows the page in a frame of another origin, where uploads need a cookie that is sent across sites.
CMD ["sh", "-c", "exec python -m streamlit run app.py ${SPACE_ID:+--server.xsrfCookieSameSite=none}"]
