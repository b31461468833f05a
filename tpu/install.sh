#!/usr/bin/env bash
# Copies this checkout to every host and installs it there: NAME=... ZONE=... tpu/install.sh
# The hosts' own Python is older than 3.11, so uv brings one.
source "$(dirname "$0")/common.sh"

archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git -C "$SOURCE" archive --format=tar.gz HEAD >"$archive"
gcloud compute tpus tpu-vm scp "$archive" "$NAME:imagent.tar.gz" --zone "$ZONE" --worker=all
on_all 'set -e
  rm -rf imagent venv && mkdir imagent && tar -xzf imagent.tar.gz -C imagent
  curl -LsSf https://astral.sh/uv/install.sh | sh
  .local/bin/uv venv --python 3.12 venv && .local/bin/uv pip install -q --python venv -e "imagent[tpu]"
  venv/bin/python -c "import imagent_jax.train"'
echo "Installed on every host of $NAME."
