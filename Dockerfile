# The study in its pinned environment, with CUDA (some 8 GB):
#
#     docker build -t hdkd .
#     docker run --rm --gpus all --ipc=host -v /my/images:/data:ro -v hdkd-results:/results hdkd make study PLAN=few_images
#     docker run --rm -p 8888:8888 hdkd .venv/bin/jupyter lab notebooks --ip=0.0.0.0
#
# Without a command it runs plan "smoke". A folder of your own as /results must be writable for user 1000.
# Apptainer, on clusters without Docker: the container's files are read-only and the user is you, so name both folders.
#
#     docker save hdkd -o hdkd.tar && apptainer build hdkd.sif docker-archive:hdkd.tar
#     apptainer exec --nv --pwd /study --bind /my/images:/data,/my/results:/results hdkd.sif make study PLAN=few_images
FROM python:3.12-slim-bookworm

# make starts the study, git names its commit in every run, g++ is what torch.compile needs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory /study \
    && useradd --create-home --uid 1000 study \
    && install -d -o study /study /data /results

USER 1000
WORKDIR /study
ENV HDKD_DATA=/data HDKD_RESULTS=/results HDKD_CACHE=/results/cache PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 UV_LINK_MODE=copy

# The packages first, beside an empty library: this layer is built anew only where one of these files changes.
COPY --chown=study pyproject.toml constraints.txt Makefile ./
RUN mkdir hdkd_lib && touch README.md hdkd_lib/__init__.py && make .venv/installed

COPY --chown=study . .
VOLUME ["/data", "/results"]
EXPOSE 8888
CMD ["make", "study"]
