#!/bin/sh
# pip.sh ARGUMENTS...: pip in /opt/lamamba, which the first call makes, with the build's secrets where there are any.
set -eu
[ ! -s /run/secrets/ca_bundle ] || export PIP_CERT=/run/secrets/ca_bundle
[ ! -s /run/secrets/pip_conf ] || export PIP_CONFIG_FILE=/run/secrets/pip_conf
[ -x /opt/lamamba/bin/pip ] || python3 -m venv /opt/lamamba
exec /opt/lamamba/bin/pip --disable-pip-version-check "$@"
