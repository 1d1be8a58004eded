#!/bin/sh
# The environment that the server needs, with the extras of EXTRAS (comma-separated), in the versions of
# constraints.txt, and without the server: its layer stays the same until one of them changes.
set -eu
torch=$(grep '^torch==' constraints.txt)
docker/pip.sh install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch"
python3 - "${EXTRAS:-}" >/tmp/requirements.txt <<'END'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = [extra for extra in sys.argv[1].split(",") if extra]
names = [*project["dependencies"], *(name for extra in extras for name in project["optional-dependencies"][extra])]
print(*names, sep="\n")
END
docker/pip.sh install -c constraints.txt -r /tmp/requirements.txt
# Programs that test torch itself, 80 MB of its wheel.
rm -rf /opt/lamamba/lib/python3*/site-packages/torch/test
