# Sourced by the scripts beside it: Debian packages, the virtual environment, erofsd in it.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"

say() {
    if [ -t 2 ]; then printf '\033[1m==> %s\033[0m\n' "$*" >&2; else printf '==> %s\n' "$*" >&2; fi
}

die() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit "${2:-1}"
}

is_installed() {
    [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# install_packages NAME...: those that are missing, from Debian.
install_packages() {
    local name missing=()
    for name; do is_installed "$name" || missing+=("$name"); done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "needs these packages, and there is no apt-get to install them: ${missing[*]}"
    [ "$(id -u)" -eq 0 ] || die "needs root to install: ${missing[*]}"
    say "install ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update --quiet=2 || say "apt-get update failed: trying with the package lists that are here"
    apt-get install --yes --quiet=2 --no-install-recommends "${missing[@]}" </dev/null >&2
    # Some bring a service that starts by itself. Nothing here needs it running.
    for name in "${missing[@]}"; do
        case $name in
            docker-registry) stop_service docker-registry ;;
            nginx-light) stop_service nginx ;;
        esac
    done
}

stop_service() {
    if [ -d /run/systemd/system ]; then
        systemctl disable --now --quiet "$1" >&2 || true
    elif [ -x "/etc/init.d/$1" ]; then
        "/etc/init.d/$1" stop >/dev/null 2>&1 || true
    fi
}

# prepare_python [EXTRA]: the virtual environment, with erofsd and the dependencies of that extra. Does nothing
# when it was done before and what it depends on has not changed.
prepare_python() {
    local extra=${1:-} wanted stamp
    wanted=$(cd "$root" && { pwd; /usr/bin/python3 --version; find pyproject.toml setup.py cffi_build -type f \
        -not -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha256sum; } | sha256sum)
    for stamp in "$venv/.installed-$extra" "$venv/.installed-test"; do
        if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return 0; fi
    done
    /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "needs Python 3.11 or later"
    if ! "$venv/bin/python" -c '' 2>/dev/null; then
        say "create $venv"
        /usr/bin/python3 -m venv --clear "$venv"
    fi
    say "install erofsd and its dependencies into $venv"
    "$venv/bin/python" -m pip install --disable-pip-version-check --editable "$root${extra:+[$extra]}" >&2
    printf '%s\n' "$wanted" >"$venv/.installed-$extra"
}
