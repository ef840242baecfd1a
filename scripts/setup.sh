# Sourced by quickstart.sh and test.sh: goes to the project's root and makes .venv ready for the requirements file
# that is its argument. Does nothing where that has been done; sets PYTHON to the interpreter to use.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

base=""
for candidate in python3.13 python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null &&
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        base=$candidate
        break
    fi
done
PYTHON=.venv/bin/python
if [ ! -x "$PYTHON" ]; then
    if [ -z "$base" ]; then
        echo "error: Python 3.11, 3.12 or 3.13 is needed and none is on the PATH" >&2
        exit 2
    fi
    "$base" -m venv .venv || {
        rm -rf .venv
        echo "error: $base cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2
        exit 2
    }
fi

wanted=$(cat requirements*.txt | cksum)
stamp=".venv/.ready-for-$1"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $1 into .venv (a few minutes, several GB: torch brings its GPU libraries) ..."
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$1"
    echo "$wanted" >"$stamp"
fi
