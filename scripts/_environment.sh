# Sourced by the scripts beside it: makes the virtual environment that they run in, once, and says where it is.
#
#   . "$(dirname "$0")/_environment.sh"; make_environment run|dev
#
# Afterwards $root is the repository, $python the environment's interpreter, and the current directory is $root.
# The environment is .venv in the repository, or $MESHQ_VENV. A stamp inside it (a hash of pyproject.toml, whether
# the tools of developers are there too, and for which folder) says that there is nothing to do. $MESHQ_PYTHON chooses the
# interpreter to start from.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
environment=${MESHQ_VENV:-$root/.venv}
python=$environment/bin/python
cd "$root"

say() { printf '%s\n' "$*" >&2; }

suits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

has_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

# The newest Python that is 3.11 or newer and can make virtual environments; with `any`, whether or not it can.
find_python() {
    local candidate
    for candidate in ${MESHQ_PYTHON:-python3.14 python3.13 python3.12 python3.11 python3 /usr/bin/python3}; do
        if command -v "$candidate" >/dev/null 2>&1 && suits "$candidate" && { [ "${1:-}" = any ] || has_venv "$candidate"; }; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    return 1
}

# Debian and Ubuntu split the module venv from Python. As root it is installed, else the one command is shown.
install_venv() {
    local packages=python3-venv
    if ! find_python any >/dev/null && [ -x /usr/bin/python3 ]; then
        say "meshq needs Python 3.11 or newer; the newest here is $(/usr/bin/python3 --version 2>&1). Install one, or name it in MESHQ_PYTHON."
        exit 1
    fi
    if ! command -v apt-get >/dev/null 2>&1; then
        say "meshq needs Python 3.11 or newer with its modules venv and ensurepip. Install them, or name an interpreter in MESHQ_PYTHON."
        exit 1
    fi
    if [ "$(id -u)" != 0 ]; then
        say "Python's module venv is missing. This installs it:"
        say "    sudo apt-get update && sudo apt-get install -y $packages"
        exit 1
    fi
    install_packages "$packages"
}

# Debian packages, as root. Their own messages are shown only if they fail.
install_packages() {
    local log
    say "Installing $* ..."
    log=$(mktemp)
    if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        say "apt-get could not install $*: its last words are above. Run this again when it can."
        exit 1
    fi
    rm -f "$log"
}

# What pip is to install besides meshq itself: the group `dev` of pyproject.toml. (pip reads such groups only since 25.1.)
dev_requirements() {
    "$python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"], sep="\n")'
}

pip_install() { "$python" -m pip install --quiet --quiet --disable-pip-version-check --no-input "$@"; }

stamp() {
    "$python" -c 'import hashlib, sys; print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest(), *sys.argv[1:])' "$root" "$1"
}

is_ready() {
    [ -x "$python" ] && [ -f "$environment/meshq.stamp" ] || return 1
    local has
    has=$(cat "$environment/meshq.stamp")
    [ "$has" = "$(stamp "$1" 2>/dev/null)" ] || [ "$has" = "$(stamp dev 2>/dev/null)" ]
}

make_environment() {
    local kind=$1 base requirements
    is_ready "$kind" && return 0
    if command -v flock >/dev/null 2>&1; then # two scripts at once make it one after the other
        mkdir -p "$root/build"
        exec 9>"$root/build/environment.lock"
        flock 9
    fi
    if ! is_ready "$kind"; then
        if ! "$python" -m pip --version >/dev/null 2>&1; then
            find_python >/dev/null || install_venv
            if [ -d "$environment" ] && [ ! -f "$environment/pyvenv.cfg" ] && [ -n "$(ls -A "$environment")" ]; then
                say "$environment is no virtual environment and not empty: name another folder in MESHQ_VENV."
                exit 1
            fi
            base=$(find_python) || { say "python3-venv is installed, but no Python 3.11 or newer here can make a virtual environment."; exit 1; }
            say "Making the virtual environment $environment with $("$base" --version 2>&1) ..."
            "$base" -m venv --clear "$environment"
        fi
        say "Installing meshq and what it needs; this takes a minute the first time ..."
        rm -f "$environment/meshq.stamp"
        pip_install --editable .
        if [ "$kind" = dev ]; then
            requirements=$(mktemp)
            dev_requirements >"$requirements"
            pip_install --requirement "$requirements"
            rm -f "$requirements"
        fi
        stamp "$kind" >"$environment/meshq.stamp"
    fi
    if command -v flock >/dev/null 2>&1; then exec 9>&-; fi
}
