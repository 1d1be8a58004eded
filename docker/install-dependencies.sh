#!/bin/sh
# The environment that the server needs, in the versions of constraints.txt, and without the server: its layer stays
# the same until one of them changes.
set -eu
torch=$(grep '^torch==' constraints.txt)
docker/pip.sh install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch"
python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    >/tmp/requirements.txt
docker/pip.sh install -c constraints.txt -r /tmp/requirements.txt
